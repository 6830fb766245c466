"""Do the intervals cover? Sweeps of a known law are simulated, fitted and bootstrapped.

    python -m analysis.coverage --replicates=1000 --bootstrap=400

Two arms share a Chinchilla law but for rho, the worth of a treatment's parameter. A run has luck of
its own, which all of its endpoints share; each endpoint has noise besides. The intervals are those
of analysis.fit: percentiles of refits of resampled runs. Printed is how often they held the truth.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.command import Parser, status
from analysis.fitting import INTERVAL, LEAST_SAMPLES
from analysis.intervals import resamples
from analysis.laws import LAWS
from analysis.solver import OBJECTIVES, Problem, descend
from analysis.tables import AnalysisError

ARMS = ("baseline", "treatment")
TRUTH = {"E": 1.2, "A": 30.0, "B": 200.0, "alpha": 0.3, "beta": 0.33, "rho[treatment]": 0.6}
MOST_LOSSES = 2 * 10**8  # 1.6 GB for each array of them
_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Design:
    """A simulated sweep. Each run has an endpoint at every ratio of tokens to parameters.

    run_noise, point_noise: standard deviations of the log loss, of a run and of an endpoint.
    """

    sizes: tuple[float, ...]
    ratios: tuple[float, ...]
    seeds: int
    run_noise: float
    point_noise: float

    def points(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Inputs {n, d, group: [P]} and the run [P] of every endpoint."""
        shape = len(ARMS), len(self.sizes), self.seeds, len(self.ratios)
        arm, size, seed, ratio = (index.ravel() for index in np.indices(shape))
        n = np.array(self.sizes)[size]
        inputs = {"n": n, "d": n * np.array(self.ratios)[ratio], "group": arm.astype(float)}
        return inputs, (arm * len(self.sizes) + size) * self.seeds + seed

    def losses(self, exact: np.ndarray, runs: np.ndarray, count: int, seed: int) -> np.ndarray:
        """`count` draws of the losses [R, P]."""
        rng = np.random.default_rng(seed)
        luck = rng.normal(size=(count, runs.max() + 1))[:, runs] * self.run_noise
        return exact * np.exp(luck + self.point_noise * rng.normal(size=(count, exact.size)))


@dataclass(frozen=True)
class Coverage:
    """How often the 95 % interval of a quantity held its true value."""

    share: float
    low: float  # Wilson's 95 % interval of the share
    high: float
    truth: float
    standard_deviation: float  # of the estimates
    bias: float


def study(
    design: Design, *, objective: str, replicates: int, bootstrap: int, seed: int = 0
) -> dict[str, Coverage]:
    """Coverage of rho, E, the exponent a = beta / (alpha + beta) and a prediction.

    The prediction is of the treatment at ten times the largest size and its median ratio.
    """
    law = LAWS["rho"].bind(ARMS)
    inputs, runs = design.points()
    exact = law(TRUTH, inputs)
    problem = Problem.of(law, inputs, exact, OBJECTIVES[objective])
    center = descend(problem, problem.starts()).theta[:1]
    losses = design.losses(exact, runs, replicates, seed)
    fitted = descend(problem, np.repeat(center, replicates, axis=0), loss=losses).theta
    draws = resamples(exact.size, bootstrap, runs, seed + 1)
    refitted = descend(
        problem,
        np.repeat(fitted, bootstrap, axis=0),
        np.tile(draws, (replicates, 1)),
        loss=np.repeat(losses, bootstrap, axis=0),
    ).theta.reshape(replicates, bootstrap, -1)
    target = {
        "n": np.array([10 * max(design.sizes)]),
        "d": np.array([10 * max(design.sizes) * float(np.median(design.ratios))]),
        "group": np.array([1.0]),
    }
    true = _quantities(problem, center[0], target)
    estimates, samples = (_quantities(problem, theta, target) for theta in (fitted, refitted))
    return {name: _coverage(float(true[name]), estimates[name], samples[name]) for name in true}


