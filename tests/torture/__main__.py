"""Kill a sweep's launchers so many times, and hold what comes of it against an undisturbed one.

    python -m tests.torture --kills=200 --seed=0 [--workdir=DIR] [--out=FILE.json]

Sweeps of 16 runs are trained by launchers that are stopped at moments drawn at random: soon after
their start, at any time, or just when a certain file appears. Most are killed (SIGKILL, to the
whole process group), others interrupted (SIGTERM, SIGINT, or SIGTERM twice). A sweep that is
finished is compared with one that was left alone, and another begun, until so many were killed or
Ctrl-C or SIGTERM says that it is enough.

Exit status: 0 all is equal; 1 something is not, a line each on stderr; 2 bad usage.
"""

import os

os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse  # noqa: E402
import collections  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from bitnet_jax.data import prepare  # noqa: E402
from bitnet_jax.files import write_json  # noqa: E402
from experiments.benchmark.environment import environment  # noqa: E402
from tests.torture import launches, watch  # noqa: E402
from tests.torture.compare import differences  # noqa: E402

CONFIG = Path(__file__).parent / "config.py"
PATIENCE = 600.0  # seconds that an undisturbed launch may take
SHORTEST, LONGEST = 1.5, 60.0  # between these lie the seconds that most launches live at most
REAL = 10  # every so-and-so-manieth launch is a new Python

# Signals, one after the other, and their share of the stops. With each, the statuses that a
# launcher may end with; 0 where it was done first. A SIGTERM that comes before the launcher has
# asked for it ends the process as it would any.
STOPS: dict[str, tuple[float, tuple[int, ...], set[int]]] = {
    "SIGKILL": (0.7, (signal.SIGKILL,), {-signal.SIGKILL, 0}),
    "SIGTERM": (0.1, (signal.SIGTERM,), {143, -signal.SIGTERM, 0}),
    "SIGINT": (0.1, (signal.SIGINT,), {130, 0}),
    "SIGTERM twice": (0.1, (signal.SIGTERM, signal.SIGTERM), {143, -signal.SIGTERM, 0}),
}


@dataclasses.dataclass
class Found:
    """What has happened so far. repeated: of every run of every sweep."""

    stops: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    moments: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    statuses: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    warnings: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    repeated: list[float] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    damaged: int = 0
    sweeps: int = 0
    launched: int = 0
    new_pythons: int = 0

    def check(self, launch: launches.Launch, allowed: set[int]) -> None:
        """Of a launch that has ended: how, and what it said."""
        text = launch.text
        self.statuses[str(launch.status)] += 1
        if launch.status not in allowed or "Traceback" in text:
            self.wrong.append(f"{launch.log.name}: status {launch.status}: {text[-2000:]}")
        said = [line for line in text.splitlines() if line.startswith("warning: ")]
        self.warnings.update(_kind(line) for line in said)
        self.damaged += any("damaged" in line for line in said)


def _kind(warning: str) -> str:
    """What it says, without of whom."""
    for kind in ("damaged checkpoint removed", "no checkpoint to go on from", "damaged"):
        if kind in warning:
            return kind
    return warning[:200]


