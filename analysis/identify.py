"""What a set of points cannot tell: reasons to refuse a law, and doubts about a fit.

A law fitted to points that do not determine it gives numbers that look like results. The design is
checked before the search, and the Jacobian at the optimum after it.
"""

from collections.abc import Mapping

import numpy as np

from analysis.laws import COUNTS, Law, Parameter
from analysis.solver import CERTIFIED, Problem, Solution
from analysis.tables import AnalysisError

COLLINEAR = 0.02  # rms scatter of log d about a line in log n below which the two are one input
_CONDITION_REFUSED = 1e6  # of the Jacobian with columns of unit length; good designs have 10 to 100
_UNDETERMINED = 0.5  # standard error of a log parameter: its 95 % interval spans a factor of 7
_AT_BOUND = 1e-6
_LEVEL = 0.04  # of log d: what lies closer is one budget, or one ratio
_SLOPES = {0.0: "budgets", 1.0: "ratios of tokens to parameters", -1.0: "products of n and d"}
_IN_FLAT = 0.1  # of a parameter's direction, the share that the objective does not see


def unidentified(law: Law, inputs: Mapping[str, np.ndarray]) -> str | None:
    """Why inputs {name: [P]} cannot identify `law`, whatever the losses; None if they may."""
    count = next(iter(inputs.values())).size
    if count < len(law.names) + 1:
        return (
            f"{count} points cannot fit the {len(law.names)} parameters of {law.name!r}: "
            f"at least {len(law.names) + 1} are needed"
        )
    for name, values in inputs.items():
        distinct, needed = len(np.unique(values)), law.distinct if name in COUNTS else 2
        if distinct < needed:
            return (
                f"{law.name!r} needs at least {needed} different values of {name}, "
                f"these points have {distinct}"
            )
    if "n" in inputs and "d" in inputs and (slope := fixed_ratio(inputs)) is not None:
        return (
            f"d rises with n as n^{slope:.2f} at every point: a fixed ratio of tokens to "
            f"parameters cannot tell their effects apart; vary d at each n"
        )
    return None


def fixed_ratio(inputs: Mapping[str, np.ndarray]) -> float | None:
    """The slope of log d over log n if all points lie on that line; None if they do not."""
    log_n, log_d = np.log(inputs["n"]), np.log(inputs["d"])
    if np.ptp(log_n) < COLLINEAR:
        return None
    slope, level = np.polyfit(log_n, log_d, 1)
    scatter = np.sqrt(np.mean((log_d - slope * log_n - level) ** 2))
    return float(slope) if scatter < COLLINEAR else None


def few_levels(inputs: Mapping[str, np.ndarray]) -> str | None:
    """What takes two values only at these points: tokens, tokens over parameters or their product.

    Then no third value tests how the loss falls between and beyond the two: the parameters rest on
    the form of the law alone. None if they take more, or the inputs have no n and d.
    """
    if not {"n", "d"} <= set(inputs):
        return None
    log_n, log_d = np.log(inputs["n"]), np.log(inputs["d"])
    for slope, what in _SLOPES.items():
        values, count, first = np.sort(log_d - slope * log_n), 0, -np.inf
        for value in values:
            if value > first + _LEVEL:
                count, first = count + 1, value
        if count == 2:
            return f"these points have two {what} only"
    return None


def undetermined(problem: Problem, theta: np.ndarray) -> list[str]:
    """Parameters that the objective does not determine at an optimum [K]: it is flat along them.

    A Huber loss bends only where residuals are within its delta. Parameters at a bound are left
    out, and `lad`, which bends nowhere.
    """
    if len(problem.objective.deltas) > 1:
        return []
    bound = {parameter.full_name for parameter, _ in at_bounds(problem, theta)}
    free = [i for i, name in enumerate(problem.law.names) if name not in bound]
    r, jacobian = problem.jacobian(theta)
    own = jacobian[np.ix_(np.abs(r) <= problem.objective.deltas[0], free)]
    lengths = np.linalg.norm(jacobian[:, free], axis=0)
    if not free or lengths.min() == 0:
        return [problem.law.names[i] for i in free]
    curvature = own.T @ own / np.outer(lengths, lengths)
    values, directions = np.linalg.eigh(curvature)
    flat = directions[:, values < values[-1] / _CONDITION_REFUSED**2]
    share = np.linalg.norm(flat, axis=1)
    return [problem.law.names[i] for i, x in zip(free, share, strict=True) if x > _IN_FLAT]


def refuse_unidentified(law: Law, inputs: Mapping[str, np.ndarray], loss: np.ndarray) -> None:
    """AnalysisError if points are not positive and finite or cannot identify `law`."""
    for name, values in {**inputs, "loss": loss}.items():
        counted = name in COUNTS or name == "loss"
        fine = np.isfinite(values) & ((values > 0) if counted else (values >= 0))
        if values.shape != loss.shape or not np.all(fine):
            kind = "positive" if counted else "non-negative"
            raise AnalysisError(f"{name}: expected {loss.size} {kind} finite numbers")
    reason = unidentified(law, inputs)
    if reason is not None:
        raise AnalysisError(reason)


def _standard_errors(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Of the coordinates [K], from the residuals' scatter and the Jacobian at the optimum.

    AnalysisError if the Jacobian's rank shows that some parameters only trade off.
    """
    r, jacobian = problem.jacobian(theta)
    lengths = np.linalg.norm(jacobian, axis=0)
    if lengths.min() > 0:
        singular = np.linalg.svd(jacobian / lengths, compute_uv=False)
        if singular[0] < _CONDITION_REFUSED * singular[-1]:
            variance = (r @ r) / (r.size - theta.size)
            return np.sqrt(variance * np.diag(np.linalg.inv(jacobian.T @ jacobian)))
    raise AnalysisError(
        f"these points cannot tell the parameters of {problem.law.name!r} apart: several "
        "combinations fit equally well; vary each input while the others stay"
    )


def at_bounds(problem: Problem, theta: np.ndarray) -> list[tuple[Parameter, bool]]:
    """Parameters at a bound of their range, and whether it is the lower one."""
    low, high = problem.bounds
    at_low, at_high = theta - low < _AT_BOUND, high - theta < _AT_BOUND
    ends = zip(problem.law.parameters, at_low, at_high, strict=True)
    return [(parameter, bool(lowest)) for parameter, lowest, end in ends if lowest or end]


def doubts(problem: Problem, solution: Solution) -> list[str]:
    """Warnings about a fit; AnalysisError if its parameters only trade off against one another."""
    law, theta = problem.law, solution.theta
    found = []
    for parameter, at_least in at_bounds(problem, theta):
        if at_least and parameter.in_loss_units:
            found.append(f"{parameter.full_name} is indistinguishable from 0")
        else:
            found.append(f"{parameter.full_name} is at the bound of its range")
    if not found:
        for name, error in zip(law.names, _standard_errors(problem, theta), strict=True):
            if error > _UNDETERMINED:
                found.append(f"{name} is barely determined: its standard error is {error:.0%}")
        if elsewhere := round(solution.share_elsewhere * solution.starts):
            found.append(
                f"{elsewhere} of {solution.starts} starts fit as well with other parameters"
            )
        elif solution.share_of_starts * solution.starts < 2:
            found.append(f"only one of {solution.starts} starts reached this optimum")
    if solution.gradient > CERTIFIED:
        found.append(
            f"the search ended with a gradient of {solution.gradient:.1g}, not at an optimum"
        )
    if problem.loss.size < 2 * len(law.names):
        found.append(f"{problem.loss.size} points for {len(law.names)} parameters: under 2 each")
    return found
