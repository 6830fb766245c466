"""Train a plan's runs one after another in this process.

A CPU trains small models no faster side by side; one long-lived process compiles each shape and arm
once and serves every run of it.
"""

import signal
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from bitnet_jax.configs.resolve import loop_options
from bitnet_jax.results import endpoint_row
from bitnet_jax.tracking import provenance
from bitnet_jax.train import Interrupted, train_and_evaluate
from experiments.display import SweepDisplay
from experiments.plan import Plan, PlannedRun, first_line


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a question the loop asks; the second one kills."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each, handler in self._previous.items():
            signal.signal(each, handler)

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self, tick: int) -> bool:
        return self.signal is not None


def train_all(
    plan: Plan, display: SweepDisplay, should_stop: Callable[[int], bool]
) -> dict[str, list[dict[str, Any]]]:
    """Train what is not finished. One run's failure does not stop the next.

    Returns rows of the runs that failed, by run id.

    Raises:
      Interrupted: should_stop said so; the plan goes on from there when launched again.
    """
    failures = {}
    for index, run in enumerate(plan.runs, start=1):
        display.start(index, run)
        if run.finished:
            continue
        try:
            summary = _train(plan, run, display, should_stop)
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:
            (run.directory / "failure.txt").write_text(traceback.format_exc())
            display.finish(run, f"FAILED: {first_line(error)}; see {run.directory / 'failure.txt'}")
            failures[run.spec.run_id] = _failed_rows(run)
        else:
            display.finish(run, _outcome(summary))
    return failures


def _train(
    plan: Plan, run: PlannedRun, display: SweepDisplay, should_stop: Callable[[int], bool]
) -> dict[str, Any]:
    return train_and_evaluate(
        run.spec,
        plan.corpus,
        run.directory,
        loop_options(run.config),
        run.config.to_dict(),
        watch=display.watch,
        should_stop=should_stop,
    )


def _outcome(summary: dict[str, Any]) -> str:
    if summary["status"] != "ok":
        return summary["status"].upper()
    losses = ", ".join(f"{row['bits_per_byte']:.3f}" for row in summary["endpoints"])
    return f"{losses} bits a byte"


def _failed_rows(run: PlannedRun) -> list[dict[str, Any]]:
    nothing = dict.fromkeys(("loss", "loss_stderr", "bits_per_byte", "train_loss", "wall_s"))
    return [
        endpoint_row(
            run.spec, {"end": end, "unique_tokens": 0, "status": "failed", **nothing}, provenance()
        )
        for end in run.spec.ends
    ]
