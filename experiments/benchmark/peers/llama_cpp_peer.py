"""The same weights in llama.cpp, decoded a token at a time: a peer of the suite `decode`.

The model leaves as `experiments.export --format=gguf` writes it, with the embedding, which is the
head, in float32 as ours is. Threads are as many as this process may use cores, XLA's own number.
"""

import functools
import tempfile
from pathlib import Path

import jax
import llama_cpp
import numpy as np

from bitnet_jax.errors import ConfigError
from bitnet_jax.export import gguf
from bitnet_jax.export.blocks import TQ_BLOCK
from bitnet_jax.export.model import TrainedModel
from bitnet_jax.export.packages import package
from bitnet_jax.precision import get_precision
from experiments.benchmark.decode import (
    GOAL_WIDTH,
    STEPS,
    initial_params,
    model_config,
    positions,
    prompt,
)
from experiments.benchmark.environment import cores
from experiments.benchmark.peers import Rival
from experiments.benchmark.workload import Workload

VOCAB = 256  # of the bytes that the file's tokenizer has
# A type of the projections, and which of our cases holds them in as many bits.
COUNTERPARTS = {"TQ2_0": "2bit", "TQ1_0": "base3", "F16": "bfloat16", "F32": "float32"}


def check(workload: Workload) -> None:
    """Refuse what llama.cpp would not compute, or the files could not hold.

    Raises:
      ConfigError: says what, and what would do.
    """
    package("gguf")
    platform = jax.default_backend()
    if platform != "cpu":
        raise ConfigError(
            f"--peer=llama.cpp: JAX runs on a {platform}, and it is measured on a CPU; set "
            "JAX_PLATFORMS=cpu"
        )
    if workload.vocab != VOCAB:
        raise ConfigError(f"--vocab={workload.vocab}: --peer=llama.cpp has {VOCAB} bytes")
    for size in workload.sizes:
        shape = workload.model(size)
        for width in (shape.width, shape.ff_width):
            if width % TQ_BLOCK:
                raise ConfigError(
                    f"--sizes={size}: --peer=llama.cpp has trits in rows of a multiple of "
                    f"{TQ_BLOCK}, not of {width}; give sizes from 7m up"
                )


def rivals(workload: Workload, size: str) -> dict[str, Rival]:
    """`llama.cpp_TQ2_0` and the like, of our initial parameters."""
    config, arm = model_config(workload, size), "ternary"
    params = initial_params(config, arm)
    room = positions(workload)
    model = TrainedModel(config, get_precision(arm), params, room, None, 0, {})
    return {
        f"llama.cpp_{name}": _rival(model, name, room, goal)
        for name, goal in (
            (name, 1.0 if case in ("2bit", "base3") and config.width >= GOAL_WIDTH else None)
            for name, case in COUNTERPARTS.items()
        )
    }


def _rival(model: TrainedModel, name: str, room: int, goal: float | None) -> Rival:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        gguf.write(model, path, gguf.Layout(name))
        engine = Engine(path, room, prompt(model.config.vocab_size).tolist())
    return Rival(COUNTERPARTS[name], engine, engine.weight_bytes, goal, _notes())


def _notes() -> tuple[str, ...]:
    return (
        f"llama.cpp: llama-cpp-python {llama_cpp.__version__}, {cores()} threads, as XLA has",
        "llama.cpp rounds the inputs of TQ products to int8 by blocks of 256 (ours: by token), "
        "those of F16 products to float16, of F32 products and of the head not at all; its keys "
        "and values are float16",
    )


class Engine:
    """A file in llama.cpp: each call decodes STEPS tokens, the likeliest each, after the prompt.

    weight_bytes: of all tensors, the embedding once, which a token reads as the head.
    """

    def __init__(self, path: Path, room: int, prompt: list[int]):
        llama_cpp.llama_log_set(_silence(), None)
        # Read into memory, as ours is, and the file may go.
        self._engine = llama_cpp.Llama(
            str(path),
            n_ctx=room,
            n_threads=cores(),
            n_threads_batch=cores(),
            use_mmap=False,
            verbose=False,
        )
        self.weight_bytes = int(llama_cpp.llama_model_size(self._engine.model))
        self._vocab = self._engine.n_vocab()
        self._kept = len(prompt)
        self._first = self._next(prompt)

    def __call__(self) -> list[int]:
        memory = llama_cpp.llama_get_memory(self._engine.ctx)
        llama_cpp.llama_memory_seq_rm(memory, 0, self._kept, -1)
        found, token = [], self._first
        for _ in range(STEPS):
            token = self._next([token])
            found.append(token)
        return found

    def _next(self, tokens: list[int]) -> int:
        """The likeliest after these, which join those before."""
        held = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(
            self._engine.ctx, llama_cpp.llama_batch_get_one(held, len(held))
        )
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        logits = llama_cpp.llama_get_logits_ith(self._engine.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())


@functools.cache  # which llama.cpp goes on calling
def _silence() -> object:
    return llama_cpp.llama_log_callback(lambda level, text, data: None)
