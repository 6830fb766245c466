"""What a set of points cannot tell: reasons to refuse a law, and doubts about a fit.

A law fitted to points that do not determine it gives numbers that look like results. The design is
checked before the search, and the Jacobian at the optimum after it.
"""

from collections.abc import Mapping

import numpy as np

from analysis.laws import Law
from analysis.solver import Problem, Solution
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
        distinct = len(np.unique(values))
        if distinct < law.distinct:
            return (
                f"{law.name!r} needs at least {law.distinct} different values of {name}, "
                f"these points have {distinct}"
            )
    if "n" in inputs and "d" in inputs:
        log_n, log_d = np.log(inputs["n"]), np.log(inputs["d"])
        slope, level = np.polyfit(log_n, log_d, 1)
        if np.sqrt(np.mean((log_d - slope * log_n - level) ** 2)) < COLLINEAR:
            return (
                f"d rises with n as n^{slope:.2f} at every point: a fixed ratio of tokens to "
                f"parameters cannot tell their effects apart; vary d at each n"
            )
    return None


def refuse_unidentified(law: Law, inputs: Mapping[str, np.ndarray], loss: np.ndarray) -> None:
    """AnalysisError if points are not positive and finite or cannot identify `law`."""
    for name, values in {**inputs, "loss": loss}.items():
        if values.shape != loss.shape or not np.all(np.isfinite(values) & (values > 0)):
            raise AnalysisError(f"{name}: expected {loss.size} positive finite numbers")
    reason = unidentified(law, inputs)
    if reason is not None:
        raise AnalysisError(reason)


def _standard_errors(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Of the log parameters [K], from the residuals' scatter and the Jacobian at the optimum.

    AnalysisError if the Jacobian's rank shows that some parameters only trade off.
    """
    r, jacobian = (array[0] for array in problem.jacobian(theta[None]))
    lengths = np.linalg.norm(jacobian, axis=1)
    if lengths.min() > 0:
        singular = np.linalg.svd(jacobian / lengths[:, None], compute_uv=False)
        if singular[0] < _CONDITION_REFUSED * singular[-1]:
            variance = (r @ r) / (r.size - theta.size)
            return np.sqrt(variance * np.diag(np.linalg.inv(jacobian @ jacobian.T)))
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
            found.append(f"{parameter.name} is indistinguishable from 0")
        elif lowest or highest:
            found.append(f"{parameter.name} is at the bound of its range")
    if not found:
        for name, error in zip(law.names, _standard_errors(problem, theta), strict=True):
            if error > _UNDETERMINED:
                found.append(f"{name} is barely determined: its standard error is {error:.0%}")
        if solution.share_of_starts * solution.starts < 2:
            found.append(f"only one of {solution.starts} starts reached this optimum")
    if problem.loss.size < 2 * len(law.names):
        found.append(f"{problem.loss.size} points for {len(law.names)} parameters: under 2 each")
    return found
