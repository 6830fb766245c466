"""What is measured: which sizes and arms, on which batch, how often. Checked before all else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from bitnet_jax import ladder
from bitnet_jax.attention import IMPLEMENTATIONS
from bitnet_jax.carriers import CARRIERS
from bitnet_jax.errors import ConfigError, choose, require
from bitnet_jax.model import TransformerConfig
from bitnet_jax.optim import OptimizerConfig
from bitnet_jax.precision import PRECISIONS, Precision, get_precision
from bitnet_jax.train_step import StepConfig

BASE = "bf16"  # what the other arms are compared with, where it is measured


@dataclasses.dataclass(frozen=True)
class Workload:
    """A field a flag. The sizes are the ladder's, but for `layers` and `vocab`.

    arms: names of arms, or `ARM:CARRIER` for another dtype of its integer product.
    batch_tokens: a step's, in rows of sequence_length, cut into so many microbatches.
    layers: in place of the size's own, so that a wide model is measured in little time.
    attention: how ours is computed, a name in `bitnet_jax/attention.py`.
    peers: names of other people's code, which the suites `step` and `decode` measure too.

    Raises:
      ConfigError: what is unknown, or does not fit together.
    """

    sizes: tuple[str, ...] = ("7m",)
    arms: tuple[str, ...] = ("ternary", "bf16")
    sequence_length: int = 256
    batch_tokens: int = 4096
    layers: int | None = None
    vocab: int = 256
    repeats: int = 7
    microbatches: int = 1
    attention: str = "blocks"
    peers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("sizes", "arms", "peers"):
            names = getattr(self, key)
            require(len(set(names)) == len(names), key, ",".join(names), "name each once")
            require(len(names) > 0 or key == "peers", key, "", "name at least one")
        for size in self.sizes:
            choose("sizes", size, ladder.LADDER)
        for name in self.arms:
            arm(name)
        choose("attention", self.attention, IMPLEMENTATIONS)
        on_gpu = jax.default_backend() == "gpu"
        require(self.attention != "cudnn" or on_gpu, "attention", "cudnn", "it needs an NVIDIA GPU")
        for key, least in (("sequence_length", 2), ("vocab", 2), ("repeats", 1), ("layers", 1)):
            value = getattr(self, key)
            require(value is None or value >= least, key, value, f"it must be at least {least}")
        require(
            self.batch_tokens >= 1 and self.batch_tokens % self.sequence_length == 0,
            "batch_tokens",
            self.batch_tokens,
            f"it must be a multiple of sequence_length={self.sequence_length}",
        )
        require(
            self.microbatches >= 1 and self.rows % self.microbatches == 0,
            "microbatches",
            self.microbatches,
            f"it must divide the batch of {self.rows} sequences",
        )

    @property
    def rows(self) -> int:
        """Sequences a step."""
        return self.batch_tokens // self.sequence_length

    @property
    def base(self) -> str:
        """The arm in the denominators."""
        return BASE if BASE in self.arms else self.arms[-1]

    def suffix(self, size: str) -> str:
        """What tells a ratio's size where there are several."""
        return f"@{size}" if len(self.sizes) > 1 else ""

    def model(self, size: str) -> TransformerConfig:
        shape = ladder.get_shape(size)
        if self.layers:
            shape = shape._replace(layers=self.layers)
        return TransformerConfig(vocab_size=self.vocab, attention=self.attention, **shape._asdict())

    def step(self, size: str, name: str) -> StepConfig:
        """The step of an arm, with the optimizer that runs have by default."""
        return StepConfig(
            self.model(size), arm(name), OptimizerConfig(), microbatches=self.microbatches
        )

    def batch(self) -> Int[Array, "B T+1"]:
        """Random tokens, always the same, on the device."""
        shape = (self.rows, self.sequence_length + 1)
        return jnp.asarray(np.random.default_rng(0).integers(0, self.vocab, shape, np.int32))

    def batch_shape(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of `batch`."""
        return jax.ShapeDtypeStruct((self.rows, self.sequence_length + 1), jnp.int32)


def arm(name: str) -> Precision:
    """The arm called `NAME` or `NAME:CARRIER`.

    Raises:
      ConfigError: no such arm or carrier, or an arm that has no codes to carry.
    """
    base, colon, carrier = name.partition(":")
    choose("arms", base, PRECISIONS)
    if not colon:
        return get_precision(base)
    choose(f"arms={name!r}: its carrier", carrier, CARRIERS)
    precision = get_precision(base, carrier)
    if not precision.quantized:
        raise ConfigError(f"arms={name!r}: {base} multiplies no codes, so it has no carrier")
    return precision
