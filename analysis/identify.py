"""What a set of points cannot tell: reasons to refuse a law, and doubts about a fit.

A law fitted to points that do not determine it gives numbers that look like results. The design is
checked before the search, and the Jacobian at the optimum after it.
"""

from collections.abc import Mapping

import numpy as np

from analysis.laws import COUNTS, Law
from analysis.solver import CERTIFIED, Problem, Solution
from analysis.tables import AnalysisError

COLLINEAR = 0.02  # rms scatter of log d about a line in log n below which the two are one input
_CONDITION_REFUSED = 1e6  # of the Jacobian with columns of unit length; good designs have 10 to 100
_UNDETERMINED = 0.5  # standard error of a log parameter: its 95 % interval spans a factor of 7
_AT_BOUND = 1e-6


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


def doubts(problem: Problem, solution: Solution) -> list[str]:
    """Warnings about a fit; AnalysisError if its parameters only trade off against one another."""
    law, theta = problem.law, solution.theta
    low, high = problem.bounds
    at_low, at_high = theta - low < _AT_BOUND, high - theta < _AT_BOUND
    found = []
    for parameter, lowest, highest in zip(law.parameters, at_low, at_high, strict=True):
        if lowest and parameter.in_loss_units:
            found.append(f"{parameter.full_name} is indistinguishable from 0")
        elif lowest or highest:
            found.append(f"{parameter.full_name} is at the bound of its range")
    if not found:
        for name, error in zip(law.names, _standard_errors(problem, theta), strict=True):
            if error > _UNDETERMINED:
                found.append(f"{name} is barely determined: its standard error is {error:.0%}")
        if solution.share_of_starts * solution.starts < 2:
            found.append(f"only one of {solution.starts} starts reached this optimum")
    if solution.gradient > CERTIFIED:
        found.append(
            f"the search ended with a gradient of {solution.gradient:.1g}, not at an optimum"
        )
    if problem.loss.size < 2 * len(law.names):
        found.append(f"{problem.loss.size} points for {len(law.names)} parameters: under 2 each")
    return found