def _quantities(
    problem: Problem, theta: np.ndarray, target: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What is estimated, for coordinates [..., K]."""
    params = problem.natural(theta)
    columns = {name: value[..., None] for name, value in params.items()}
    return {
        "rho": params["rho[treatment]"],
        "E": params["E"],
        "a": params["beta"] / (params["alpha"] + params["beta"]),
        "prediction": problem.law(columns, target)[..., 0],
    }


def _coverage(truth: float, estimates: np.ndarray, samples: np.ndarray) -> Coverage:
    """samples: [replicates, bootstrap]."""
    low, high = np.percentile(samples, INTERVAL, axis=1)
    count, share = len(estimates), float(np.mean((low <= truth) & (truth <= high)))
    middle = (share + _Z_95**2 / (2 * count)) / (1 + _Z_95**2 / count)
    half = math.sqrt(share * (1 - share) / count + _Z_95**2 / (4 * count**2))
    half *= _Z_95 / (1 + _Z_95**2 / count)
    deviation, bias = float(estimates.std(ddof=1)), float(estimates.mean() - truth)
    return Coverage(share, middle - half, middle + half, truth, deviation, bias)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.coverage", description="Do the intervals cover?")
    parser.add_argument("--sizes", type=_floats, default=tuple(np.geomspace(1e5, 3e6, 5)))
    parser.add_argument("--ratios", type=_floats, default=(10.0, 20.0, 40.0, 80.0))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each size and arm")
    parser.add_argument("--run_noise", type=float, default=3e-3, help="of a run's log loss")
    parser.add_argument("--point_noise", type=float, default=1e-3, help="of an endpoint's log loss")
    parser.add_argument("--objective", default="huber", help=f"one of {', '.join(OBJECTIVES)}")
    parser.add_argument("--replicates", type=int, default=400, help="simulated sweeps")
    parser.add_argument("--bootstrap", type=int, default=200, help="resamples of each")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _refuse_options(args: argparse.Namespace) -> None:
    for name, least in (("seeds", 1), ("replicates", LEAST_SAMPLES), ("bootstrap", LEAST_SAMPLES)):
        if getattr(args, name) < least:
            raise AnalysisError(f"--{name}={getattr(args, name)}: at least {least}")
    for name in ("sizes", "ratios"):
        values = getattr(args, name)
        if len(set(values)) < 3 or len(set(values)) < len(values):
            raise AnalysisError(f"--{name}: three or more positive numbers, all different")
        if not all(0 < value < math.inf for value in values):
            raise AnalysisError(f"--{name}: three or more positive numbers, all different")
    noises = args.run_noise, args.point_noise
    if not all(0 <= noise < 1 for noise in noises) or sum(noises) == 0:
        raise AnalysisError("--run_noise and --point_noise: not negative, below 1 and not both 0")
    count = len(ARMS) * len(args.sizes) * len(args.ratios) * args.seeds
    if count * args.replicates * args.bootstrap > MOST_LOSSES:
        raise AnalysisError(
            f"{count} points of {args.replicates} sweeps, resampled {args.bootstrap} times, are "
            f"more than {MOST_LOSSES:.0e} losses: take fewer --replicates, --bootstrap or --seeds"
        )


def _run(args: argparse.Namespace) -> None:
    if args.objective not in OBJECTIVES:
        raise AnalysisError(f"--objective={args.objective}: choose one of {', '.join(OBJECTIVES)}")
    _refuse_options(args)
    design = Design(args.sizes, args.ratios, args.seeds, args.run_noise, args.point_noise)
    found = study(
        design, objective=args.objective, replicates=args.replicates, bootstrap=args.bootstrap
    )
    document: dict[str, Any] = {
        "design": design.__dict__,
        "objective": args.objective,
        "replicates": args.replicates,
        "bootstrap": args.bootstrap,
        "coverage": {name: row.__dict__ for name, row in found.items()},
    }
    print(json.dumps(document, indent=2) if args.json else _readable(document))


def _readable(document: Mapping[str, Any]) -> str:
    runs = len(ARMS) * len(document["design"]["sizes"]) * document["design"]["seeds"]
    lines = [f"{document['replicates']} sweeps of {runs} runs, {document['objective']}"]
    for name, row in document["coverage"].items():
        held = f"{row['share']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"
        lines.append(
            f"  {name:<11}{held} of the 95 % intervals held {row['truth']:.4g}; estimates scatter "
            f"by {row['standard_deviation']:.2g}, bias {row['bias']:+.1g}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
