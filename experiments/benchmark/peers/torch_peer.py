"""The same model and step in PyTorch, as a good user of PyTorch writes them.

Float32 masters, cast where a product needs them; fused attention; fused AdamW; torch.compile over
the forward pass, the loss and, with them, the backward pass. The ternary model is made of BitLinear
layers as in Microsoft's "Training Tips, Code and FAQ" (2024): both operands are quantized and
dequantized in floats, gradients pass straight through, and the product is one of bfloat16.

Axis legend in `bitnet_jax/model.py`; kernels are [out, in] here.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
import torch.compiler.config
import torch.nn.functional as F
from jaxtyping import Array, Int
from torch import Tensor, nn

from bitnet_jax.errors import ConfigError
from bitnet_jax.model import TransformerConfig
from bitnet_jax.train_step import StepConfig
from experiments.benchmark.peers import Contender
from experiments.benchmark.step import initial_state
from experiments.benchmark.workload import Workload

ARMS = ("bf16", "ternary")
SCALE_FLOOR = 1e-5  # the FAQ's


def contenders(workload: Workload, size: str, tokens: Int[Array, "B T1"]) -> dict[str, Contender]:
    """`torch_bf16` and `torch_ternary`, those of them that the workload has an arm for.

    They start from our initial parameters.

    Raises:
      ConfigError: this PyTorch cannot use the device that JAX uses.
    """
    device = _device()
    ours = {name.split(":")[0] for name in workload.arms}
    return {
        f"torch_{arm}": _contender(workload.step(size, arm), arm, tokens, device)
        for arm in ARMS
        if arm in ours
    }


def _device() -> torch.device:
    platform = jax.default_backend()
    if platform == "cpu":
        return torch.device("cpu")
    if platform == "gpu" and torch.cuda.is_available():
        return torch.device("cuda")
    raise ConfigError(f"--peer=torch: JAX runs on a {platform}, which this PyTorch cannot use")


def _contender(
    config: StepConfig, arm: str, tokens: Int[Array, "B T1"], device: torch.device
) -> Contender:
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    torch.compiler.config.force_disable_caches = True  # those on disk: as with our own compile time
    held, began = _allocated(device), time.perf_counter()
    how = "torch.compile"
    try:
        training = Training(_model(config, arm, tokens.shape[1] - 1, device), config, tokens)
        training.compile()
        training()
    except Exception as error:  # of a broken compiler; a mistake of ours comes again without it
        how = f"eager, since torch.compile failed ({_first_line(error)})"
        training = Training(_model(config, arm, tokens.shape[1] - 1, device), config, tokens)
        training()
    seconds = time.perf_counter() - began
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Contender(
        arm,
        training,
        seconds,
        _peak_bytes(training, held, device),
        goal=1.0,
        notes=(
            f"torch_{arm}: PyTorch {torch.__version__}, {how}{threads}",
            "compile time of torch: from making the model until its first step is done",
        ),
    )


def _model(config: StepConfig, arm: str, length: int, device: torch.device) -> "Transformer":
    model = Transformer(config.model, length, ternary=arm == "ternary")
    copy_parameters(model, initial_state(config).params)
    return model.to(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _peak_bytes(training: "Training", held: int, device: torch.device) -> int | None:
    """Of a step, beyond what was held before there was a model. PyTorch counts on a GPU alone."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    training()
    return torch.cuda.max_memory_allocated() - held


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Training:
    """A model in training: each call makes one step and waits for it."""

    def __init__(self, model: "Transformer", config: StepConfig, tokens: Int[Array, "B T1"]):
        self.model = model
        self._loss: Callable[[Tensor, Tensor], Tensor] = model.loss
        batch = torch.tensor(np.asarray(tokens), dtype=torch.int64, device=model.embedding.device)
        parts = batch.chunk(config.microbatches)
        self._batches = [(p[:, :-1].contiguous(), p[:, 1:].contiguous()) for p in parts]
        self._parameters = list(model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in self._parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self._clip_norm = config.optimizer.clip_norm
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=1e-3,
            betas=(config.optimizer.b1, config.optimizer.b2),
            eps=config.optimizer.epsilon,
            fused=True,
        )

    def compile(self) -> None:
        """From here on, forward and backward passes are compiled ones."""
        self._loss = torch.compile(self.model.loss, dynamic=False)

    def __call__(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        for inputs, targets in self._batches:
            (self._loss(inputs, targets) / len(self._batches)).backward()
        nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        if self.model.embedding.is_cuda:
            torch.cuda.synchronize()


# ---- The model ---------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in and out of float32."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self._epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.scale.shape, self.scale, self._epsilon)


class Linear(nn.Module):
    """x W^T without bias; the float32 master is cast to the compute dtype."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(outputs, inputs))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.kernel.to(self.dtype))


class BitLinear(Linear):
    """The FAQ's, with the norm before it left to the model."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + (quantize_activations(x) - x).detach()
        w: Tensor = self.kernel
        w = w + (quantize_weights(w) - w).detach()
        return F.linear(x.to(self.dtype), w.to(self.dtype))


def quantize_activations(x: Tensor) -> Tensor:
    """To int8 by the largest magnitude of each token, and back."""
    scale = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp_(min=SCALE_FLOOR)
    return (x * scale).round().clamp_(-128, 127) / scale


def quantize_weights(w: Tensor) -> Tensor:
    """To trits by the mean magnitude, and back."""
    scale = 1.0 / w.abs().mean().clamp_(min=SCALE_FLOOR)
    return (w * scale).round().clamp_(-1, 1) / scale


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, c: TransformerConfig, linear: Callable[[int, int], Linear]):
        super().__init__()
        self._heads, self._kv_heads = c.heads, c.kv_heads
        self.q = linear(c.width, c.heads * c.head_size)
        self.k = linear(c.width, c.kv_heads * c.head_size)
        self.v = linear(c.width, c.kv_heads * c.head_size)
        self.sub_norm = RMSNorm(c.width, c.norm_epsilon)
        self.out = linear(c.heads * c.head_size, c.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def heads(y: Tensor, count: int) -> Tensor:
            return y.view(batch, length, count, -1).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            rotate(heads(self.q(x), self._heads), cos, sin),
            rotate(heads(self.k(x), self._kv_heads), cos, sin),
            heads(self.v(x), self._kv_heads),
            is_causal=True,
            enable_gqa=self._kv_heads != self._heads,
        )
        y = y.transpose(1, 2).reshape(batch, length, -1)
        return self.out(self.sub_norm(y))


