"""What a suite found, and the JSON document that others read."""

import dataclasses
from typing import Any

from experiments.benchmark.timing import Ratio


@dataclasses.dataclass
class Result:
    """Ratios by name, the rows that they come from, and what a reader must know of both.

    A row is a dict of JSON values under `suite`, the suite's name. The end of a key is its unit:
    `seconds`, `bytes`, `per_s`, `share`.
    """

    ratios: dict[str, Ratio] = dataclasses.field(default_factory=dict)
    measurements: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Result") -> None:
        """Append another suite's."""
        self.ratios.update(other.ratios)
        self.measurements += other.measurements
        self.notes += [note for note in other.notes if note not in self.notes]

    def document(self, environment: dict[str, Any]) -> dict[str, Any]:
        """The contract: environment, ratios {name: {median, min, max, goal}}, measurements."""
        return {
            "environment": environment,
            "ratios": {name: ratio._asdict() for name, ratio in self.ratios.items()},
            "measurements": self.measurements,
            "notes": self.notes,
        }
