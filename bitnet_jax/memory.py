"""What a training step needs of a device's memory, from its config alone.

Bytes of `compiled_steps` for one run, in XLA's count: arguments, outputs that are no arguments, and
temporaries. What a step keeps is counted exactly. What it holds in between is counted from
`saving.py` (what forward keeps for backward) and, for values that live within a block, from
coefficients that were read off XLA's buffers on a CPU (`WITHIN_BLOCK`, `LOOP_COPIES`).
tests/test_memory.py holds the total against XLA's `memory_analysis`: within 15 %.

Known errors. Small models with large batches come out up to 8 % low, since XLA's packing of buffers
leaves gaps. On a GPU or TPU, which fuse more, `within_block` and `copies` are too high: `at_least`
leaves them out. A mesh's buffers for what travels are one block's kernels, not measured.
"""

import dataclasses

import jax.numpy as jnp

from bitnet_jax import attention, cost, packing
from bitnet_jax.loss import MAX_LOGITS
from bitnet_jax.model import TransformerConfig
from bitnet_jax.precision import Precision
from bitnet_jax.train_step import StepConfig

FLOAT32 = 4
SCALARS = 5 * FLOAT32  # of `TrainState`
TOLERANCE = 0.15  # of the total, against XLA

# Float32 arrays of a token that are alive at once while a block's backward pass runs: how many of
# feed-forward width and of the model's, by where norms stand; and of the keys' width, for every
# block of queries after the first.
WITHIN_BLOCK = {"sub": (5, 12), "inside": (5, 12), "pre": (2, 9)}
KEY_WIDE = 1.5
LOOP_COPIES = 0.5  # of the parameters, that XLA makes of what a loop changes in place


@dataclasses.dataclass(frozen=True)
class Batch:
    """What of a batch is on a device at a time. rows: of a microbatch; length: tokens a row."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. The first four are there all the time, the others in one phase.

    parameters, optimizer, snapshots: the state, exactly. data: token files and batches.
    gradients: of all parameters, and their sums over microbatches. codes: of quantized weights.
    activations: saved by forward for backward. within_block: alive while one block is computed.
    gathered: a block's whole kernels, where a mesh cuts them. head: logits and their gradients.
    copies: of the state, within a step. update: what the optimizer's step holds.
    """

    parameters: int
    optimizer: int
    snapshots: int
    data: int
    gradients: int
    codes: int
    activations: int
    within_block: int
    gathered: int
    head: int
    copies: int
    update: int

    @property
    def state(self) -> int:
        """What a step changes, and a checkpoint holds; an anchor is a second one."""
        return self.parameters + self.optimizer + self.snapshots + SCALARS

    @property
    def temporary(self) -> int:
        """The largest of a step's phases: the head, a block's backward pass, the update."""
        saved = self.activations + self.codes + self.copies
        backward = saved + self.gradients + self.within_block + self.gathered
        return max(saved + self.gradients + self.head, backward, self.update)

    @property
    def total(self) -> int:
        """Of one step, as XLA counts it."""
        return self.state + self.data + self.temporary

    @property
    def lower_bound(self) -> int:
        """Parameters, optimizer state and gradients: less than this no step can have."""
        return self.parameters + self.optimizer + self.gradients

    def at_least(self, on_cpu: bool) -> int:
        """What is surely needed: the total less its tolerance, or the lower bound.

        on_cpu: whether the coefficients are those of the device; else they are left out.
        """
        sure = self.total
        if not on_cpu:
            sure = self.state + self.data + self.gradients + self.codes + self.activations
        return max(self.lower_bound, int((1 - TOLERANCE) * sure))


