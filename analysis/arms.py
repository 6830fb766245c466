"""A law for each precision arm of a results table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.fitting import Fit, fit
from analysis.laws import get_law
from analysis.tables import COLUMNS, AnalysisError, finished, points

if TYPE_CHECKING:
    import pandas as pd

ArmFits = dict[str, dict[str, Fit | str]]  # {arm: {law: its fit, or why it was refused}}

_LAWS = ("chinchilla", "power")  # the second where the first is refused


def fit_arms(frame: pd.DataFrame, *, bootstrap: int = 200) -> ArmFits:
    """Fit each arm's finished endpoints: chinchilla or, if refused, a power law in compute.

    Intervals come from resampling whole runs, as endpoints of one run share their trunk.
    """
    fits: ArmFits = {}
    for arm, rows in finished(frame).groupby("precision", sort=False):
        fits[str(arm)] = {}
        for law in _LAWS:
            columns = {name: COLUMNS[name] for name in get_law(law).inputs}
            try:
                inputs, loss = points(rows, columns, "loss")
                fits[str(arm)][law] = fit(
                    law, inputs, loss, bootstrap=bootstrap, clusters=rows["run_id"].to_numpy()
                )
                break
            except AnalysisError as error:
                fits[str(arm)][law] = str(error)
    return fits


def accepted(fits: ArmFits) -> dict[str, Fit]:
    """The fit of each arm that has one."""
    found = ((arm, law) for arm, laws in fits.items() for law in laws.values())
    return {arm: law for arm, law in found if isinstance(law, Fit)}
