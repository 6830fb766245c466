"""The sweep that is tortured: 16 runs of some seconds in all, alone and in groups, both arms."""

from ml_collections import ConfigDict

from bitnet_jax.configs import default
from sweeps.grid import Point, axis, chain, product

STEPS = 120  # of the largest budget
BATCH_TOKENS = 128


def get_config(arg: str | None = None) -> ConfigDict:
    """A model that makes hundreds of steps a second; everything is logged and saved often."""
    c = default.get_config()
    c.name = "tortured"
    c.model.update(size="27k", layers=1, width=16, ff_width=32, heads=2, kv_heads=1)
    c.data.sequence_length = 16
    c.train.batch_tokens = BATCH_TOKENS
    c.eval.tokens = 464
    c.log.every = 7  # divides no segment
    c.checkpoint.seconds = 0.5
    c.launch.parallel = 2
    c.tracking.wandb = "disabled"
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """Two groups of four in one arm; in the other a group, and four runs alone with a further
    budget."""
    seeds, rates = axis("seed", (0, 1)), axis("optim.peak_lr", (0.01, 0.003))
    more, ternary = axis("seed", (2, 3)), axis("precision", ("ternary",))
    fp16 = axis("precision", ("fp16",))
    return chain(
        product(_launched(4, (2, 1)), ternary, chain(seeds, more), rates),
        product(_launched(4, (2, 1)), fp16, seeds, rates),
        product(_launched(1, (4, 2, 1)), fp16, more, rates),
    )


def _launched(group: int, parts: tuple[int, ...]) -> list[Point]:
    """Runs of a group's size, with budgets of these parts of the largest."""
    tokens = tuple(STEPS // part * BATCH_TOKENS for part in parts)
    return [{"launch.group": group, "train.tokens": tokens}]
