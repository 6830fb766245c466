"""The study: what is a ternary parameter worth? Paired arms, each at its own tuned rates.

    python -m experiments.run --sweep --config=sweeps/study.py:part=learning_rate \\
        --workdir=results/study --config.data.source=corpora/english

In order:
  learning_rate  six peak rates for each arm at three small sizes, at two or three budgets
  weight_decay   five decays for each arm at two sizes, at the rates found
  grid           five sizes x five ratios of tokens to parameters, both arms, up to three seeds;
                 bfloat16 at two sizes
  rate_check     half and twice the rates taken, at sizes where they were extrapolated
  arms           at two sizes: ternary weights with 16-bit activations, binary, int4
  held_out       the next two sizes, whose losses are predicted before they are trained

All ratios of a size, arm and seed are branches of one trunk. Two budgets of compute: `cpu` (the
default, bytes, some hours of two cores) and `gpu` (`:part=grid,budget=gpu`, an 8k vocabulary).
`python -m experiments.next_part --config=sweeps/study.py --minutes=45` says what to run next.
"""

import dataclasses

from ml_collections import ConfigDict

from bitnet_jax import cost, ladder
from bitnet_jax.configs import default
from bitnet_jax.errors import choose
from bitnet_jax.model import TransformerConfig
from bitnet_jax.optim import tuned_peak_lr
from bitnet_jax.precision import get_precision
from sweeps.grid import Point, axis, chain, parse_arg, product

PAIR = ("ternary", "fp16")
RATES = tuple(2.0**k for k in (-2, -1, -0.5, 0, 0.5, 1))  # of the default for size and arm
CHECKS = (0.5, 2.0)  # of the rate taken
DECAYS = (0.0, 0.03, 0.1, 0.3, 1.0)
EXTRA_ARMS: tuple[Point, ...] = (
    {"precision": "ternary", "quantization.activations": "none"},
    {"precision": "binary"},
    {"precision": "ternary", "quantization.weights": "int4_absmax"},
)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What the first two parts found. ternary, floating: peak rates at 1e5 parameters; exponent of
    both in N; decays: of weights, in this order."""

    ternary: float
    floating: float
    exponent: float
    decays: tuple[float, float]

    def peak_lr(self, quantized: bool, parameters: int) -> float:
        """Of an arm at a size."""
        at_1e5 = self.ternary if quantized else self.floating
        return at_1e5 * (parameters / 1e5) ** self.exponent


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one machine can afford. Ratios are tokens a non-embedding parameter.

    found: rates and decays, once they are known; without, the default recipe's are taken.
    tuned: sizes of the learning-rate part with their ratios. decayed: of the weight-decay part.
    sizes: of the grid, with the seeds of each. sixteen_bit: sizes that bfloat16 joins.
    checked: sizes whose rates were extrapolated, with their ratios; what CHECKS leaves out is in
    the grid. extra: sizes of the further arms, with the seeds of each. held_out: predicted first,
    with their ratios.
    """

    found: Tuned | None
    sequence_length: int
    batch_tokens: int
    eval_tokens: int
    tuned: dict[str, tuple[float, ...]]
    decayed: dict[str, tuple[float, ...]]
    sizes: dict[str, int]
    ratios: tuple[float, ...]
    sixteen_bit: tuple[str, ...]
    checked: dict[str, tuple[float, ...]]
    extra: dict[str, int]
    held_out: dict[str, tuple[float, ...]]


BUDGETS = {
    "cpu": Budget(
        # Rates: least squares through the optima of the learning-rate part at 40 tokens a
        # parameter, `python -m analysis.learning_rate results/study-cpu/learning_rate/
        # endpoints.csv`. At 160 the optima lie lower (as D^-.26), in float16 more than in the
        # ternary arm, which costs at most .007 nats there.
        # Decays: the least loss, averaged over the endpoints of the weight-decay part; 0 and .03
        # are alike in the ternary arm.
        found=Tuned(ternary=4.8e-3, floating=3.4e-3, exponent=-0.60, decays=(0.03, 0.1)),
        sequence_length=128,
        batch_tokens=1024,
        eval_tokens=524_288,
        tuned={"27k": (10, 40, 160), "56k": (10, 40), "95k": (10, 40)},
        decayed={"27k": (10, 40, 160), "95k": (10, 40)},
        sizes={"27k": 3, "56k": 3, "95k": 3, "160k": 2, "330k": 2},
        ratios=(10, 20, 40, 80, 160),
        sixteen_bit=("27k", "95k"),
        checked={"330k": (10,), "800k": (10,)},
        extra={"27k": 3, "95k": 3},
        held_out={"800k": (10, 20), "1.5m": (5, 10)},
    ),
    # Not run yet: nothing is tuned, and the ratios are those that 60 million tokens of text allow
    # without many repeats.
    "gpu": Budget(
        found=None,
        sequence_length=256,
        batch_tokens=8192,
        eval_tokens=1_048_576,
        tuned={"330k": (10, 40, 160), "800k": (10, 40), "1.5m": (10, 40)},
        decayed={"330k": (10, 40, 160), "1.5m": (10, 40)},
        sizes={"330k": 3, "800k": 3, "1.5m": 3, "2.7m": 2, "7m": 1},
        ratios=(5, 10, 20, 40, 80),
        sixteen_bit=("330k", "1.5m"),
        checked={"7m": (5,)},
        extra={"330k": 1, "1.5m": 1},
        held_out={"24m": (5, 10), "60m": (5,)},
    ),
}
PARTS = ("learning_rate", "weight_decay", "grid", "rate_check", "arms", "held_out")


