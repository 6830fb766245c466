"""Two arms as points: which of them were drawn together, and what their design can tell.

A cluster is what was drawn: a run with all its endpoints, or a pair, the runs of both arms that
share a size and a seed and so part of their luck.

Arrays: P points, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.identify import few_levels, fixed_ratio, unidentified
from analysis.laws import LAWS
from analysis.tables import AnalysisError

SPARE_CLUSTERS = 3  # beyond an arm's parameters, below which a bootstrap misleads

_CHINCHILLA = LAWS["chinchilla"]
_WEBB = np.sqrt([0.5, 1.0, 1.5])


@dataclass(frozen=True)
class TwoArms:
    """Endpoints of two arms. Losses are in nats a token.

    arms: labels, the baseline first. group: which of them a point belongs to [P].
    runs: labels of runs [P]; pairs: of what was drawn together [P], or None where runs were drawn
      one by one.
    """

    arms: tuple[str, str]
    n: np.ndarray  # [P] parameters
    d: np.ndarray  # [P] tokens
    c: np.ndarray  # [P] training FLOPs
    costs: Mapping[str, np.ndarray]  # {column: [P]}
    loss: np.ndarray  # [P]
    group: np.ndarray  # [P] 0 or 1
    runs: np.ndarray  # [P]
    pairs: np.ndarray | None

    def __post_init__(self) -> None:
        """AnalysisError if an arm has too few points for a law, or pairs cut a run in two."""
        for index, label in enumerate(self.arms):
            own = self.inputs_of(index)
            enough = own["n"].size > len(_CHINCHILLA.names) and all(
                len(np.unique(values)) >= _CHINCHILLA.distinct for values in own.values()
            )
            if not enough:
                raise AnalysisError(f"{label}: {unidentified(_CHINCHILLA, own)}")
        if self.pairs is not None:
            own_pairs: dict[tuple[int, object], object] = {}
            for group, run, pair in zip(self.group, self.runs, self.pairs, strict=True):
                if own_pairs.setdefault((group, run), pair) != pair:
                    raise AnalysisError(f"run {run!r} lies in two pairs: a run is drawn as a whole")

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Inputs of laws of both arms {name: [P]}."""
        return {"n": self.n, "d": self.d, "group": self.group.astype(float)}

    def inputs_of(self, index: int) -> dict[str, np.ndarray]:
        """Inputs n and d of one arm's own points."""
        own = self.group == index
        return {"n": self.n[own], "d": self.d[own]}

    def range_of(self, index: int, name: str) -> tuple[float, float]:
        """Least and greatest n or d of one arm."""
        values = self.inputs_of(index)[name]
        return float(values.min()), float(values.max())

    def common_range(self, name: str) -> tuple[float, float]:
        """The n or d that both arms span; AnalysisError if there is none."""
        (low, high), (other_low, other_high) = (self.range_of(i, name) for i in (0, 1))
        if max(low, other_low) > min(high, other_high):
            raise AnalysisError(f"the arms have no {name} in common: nothing can be compared")
        return max(low, other_low), min(high, other_high)

    @property
    def flops_per_parameter_token(self) -> tuple[float, float]:
        """k of C = k N D for each arm: the geometric mean over its points."""
        k = np.log(self.c / (self.n * self.d))
        return tuple(float(np.exp(k[self.group == i].mean())) for i in (0, 1))  # type: ignore[return-value]

    @property
    def clusters(self) -> np.ndarray:
        """What was drawn, as indices [P]: pairs, or runs (arms may use the same labels)."""
        if self.pairs is not None:
            return np.unique(self.pairs.astype(str), return_inverse=True)[1]
        names = np.unique(self.runs.astype(str), return_inverse=True)[1]
        return np.unique(2 * names + self.group, return_inverse=True)[1]

    def runs_in(self, index: int) -> int:
        """The number of runs of one arm."""
        return len(np.unique(self.runs[self.group == index].astype(str)))

    @property
    def unpaired(self) -> int:
        """Pairs of which one arm is missing."""
        return int((np.bincount(self.clusters, minlength=0) > 0).sum() - len(self._both))

    @property
    def _both(self) -> np.ndarray:
        """Clusters with points of both arms."""
        return np.intersect1d(*(self.clusters[self.group == i] for i in (0, 1)))

    def fixed_ratios(self) -> list[str]:
        """Why the multiplier is not identified by each arm's own design."""
        found = []
        for index, label in enumerate(self.arms):
            slope = fixed_ratio(self.inputs_of(index))
            if slope is not None:
                found.append(
                    f"{label} has one ratio of tokens to parameters (d rises as n^{slope:.2f}): "
                    "its own E, B and beta, and with them what a parameter is worth, are not "
                    "identified; vary d at each n"
                )
        return found

    def few_budgets(self) -> list[str]:
        """Arms with two budgets, or ratios, only: nothing tests the form of their law."""
        told = ((label, few_levels(self.inputs_of(i))) for i, label in enumerate(self.arms))
        return [
            f"{label}: {few}; three budgets of a size or more are needed"
            for label, few in told
            if few
        ]

    def few_clusters(self) -> list[str]:
        """Arms with too few clusters to resample."""
        found, needed = [], len(_CHINCHILLA.names) + SPARE_CLUSTERS
        for index, label in enumerate(self.arms):
            count = len(np.unique(self.clusters[self.group == index]))
            if count < needed:
                what = "runs" if self.pairs is None else "pairs"
                found.append(f"{label} has {count} independent {what}: {needed} or more are needed")
        return found

    def drawn(self, count: int, seed: int) -> np.ndarray:
        """How often each point is drawn [R, P] when clusters are, with replacement.

        Within strata: as many clusters of each arm, or of both arms, as were trained. Draws that
        cannot identify a law of each arm are left out.
        """
        clusters, rng = self.clusters, np.random.default_rng(seed)
        size = clusters.max() + 1
        has = [np.bincount(clusters[self.group == i], minlength=size) > 0 for i in (0, 1)]
        strata = has[0] + 2 * has[1]
        times = np.zeros((count, size))
        for stratum in np.unique(strata):
            members = np.flatnonzero(strata == stratum)
            picked = rng.choice(members, size=(count, len(members)))
            np.add.at(times, (np.arange(count)[:, None], picked), 1)
        weights = times[:, clusters]
        identified = [self._identifies(row > 0) for row in weights]
        return weights[np.array(identified, bool)]

    def _identifies(self, chosen: np.ndarray) -> bool:
        """Whether the chosen points [P] could tell a law of each arm."""
        for index in (0, 1):
            own = chosen & (self.group == index)
            if unidentified(_CHINCHILLA, {"n": self.n[own], "d": self.d[own]}) is not None:
                return False
        return True

    def wild_weights(self, count: int, seed: int) -> np.ndarray:
        """Random factors of the residuals [R, P], one a cluster: of mean 0 and variance 1.

        Webb's six points (Webb 2023, Can. J. Econ. 56, 839-858), as with few clusters the two of
        Rademacher have few distinct draws (Cameron, Gelbach and Miller 2008).
        """
        rng, clusters = np.random.default_rng(seed), self.clusters
        drawn = rng.choice(np.concatenate([-_WEBB, _WEBB]), size=(count, clusters.max() + 1))
        return drawn[:, clusters]
