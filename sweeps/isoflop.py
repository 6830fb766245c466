"""IsoFLOP profiles: several sizes at each of several compute budgets (Hoffmann et al. 2022, 3.2).

    python -m experiments.run --sweep --config=sweeps/isoflop.py:size=800k

`size` names the largest of the five sizes. The four budgets are multiples of what the middle size
costs at 20 tokens a parameter, each about 1.6 times the one before. Each size reaches each budget
on a branch of its one trunk, for .55 of the FLOPs that a run for each budget would cost.
"""

from ml_collections import ConfigDict

from bitnet_jax import cost, ladder
from bitnet_jax.configs import default
from bitnet_jax.errors import ConfigError
from bitnet_jax.model import TransformerConfig
from sweeps.grid import Point, axis, parse_arg, product, zipit

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, table 3, for 16-bit models


def get_config(arg: str | None = None) -> ConfigDict:
    """The base of every run, and the axes.

    Raises:
      ConfigError: a size that is unknown or has fewer than four smaller ones.
    """
    largest = parse_arg(arg, size="800k")["size"]
    ladder.get_shape(largest)
    names = list(ladder.LADDER)
    last = names.index(largest) + 1
    sizes = names[max(0, last - 5) : last]
    if len(sizes) < 4:
        raise ConfigError(f"size={largest!r}: an isoFLOP profile needs four sizes; take {names[3]}")
    c = default.get_config()
    c.name = f"isoflop-{largest}"
    c.sweep.sizes = tuple(sizes)
    c.sweep.precisions = ("ternary", "fp16")
    c.sweep.budgets = (0.5, 0.8, 1.25, 2.0)  # of the middle size at 20 tokens a parameter
    c.sweep.vocab_size = 256  # of the corpus, for the FLOPs of the head
    return c


def budgets_in_tokens(config: ConfigDict, size: str) -> tuple[int, ...]:
    """The tokens with which `size` spends each compute budget, in whole batches."""

    def model(name: str) -> TransformerConfig:
        shape = ladder.get_shape(name)._asdict()
        return TransformerConfig(vocab_size=config.sweep.vocab_size, **shape)

    def flops(name: str) -> int:
        return cost.training_flops_per_token(model(name), config.data.sequence_length)

    middle = config.sweep.sizes[len(config.sweep.sizes) // 2]
    parameters = cost.count_parameters(model(middle)).non_embedding
    unit = TOKENS_PER_PARAMETER * parameters * flops(middle)
    batch = config.train.batch_tokens
    return tuple(round(b * unit / flops(size) / batch) * batch for b in config.sweep.budgets)


def sweep(config: ConfigDict) -> list[Point]:
    """Every size with its own budgets, in every arm."""
    sizes = config.sweep.sizes
    tokens = [budgets_in_tokens(config, size) for size in sizes]
    return product(
        zipit(axis("model.size", sizes), axis("train.tokens", tokens)),
        axis("precision", config.sweep.precisions),
    )