def rotary_angles(length: int, head_size: int, theta: float) -> Tensor:
    """Position times frequency, float64 [T, H/2]."""
    frequencies = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    return torch.outer(torch.arange(length, dtype=torch.float64), frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """First half against second, in float32 and back. x [B, N, T, H], angles [T, H/2]."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


class Mlp(nn.Module):
    """down(norm(relu(gate x)^2 * (up x)))."""

    def __init__(self, c: TransformerConfig, linear: Callable[[int, int], Linear]):
        super().__init__()
        self.gate, self.up = linear(c.width, c.ff_width), linear(c.width, c.ff_width)
        self.sub_norm = RMSNorm(c.ff_width, c.norm_epsilon)
        self.down = linear(c.ff_width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.gate(x).float()).square() * self.up(x).float()
        return self.down(self.sub_norm(y))


class Block(nn.Module):
    """Attention and MLP, each added to a float32 residual stream."""

    def __init__(self, c: TransformerConfig, linear: Callable[[int, int], Linear]):
        super().__init__()
        self.attention_norm = RMSNorm(c.width, c.norm_epsilon)
        self.attention = Attention(c, linear)
        self.mlp_norm = RMSNorm(c.width, c.norm_epsilon)
        self.mlp = Mlp(c, linear)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """`bitnet_jax.model.Transformer` with its default block and tied embeddings.

    For sequences of one length. Parameters have the names that ours have, and no values yet:
    `copy_parameters`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        c: TransformerConfig,
        length: int,
        ternary: bool,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        kind = BitLinear if ternary else Linear

        def linear(inputs: int, outputs: int) -> Linear:
            return kind(inputs, outputs, dtype)

        self._dtype = dtype
        self.embedding = nn.Parameter(torch.empty(c.vocab_size, c.width))
        self.blocks = nn.ModuleList(Block(c, linear) for _ in range(c.layers))
        self.final_norm = RMSNorm(c.width, c.norm_epsilon)
        angles = rotary_angles(length, c.head_size, c.rope_theta)
        self.register_buffer("cos", angles.cos().float())
        self.register_buffer("sin", angles.sin().float())

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits in float32, [B, T, V]."""
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = self.final_norm(x).to(self._dtype)
        return F.linear(x, self.embedding.to(self._dtype)).float()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats a token."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


def copy_parameters(model: Transformer, params: dict) -> None:
    """Give the model the values of our parameter tree."""
    names = set()
    with torch.no_grad():
        for name, value in by_torch_name(params):
            model.get_parameter(name).copy_(torch.from_numpy(value))
            names.add(name)
    assert names == {name for name, _ in model.named_parameters()}


def by_torch_name(params: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Each leaf of our tree of parameters (or of their gradients) as the PyTorch model has it.

    Ours are stacked over blocks and have kernels [in, out].
    """
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        keys = [part.key for part in path]
        stacked = keys[0] == "blocks"
        for layer, one in enumerate(np.array(value) if stacked else [np.array(value)]):
            prefix = ["blocks", str(layer), *keys[1:]] if stacked else keys
            yield ".".join(prefix), np.ascontiguousarray(one.T if keys[-1] == "kernel" else one)
