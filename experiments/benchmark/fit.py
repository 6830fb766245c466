"""Suite `fit`: the search for a law's parameters against a loop over scipy's L-BFGS-B.

240 points of a Chinchilla law with heavy-tailed noise, the Huber objective of Hoffmann et al. 2022
(arXiv:2203.15556), and their grid of 4,500 starts; then 4,000 resamples, each from the optimum.
scipy makes the same searches one by one, with and without the objective's gradient; only a sample
of them is timed, and multiplied.
"""

import itertools
import statistics
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from analysis.intervals import resamples
from analysis.laws import LAWS
from analysis.solver import HUBER_DELTA, OBJECTIVES, Problem, descend, refit, solve
from experiments.benchmark.result import Result
from experiments.benchmark.step import Say
from experiments.benchmark.timing import Case, interleave, ratio, spread
from experiments.benchmark.workload import Workload

POINTS = 240
RESAMPLES = 4000
SAMPLED = 24  # of the searches, a round of scipy's
BOOTSTRAP_SECONDS = "fit_time/bootstrap_seconds"
GOALS = {
    "grid/scipy_differences": 1 / 60,
    "grid/scipy_gradient": 1 / 15,
    "bootstrap/scipy_differences": 1 / 45,
    "bootstrap/scipy_gradient": 1 / 6,
}
TRUTH = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}


def run(workload: Workload, say: Say) -> Result:
    """Both tasks in all ways, by turns."""
    say(f"compiling, then {workload.repeats} rounds")
    problem = _problem()
    grid = _grid()
    best = solve(problem).theta
    weights = resamples(POINTS, RESAMPLES, seed=1)
    cases: dict[str, Case] = {
        "grid": lambda: descend(problem, _coordinates(problem, grid)),
        "bootstrap": lambda: refit(problem, best, weights),
    }
    random = np.random.default_rng(2)
    some_starts = grid[random.permutation(len(grid))[:SAMPLED]]
    theirs = _from_coordinates(problem, best)
    ones = np.ones(POINTS)
    for way, gradient in (("scipy_differences", False), ("scipy_gradient", True)):
        cases[f"grid/{way}"] = _loop(problem, [(s, ones) for s in some_starts], gradient)
        cases[f"bootstrap/{way}"] = _loop(
            problem, [(theirs, row) for row in weights[:SAMPLED]], gradient
        )
    seconds = interleave(cases, workload.repeats)
    for task, count in (("grid", len(grid)), ("bootstrap", RESAMPLES)):
        for way in ("scipy_differences", "scipy_gradient"):
            name = f"{task}/{way}"
            seconds[name] = [s * count / SAMPLED for s in seconds[name]]
    return _result(seconds, len(grid))


def _result(seconds: dict[str, list[float]], starts: int) -> Result:
    ratios = {
        f"fit_time/ours/{name}": ratio(seconds[name.split("/")[0]], seconds[name], goal)
        for name, goal in GOALS.items()
    }
    ratios[BOOTSTRAP_SECONDS] = spread(seconds["bootstrap"], 10.0)
    searches = {"grid": starts, "bootstrap": RESAMPLES}
    rows = [
        {
            "suite": "fit",
            "case": name,
            "seconds": statistics.median(times),
            "searches_per_s": searches[name.split("/")[0]] / statistics.median(times),
            "rounds_seconds": times,
        }
        for name, times in seconds.items()
    ]
    notes = [
        f"scipy: {SAMPLED} searches a round, of {starts} starts and {RESAMPLES} resamples, scaled; "
        "compilation of ours, some seconds a law, is not in the times",
        f"{BOOTSTRAP_SECONDS}: not a ratio, but seconds",
    ]
    return Result(ratios, rows, notes)


def _problem() -> Problem:
    random = np.random.default_rng(0)
    n = np.exp(random.uniform(np.log(4e7), np.log(1.6e10), POINTS))
    d = n * np.exp(random.uniform(np.log(3), np.log(300), POINTS))
    law = LAWS["chinchilla"]
    noise = 4e-3 * random.standard_t(2, POINTS)
    return Problem.of(
        law, {"n": n, "d": d}, law(TRUTH, {"n": n, "d": d}) * np.exp(noise), OBJECTIVES["huber"]
    )


def _grid() -> np.ndarray:
    """Hoffmann et al.'s starts [4500, 5]: logarithms of A, B and E, then alpha and beta."""
    exponents, logs = np.arange(0, 2.5, 0.5), np.arange(0, 30, 5.0)
    axes = (logs, logs, np.arange(-1, 1.5, 0.5), exponents, exponents)
    return np.array(list(itertools.product(*axes)))


def _coordinates(problem: Problem, starts: np.ndarray) -> np.ndarray:
    """Starts [S, 5] of scipy's parametrization as those of our searches."""
    a, b, e, alpha, beta = starts.T
    log_n, log_d = (np.log(problem.scales[name]) for name in ("n", "d"))
    exponents = (np.log(np.maximum(x, 1e-3)) for x in (alpha, beta))
    return np.stack([e, a - alpha * log_n, b - beta * log_d, *exponents], axis=1)


def _from_coordinates(problem: Problem, theta: np.ndarray) -> np.ndarray:
    p = {name: float(value) for name, value in problem.natural(theta).items()}
    return np.array([np.log(p["A"]), np.log(p["B"]), np.log(p["E"]), p["alpha"], p["beta"]])


def _loop(
    problem: Problem, searches: list[tuple[np.ndarray, np.ndarray]], gradient: bool
) -> Callable[[], None]:
    """scipy's L-BFGS-B, search after search of (start, weights)."""
    log_n, log_d = (np.log(problem.inputs[name]) for name in ("n", "d"))
    measured = np.log(problem.loss)

    def objective(at: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray] | float:
        a, b, e, alpha, beta = at
        terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        r = top + np.log(total) - measured
        size, pull = np.abs(r), weights * np.clip(r, -HUBER_DELTA, HUBER_DELTA)
        losses = np.where(size <= HUBER_DELTA, r * r / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))
        value = float(weights @ losses)
        if not gradient:
            return value
        n_share, d_share, e_share = shares / total * pull
        slopes = [n_share.sum(), d_share.sum(), e_share.sum(), -n_share @ log_n, -d_share @ log_d]
        return value, np.array(slopes)

    def loop() -> None:
        for start, weights in searches:
            minimize(objective, start, args=(weights,), jac=gradient, method="L-BFGS-B")

    return loop