def step_memory(
    step: StepConfig, batch: Batch, data_bytes: int = 0, data: int = 1, tensor: int = 1
) -> Memory:
    """The memory of a step on one device of a mesh.

    batch: a whole microbatch, before `data` cuts it. data_bytes: tokens resident on the device.
    data: devices that share batch, parameters and optimizer state (FSDP). tensor: devices that
      share heads and feed-forward width.
    """
    c, arm = step.model, step.precision
    own = Batch(-(-batch.rows // data), batch.length)
    kernels, others = _groups(c, arm)
    share = data * tensor
    parts = step.microbatches > 1
    gradients = FLOAT32 * (_cut(kernels, share) + others)
    parameters = parameter_bytes(step, data, tensor)
    optimizer = optimizer_bytes(step, data, tensor)
    saved, carried = _saved_by_block(step, own, tensor), FLOAT32 * own.tokens * c.width
    codes = _code_bytes(step) if not c.remat else _code_bytes(step) // c.layers
    known = _code_bytes(step) if parts and _knows_codes(step) else 0
    within = _within_block(c, own, tensor) + (saved if c.remat else 0)
    copies = LOOP_COPIES * gradients
    orthogonal = FLOAT32 * _cut(kernels, share) if step.optimizer.name == "muon" else 0
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        snapshots=_cut(snapshot_bytes(c, arm), share),
        data=data_bytes + FLOAT32 * own.rows * max(1, step.microbatches),
        gradients=gradients * (2 if parts else 1),
        codes=_cut(codes + known, share),
        activations=c.layers * (carried + (0 if c.remat else saved)),
        within_block=int(within),
        gathered=_gathered_bytes(c, arm, tensor) if data > 1 else 0,
        head=head_bytes(c, arm, own.tokens),
        copies=int(copies),
        update=int(gradients * (2 if parts else 1) * LOOP_COPIES)
        + parameters + optimizer + orthogonal,
    )  # fmt: skip


def _cut(size: int, devices: int) -> int:
    return -(-size // devices)


def _groups(c: TransformerConfig, arm: Precision) -> tuple[int, int]:
    """Parameters that are kernels, and all others, learned scales among them."""
    n = cost.count_parameters(c)
    learned = c.layers * sum(cost.scales(c, arm)) if arm.weight_quantizer.learned else 0
    return n.quantized, n.embedding + n.norms + learned


def parameter_bytes(step: StepConfig, data: int = 1, tensor: int = 1) -> int:
    """Float32 shadow weights: 4 bytes a parameter; 2 of a kernel whose latents are bfloat16."""
    kernels, others = _groups(step.model, step.precision)
    width = FLOAT32 if step.optimizer.latents == "float32" else 2
    return width * _cut(kernels, data * tensor) + FLOAT32 * others


def optimizer_bytes(step: StepConfig, data: int = 1, tensor: int = 1) -> int:
    """Float32 moments: two of every parameter (adamw), one (lion), or one of kernels and two of the
    rest (muon, bop); and counters: optax's step numbers and Muon's three coefficients."""
    kernels, others = _groups(step.model, step.precision)
    kernels = _cut(kernels, data * tensor)
    moments = {"adamw": (2, 2), "lion": (1, 1), "muon": (1, 2), "bop": (1, 2)}
    counters = {"adamw": 1, "lion": 1, "muon": 1 + 3 + 1, "bop": 1}
    of_kernels, of_others = moments[step.optimizer.name]
    numbers = of_kernels * kernels + of_others * others + counters[step.optimizer.name]
    return FLOAT32 * numbers


def snapshot_bytes(c: TransformerConfig, arm: Precision) -> int:
    """Three snapshots of all codes (`telemetry.py`): 2 bits a code where they fit, else a byte."""
    if not arm.quantized:
        return 0
    codes = packing.TWO_BITS.codes if packing.fits(arm.weight_quantizer) else 1
    return 3 * c.layers * sum(n * _cut(p, codes) for n, p in cost.linear_shapes(c).values())


def _keeps_codes(step: StepConfig) -> bool:
    """Whether products are made of int8 codes of weights, which forward saves for backward."""
    return step.precision.quantized and not step.warming


def _knows_codes(step: StepConfig) -> bool:
    """Whether codes are made once for all microbatches."""
    return step.precision.quantized and step.precision.estimator != "stochastic"


def _code_bytes(step: StepConfig) -> int:
    """A byte a weight, and a float32 scale a block of weights."""
    c, arm = step.model, step.precision
    if not _keeps_codes(step):
        return 0
    return cost.count_parameters(c).quantized + FLOAT32 * c.layers * sum(cost.scales(c, arm))


def _saved_by_block(step: StepConfig, batch: Batch, tensor: int) -> int:
    """What a block's forward pass keeps beside its input: `operand`, `product` and `attention`.

    Operands of products: int8 and a float32 scale a token, or the compute dtype. Products that a
    norm or an activation starts from, and attention's q, k, v, y and probabilities: compute dtype.
    cudnn keeps none of attention's.
    """
    c, arm = step.model, step.precision
    size = jnp.dtype(arm.compute_dtype).itemsize
    coded = arm.activations != "none" and not step.warming
    ff, heads = _cut(c.ff_width, tensor), _cut(c.heads, tensor)
    keys = _cut(c.kv_heads, tensor) * c.head_size
    sharing = (3, 2 if c.gated else 1) if c.norms == "inside" else (1, 1)
    operands = [*[c.width] * sum(sharing), heads * c.head_size, ff]
    kept = sum(n + FLOAT32 if coded else n * size for n in operands)
    products: float = c.width + ff * (2 if c.gated else 1)
    if c.attention == "blocks":
        seen = sum((end - start) * end for start, end in attention.query_blocks(batch.length))
        products += 2 * heads * c.head_size + 2 * keys + heads * seen / batch.length
    return int(batch.tokens * (kept + size * products))


def _within_block(c: TransformerConfig, batch: Batch, tensor: int) -> float:
    """Float32 values of one block's backward pass: WITHIN_BLOCK arrays of its widths, the scores of
    one block of queries, and of every further one padded gradients of keys and values.
    """
    ff, heads = _cut(c.ff_width, tensor), _cut(c.heads, tensor)
    keys = _cut(c.kv_heads, tensor) * c.head_size
    blocks = list(attention.query_blocks(batch.length))
    scores = heads * max((end - start) * end for start, end in blocks) / batch.length
    of_ff, of_stream = WITHIN_BLOCK[c.norms]
    wide = of_ff * ff + of_stream * c.width + KEY_WIDE * (len(blocks) - 1) * keys
    return FLOAT32 * batch.tokens * (wide + scores)


def head_bytes(c: TransformerConfig, arm: Precision, tokens: int) -> int:
    """Logits of as many positions as exist at a time (`loss.MAX_LOGITS`): in float32, and their
    gradient, in float32 or twice in 16 bits; float16 logits are kept beside them. Then the head's
    gradient, in float32."""
    chunks = max(1, -(-tokens * c.vocab_size // MAX_LOGITS))
    size = 2 * FLOAT32 + (2 if arm.loss_scaling else 0)
    logits = _cut(tokens, chunks) * c.vocab_size * size
    return logits + FLOAT32 * c.vocab_size * c.width


def _gathered_bytes(c: TransformerConfig, arm: Precision, tensor: int) -> int:
    """The whole kernels of a block, as they travel: int8 codes, or the compute dtype."""
    size = 1 if arm.quantized else jnp.dtype(arm.compute_dtype).itemsize
    return size * _cut(cost.count_parameters(c).quantized // c.layers, tensor)