class Torture:
    """One undisturbed sweep, and as many others as the stops need."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._draw = random.Random(seed)
        self._corpus = folder / "corpus"
        self._life = 6.0  # seconds; adapted, so that a sweep takes some launches but gets on
        self.found = Found()
        self.undisturbed_seconds = 0.0
        self._enough = False

    def enough(self, *_: Any) -> None:
        """No further stops: the sweep at hand is finished and compared."""
        self._enough = True

    def prepare(self) -> None:
        """The corpus, and the sweep that is left alone, which compiles for the others, too."""
        _write_corpus(self._folder, self._corpus)
        began = time.monotonic()
        self._finish("undisturbed")
        self.undisturbed_seconds = time.monotonic() - began
        if self.found.wrong:
            raise SystemExit(self.found.wrong[0])
        self._say(f"undisturbed: {self.undisturbed_seconds:.0f} s")
        self.found = Found()

    def stop_so_often(self, kills: int) -> None:
        """Begin sweeps until so many launches were killed; finish and compare each."""
        stops = self.found.stops
        while stops["SIGKILL"] < kills and not self._enough:
            name = f"tortured-{self.found.sweeps}"
            shutil.copytree(
                self._folder / "undisturbed" / "programs", self._folder / name / "programs"
            )
            steps = watch.Steps(self._sweep("undisturbed"))
            while stops["SIGKILL"] < kills and not self._done(name) and not self._enough:
                self._stop_one(name, steps)
            self._finish(name)
            steps.look(watch.log_sizes(self._sweep(name)))
            self.found.sweeps += 1
            self.found.repeated += steps.repeated.values()
            self._compare(name)
            self._say(
                f"{stops['SIGKILL']}/{kills} kills, {stops.total()} stops, "
                f"{self.found.sweeps} sweeps, "
                f"{len(self.found.wrong)} differences"
            )

    def _sweep(self, name: str) -> Path:
        return self._folder / name / "tortured"

    def _done(self, name: str) -> bool:
        return (self._sweep(name) / "report.html").exists()

    def _launch(self, name: str, real: bool) -> launches.Launch:
        self.found.launched += 1
        self.found.new_pythons += real
        log = self._folder / f"{name}-{self.found.launched}.log"
        arguments = [
            "--sweep",
            f"--config={CONFIG}",
            f"--config.data.source={self._corpus}",
            f"--workdir={self._folder / name}",
        ]
        return (launches.start if real else launches.fork)(arguments, log)

    def _stop_one(self, name: str, steps: watch.Steps) -> None:
        """A launch that is stopped, unless it is done first."""
        real = self.found.launched % REAL == REAL - 1
        stop = self._draw.choices(list(STOPS), [share for share, _, _ in STOPS.values()])[0]
        way = self._draw.choice(("soon", "any time", "moment", "moment"))
        if real and stop == "SIGINT":
            way = "moment"  # Python itself, while it starts, knows no better than a traceback
        sweep, before = self._sweep(name), sum(steps.made.values())
        kind = self._draw.choice([*watch.MOMENTS, watch.LOG_GROWS])
        count = self._draw.choice((1, 1, 2, 3, 5, 8, 13))
        moment = watch.Moment(kind, count, watch.names(sweep)) if way == "moment" else None
        life = self._draw.uniform(0, 0.7 if way == "soon" else self._life)
        delay = self._draw.choice((0.0, self._draw.uniform(0, 0.03)))
        launch = self._launch(name, real)
        deadline = time.monotonic() + (2 * self._life if moment else life)
        come = False
        while not (come or launch.ended() or time.monotonic() > deadline):
            grown = steps.look(watch.log_sizes(sweep))
            come = moment is not None and moment.look(watch.names(sweep), grown)
            time.sleep(0.001 if moment else 0.005)
        if come:
            time.sleep(delay)
        _, signals, allowed = STOPS[stop]
        alive = not launch.ended()
        if alive:
            self._signal(launch, signals)
        if launch.status != 0:  # it may have been done in that very moment
            self.found.stops[stop] += 1
            self.found.moments[kind if come else "soon" if way == "soon" else "any time"] += 1
        self.found.check(launch, allowed if alive else {0})
        steps.look(watch.log_sizes(sweep))
        got_on = sum(steps.made.values()) > before
        if not moment:
            self._life = min(max(self._life * (0.97 if got_on else 1.1), SHORTEST), LONGEST)

    def _signal(self, launch: launches.Launch, signals: Sequence[int]) -> None:
        """Send them and wait for the end; a launcher that will not end is a difference."""
        for number in signals:
            launch.signal(number)
            time.sleep(self._draw.choice((0.0, 0.001, 0.1)) if len(signals) > 1 else 0.0)
        self._wait(launch)

    def _wait(self, launch: launches.Launch) -> None:
        deadline = time.monotonic() + PATIENCE
        while not launch.ended():
            if time.monotonic() > deadline:
                self.found.wrong.append(f"{launch.log.name}: it does not end")
                launch.signal(signal.SIGKILL)
                deadline += PATIENCE
            time.sleep(0.01)

    def _finish(self, name: str) -> None:
        """A launch that nobody stops."""
        launch = self._launch(name, real=False)
        self._wait(launch)
        self.found.check(launch, {0})

    def _compare(self, name: str) -> None:
        """In a process of its own, since models are loaded through JAX's backend."""
        log = self._folder / f"{name}-compared.log"

        def compare() -> int:
            found = differences(self._sweep("undisturbed"), self._sweep(name))
            print("\n".join(found))
            return 3 if found else 0

        launch = launches.Launch(launches.in_fork(compare, log), log)
        self._wait(launch)
        if launch.status:
            self.found.wrong += [f"{name}: {line}" for line in launch.text.splitlines() if line]

    def document(self) -> dict[str, Any]:
        """What was found, in JSON values."""
        found = self.found
        return {
            "stops": dict(found.stops),
            "moments": dict(found.moments),
            "statuses": dict(found.statuses),
            "warnings": dict(found.warnings),
            "launches": found.launched,
            "launches_of_a_new_python": found.new_pythons,
            "launches_that_found_damage": found.damaged,
            "seconds_that_a_launch_lived_at_most": round(self._life, 1),
            "sweeps": found.sweeps,
            "runs": len(found.repeated),
            "repeated_steps_share": {
                "median": round(statistics.median(found.repeated), 3),
                "max": round(max(found.repeated), 3),
                "all": round(statistics.fmean(found.repeated), 3),
            },
            "undisturbed_seconds": round(self.undisturbed_seconds, 1),
            "differences": found.wrong,
        }


def _write_corpus(folder: Path, out: Path) -> None:
    """20k bytes of generated English-like text, prepared."""
    draw = random.Random(0)
    words = ["the", "a", "old", "grey", "cat", "dog", "tree", "house", "sees", "likes", "near"]
    for split, lines in (("train", 500), ("valid", 60)):
        text = "".join(" ".join(draw.choices(words, k=10)) + ".\n" for _ in range(lines))
        (folder / f"{split}.txt").write_text(text)
    prepare([str(folder / "train.txt")], "bytes", out, valid_sources=[str(folder / "valid.txt")])


def main(arguments: Sequence[str]) -> int:
    """Command line."""
    options = _parser().parse_args(arguments)
    # No TemporaryDirectory, which a fork of this process would clear away when it exits.
    folder = (options.workdir or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        began = time.monotonic()
        torture = Torture(folder, options.seed, lambda text: print(text, flush=True))
        torture.prepare()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, torture.enough)
        torture.stop_so_often(options.kills)
        found = {**torture.document(), "seconds": round(time.monotonic() - began, 1)}
    finally:
        if not options.workdir:
            shutil.rmtree(folder)
    for line in found["differences"]:
        print(line, file=sys.stderr)
    # Last of all: it starts JAX's backend, which no fork may inherit.
    place = environment([])
    place["command"] = f"python -m tests.torture --kills={options.kills} --seed={options.seed}"
    found["kills_asked_for"] = options.kills
    document = {"environment": place, **found}
    if options.out:
        write_json(options.out, document)
    print(json.dumps(found, indent=1))
    return 1 if found["differences"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=200, help="by SIGKILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, help="a new folder, kept; default: one that is not")
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