def get_config(arg: str | None = None) -> ConfigDict:
    """The base of every run of a part, and the axes."""
    values = parse_arg(arg, part="grid", budget="cpu")
    choose("part", values["part"], PARTS)
    choose("budget", values["budget"], BUDGETS)
    budget = BUDGETS[values["budget"]]
    c = default.get_config()
    c.name = values["part"]
    c.data.source = "corpora/english"
    c.data.sequence_length = budget.sequence_length
    c.train.batch_tokens = budget.batch_tokens
    c.eval.tokens = budget.eval_tokens
    c.schedule.warmup_fraction = 0.25  # of the smallest budget, a fortieth of the largest
    c.log.every = 200
    c.log.layers = False
    c.checkpoint.keep_model = values["part"] == "grid"  # float16's are quantized afterwards
    c.sweep.part = values["part"]
    c.sweep.budget = values["budget"]
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """The runs of the part, the cheapest first."""
    budget = BUDGETS[config.sweep.budget]
    return {
        "learning_rate": _learning_rate,
        "weight_decay": _weight_decay,
        "grid": _grid,
        "rate_check": _rate_check,
        "arms": _arms,
        "held_out": _held_out,
    }[config.sweep.part](budget)


def _learning_rate(budget: Budget) -> list[Point]:
    """Rates around those that the default recipe would take."""
    return [
        {**_trunk(size, ratios), **arm, "optim.peak_lr": factor * default_rate(size, arm)}
        for size, ratios in budget.tuned.items()
        for arm in axis("precision", PAIR)
        for factor in RATES
    ]


def _weight_decay(budget: Budget) -> list[Point]:
    return product(
        [
            {**_trunk(size, ratios), **arm, "optim.peak_lr": peak_lr(budget, size, arm)}
            for size, ratios in budget.decayed.items()
            for arm in axis("precision", PAIR)
        ],
        axis("optim.weight_decay", DECAYS),
    )


def _grid(budget: Budget) -> list[Point]:
    """First every size once, then what sharpens the small end."""
    ratios = budget.ratios
    first = [_run(budget, s, ratios, arm) for s in budget.sizes for arm in axis("precision", PAIR)]
    bf16 = [_run(budget, s, ratios, {"precision": "bf16"}) for s in budget.sixteen_bit]
    again = [
        {**_run(budget, size, ratios, arm), "seed": seed}
        for size, seeds in budget.sizes.items()
        for seed in range(1, seeds)
        for arm in axis("precision", PAIR)
    ]
    return chain([{**run, "seed": 0} for run in chain(first, bf16)], again)


def _rate_check(budget: Budget) -> list[Point]:
    return [
        {**run, "optim.peak_lr": factor * run["optim.peak_lr"]}
        for size, ratios in budget.checked.items()
        for arm in axis("precision", PAIR)
        for run in [_run(budget, size, ratios, arm)]
        for factor in CHECKS
    ]


def _arms(budget: Budget) -> list[Point]:
    return [
        {**_run(budget, size, budget.ratios, arm), "seed": seed}
        for size, seeds in budget.extra.items()
        for seed in range(seeds)
        for arm in EXTRA_ARMS
    ]


def _held_out(budget: Budget) -> list[Point]:
    return [
        _run(budget, size, ratios, arm)
        for size, ratios in budget.held_out.items()
        for arm in axis("precision", PAIR)
    ]


def _run(budget: Budget, size: str, ratios: tuple[float, ...], arm: Point) -> Point:
    """A trunk at the rate and decay that the first two parts found for its arm."""
    rates = {"optim.peak_lr": peak_lr(budget, size, arm), **weight_decay(budget, arm)}
    return {**_trunk(size, ratios), **rates, **arm}


def _trunk(size: str, ratios: tuple[float, ...]) -> Point:
    tokens = tuple(round(ratio * _parameters(size)) for ratio in ratios)
    return {"model.size": size, "train.tokens": tokens}


def _parameters(size: str) -> int:
    """Non-embedding; they do not depend on the vocabulary."""
    model = TransformerConfig(vocab_size=256, **ladder.get_shape(size)._asdict())
    return cost.count_parameters(model).non_embedding


def default_rate(size: str, arm: Point) -> float:
    """The default recipe's peak rate."""
    return tuned_peak_lr(get_precision(arm["precision"]), _parameters(size))


def peak_lr(budget: Budget, size: str, arm: Point) -> float:
    """Of an arm at a size."""
    if budget.found is None:
        return default_rate(size, arm)
    return budget.found.peak_lr(get_precision(arm["precision"]).quantized, _parameters(size))


def weight_decay(budget: Budget, arm: Point) -> Point:
    """Of an arm; nothing where the default recipe's is taken."""
    if budget.found is None:
        return {}
    ternary, floating = budget.found.decays
    decay = ternary if get_precision(arm["precision"]).quantized else floating
    return {"optim.weight_decay": decay}
