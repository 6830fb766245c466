"""What to run next of a study made of parts, in the minutes at hand.

    python -m experiments.next_part --minutes=45 --workdir=results/study \\
        --config=sweeps/study.py --config.data.source=corpora/english

Shows the parts of the sweep file in their order, with the runs of each that are done and the time
that the others should take, and prints the command that goes on with the first part that is not
finished. A part that does not fit is stopped after those minutes; the same command then goes on.

--config=FILE.py[:ARG] and --config.KEY=VALUE are those of experiments.run; ARG without `part`.
Exit status: 0 there is something to run; 1 all parts are done; 2 bad usage or config.
"""

import argparse
import dataclasses
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bitnet_jax import data
from bitnet_jax.errors import ConfigError, one_line
from experiments import command_line, display
from experiments.estimate import flops_per_second
from experiments.plan import Plan, load_parts, load_points, make_plan
from experiments.run import quiet_libraries

EXAMPLE = "--config=sweeps/study.py"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a study. arguments: those of experiments.run that train it."""

    name: str
    plan: Plan
    arguments: tuple[str, ...]

    @property
    def done(self) -> int:
        """Finished runs."""
        return sum(run.finished for run in self.plan.runs)

    @property
    def left(self) -> list[int]:
        """Training FLOPs of each run that is not finished, in the order of the plan."""
        return [run.spec.total_flops for run in self.plan.runs if not run.finished]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    options, arguments = _parser().parse_known_args(argv)
    quiet_libraries()
    try:
        if not 0 < options.minutes < math.inf:
            raise ConfigError(f"minutes={options.minutes}: it must be positive and finite")
        parts = read_parts([*arguments, f"--workdir={options.workdir}"])
        return _show(display.console(), parts, options.minutes)
    except (ConfigError, data.DataError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.next_part",
        usage="%(prog)s --minutes=N --config=FILE.py[:ARG] [--workdir=DIR] [--config.KEY=VALUE ..]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--workdir", default="results")
    return parser


def read_parts(arguments: Sequence[str]) -> list[Part]:
    """The parts of the sweep file that arguments of experiments.run name, planned, in its order.

    Raises:
      ConfigError: no sweep file is named, it has no parts, or the arguments name one part already
        or are wrong in another way.
      DataError: there is no such corpus.
    """
    named = [a for a in arguments if a.startswith("--config=")]
    if len(named) != 1:
        raise ConfigError(f"--config: name one sweep file that has parts, such as {EXAMPLE}")
    path, _, arg = named[0].removeprefix("--config=").partition(":")
    if any(word.startswith("part=") for word in arg.split(",")):
        raise ConfigError(f"{named[0]}: leave part out; all parts are looked at")
    rest = [a for a in arguments if a not in named]
    return [_part(name, path, arg, rest) for name in load_parts(path)]


def _part(name: str, path: str, arg: str, rest: Sequence[str]) -> Part:
    words = ",".join([f"part={name}", *([arg] if arg else [])])
    arguments = ("--sweep", f"--config={path}:{words}", *rest)
    flags = command_line.parse(["run", *arguments])
    corpus = data.load(data.resolve(flags.config.data.source))
    points = load_points(path, flags.config)
    overridden = command_line.overridden_keys(flags)
    plan = make_plan(flags.config, points, corpus, Path(flags.workdir), overridden)
    return Part(name, plan, arguments)


def that_fit(flops: Iterable[int], budget: float) -> int:
    """How many runs, taken in their order, fit into so many FLOPs."""
    fitting = 0
    for cost in flops:
        budget -= cost
        if budget < 0:
            break
        fitting += 1
    return fitting


def _show(screen: Console, parts: Sequence[Part], minutes: float) -> int:
    rate, source = flops_per_second(parts[0].plan)
    table = Table(title=f"at {display.count(rate)} FLOP/s ({source})", title_justify="left")
    table.add_column("part")
    for column in ("runs", "done", "FLOPs left", "time left"):
        table.add_column(column, justify="right")
    for part in parts:
        left = sum(part.left)
        runs, done = str(len(part.plan.runs)), str(part.done)
        time_left = display.duration(left / rate) if left else "-"
        table.add_row(part.name, runs, done, display.count(left), time_left)
    screen.print(table)
    unfinished = [part for part in parts if part.left]
    if not unfinished:
        screen.print("all parts are done")
        return 1
    part = unfinished[0]
    fitting = that_fit(part.left, minutes * 60 * rate)
    whole = fitting == len(part.left)
    share = "all of it" if whole else f"{fitting} of its {len(part.left)} runs that are left"
    screen.print(f"next: {part.name}; of it {minutes:g} minutes should hold {share}:")
    limit = [] if whole else ["timeout", "--signal=TERM", f"{minutes:g}m"]
    command = shlex.join([*limit, "python", "-m", "experiments.run", *part.arguments])
    screen.print(f"  {command}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
