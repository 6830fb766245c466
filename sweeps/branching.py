"""Branches of one trunk beside runs of their own: the same losses, for fewer FLOPs?

    python -m experiments.run --sweep --config=sweeps/branching.py
    python -m analysis.branching results/branching/endpoints.parquet

`size` names the model's size. Every arm and seed has three kinds of runs, told in column tag_kind:

branched: one run, whose trunk branches into a decay at each budget.
same: a run for each budget, with as many steps of warm-up as the trunk. Its steps are those of the
  trunk and of one branch, so its loss must be that of the branch to the last bit.
own: a run for each budget, with a warm-up that is a share of that budget, as one trained by itself
  would have. The trunk's is that share of the smallest budget, where `same` is this run, too.
"""

from ml_collections import ConfigDict

from bitnet_jax import ladder
from bitnet_jax.configs import default
from bitnet_jax.errors import require
from sweeps.grid import Point, axis, parse_arg, product, tags


def get_config(arg: str | None = None) -> ConfigDict:
    """The base of every run, and the axes.

    Raises:
      ConfigError: a size that is unknown.
    """
    size = parse_arg(arg, size="95k")["size"]
    ladder.get_shape(size)
    c = default.get_config()
    c.name = "branching"
    c.model.size = size
    c.eval.tokens = 131_072
    c.log.layers = False
    c.checkpoint.keep_model = False
    c.tags.kind = c.tags.decay_fraction = ""
    c.sweep.precisions = ("ternary", "fp16")
    c.sweep.seeds = (0, 1, 2)
    c.sweep.budgets = (200_000, 400_000, 800_000)
    c.sweep.warmup_fraction = 0.1  # of the smallest budget; of its own in the kind `own`
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """Every kind at every seed of every arm."""
    return product(
        axis("precision", config.sweep.precisions), axis("seed", config.sweep.seeds), kinds(config)
    )


def kinds(config: ConfigDict) -> list[Point]:
    """The branched run, and runs of their own of both kinds; no run stands here twice.

    Raises:
      ConfigError: budgets whose warm-ups are equal, so that there is nothing to compare.
    """
    budgets, share = config.sweep.budgets, config.sweep.warmup_fraction
    ends = [max(1, round(budget / config.train.batch_tokens)) for budget in budgets]  # steps
    warmups = [round(share * end) for end in ends]

    def run(kind: str, tokens: tuple[int, ...], warmup_fraction: float) -> Point:
        words = tags(kind=kind, decay_fraction=str(config.schedule.decay_fraction))
        return {"train.tokens": tokens, "schedule.warmup_fraction": warmup_fraction, **words}

    same, own = [], []
    for budget, end, warmup in zip(budgets, ends, warmups, strict=True):
        same.append(run("same", (budget,), warmups[0] / end))
        if warmup != warmups[0]:
            own.append(run("own", (budget,), share))
    require(
        len(own) > 0, "sweep.budgets", budgets, "give two or more, whose warm-ups differ in steps"
    )
    return [run("branched", tuple(budgets), share), *same, *own]
