"""What a person sees: the plan, the runs as they train, and the results, through rich.

On a terminal, a live bar for the run and one for the sweep; in a pipe, plain lines.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from bitnet_jax import cost
from bitnet_jax.train import Report
from experiments import device_memory
from experiments.plan import Plan, PlannedRun


def console() -> Console:
    """Plain and unwrapped where the output is not a terminal. Brackets and colons of names and
    paths are text, not markup."""
    plain = Console(markup=False, emoji=False)
    if plain.is_terminal:
        return plain
    return Console(width=160, highlight=False, markup=False, emoji=False)


def count(number: float) -> str:
    """Three digits and a unit: 27.0k, 1.31M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """2:05, or 1:02:05."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_plan(
    screen: Console,
    plan: Plan,
    flops_per_s: float,
    rate_source: str,
    where: str | None = None,
) -> None:
    """The dry run's table: what each run is and costs. where: it will train, if on other machines;
    times are this one's all the same."""
    table = Table(title=f"{plan.name}: {len(plan.runs)} runs", title_justify="left")
    for column in ("size", "arm", "variant"):
        table.add_column(column)
    for column in ("seed", "peak LR", "params", "non-emb.", "tokens", "FLOPs", "memory", "time"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for run in plan.runs:
        spec = run.spec
        memory = device_memory.needed(run, plan.corpus.train.nbytes)
        parameters = cost.count_parameters(spec.step.model)
        table.add_row(
            spec.size,
            spec.step.precision.name,
            spec.variant or "-",
            str(spec.seed_init),
            f"{spec.peak_lr:.2g}",
            count(parameters.total),
            count(parameters.non_embedding),
            ", ".join(count(end * spec.batch_tokens) for end in spec.ends),
            count(spec.total_flops),
            f"{memory / 1e9:.2f} GB",
            duration(spec.total_flops / flops_per_s),
            run.state,
        )
    screen.print(table)
    device_memory.show(screen, plan, elsewhere=where is not None)
    todo = sum(run.spec.total_flops for run in plan.runs if not run.finished)
    total = sum(run.spec.total_flops for run in plan.runs)
    screen.print(
        f"total {count(total)} FLOPs, still to do {count(todo)}: about "
        f"{duration(todo / flops_per_s)} and compilation, at {count(flops_per_s)} FLOP/s "
        f"({rate_source}{'' if where is None else ', of this machine'})"
    )
    if any(len(run.spec.ends) > 1 for run in plan.runs):
        independent = sum(run.spec.independent_flops for run in plan.runs)
        screen.print(
            f"branches share their trunks: {total / independent:.2f} of the {count(independent)} "
            "FLOPs that a run for each endpoint would cost"
        )
    kept = plan.directory if plan.mirror is None else plan.mirror.store.url
    screen.print(f"results would go to {where or kept}", soft_wrap=True, markup=False)


class SweepDisplay:
    """Progress over the runs of a plan. The sweep's unit is a FLOP, so its time left is fair."""

    def __init__(self, screen: Console, plan: Plan):
        self._screen, self._plan = screen, plan
        self._todo = float(sum(r.spec.total_flops for r in plan.runs if not r.finished))
        self._done: dict[str, float] = {}  # FLOPs of this launch, by run
        self._began = time.monotonic()
        self._bars: Progress | None = None

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Show bars while inside, on a terminal."""
        if not self._screen.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self._screen, transient=True) as self._bars:
            self._sweep_bar = self._bars.add_task("sweep", total=1.0, text="")
            yield
        self._bars = None

    def start(self, group: Sequence[PlannedRun]) -> "GroupProgress":
        """Runs begin that train as one program; often a single one."""
        return GroupProgress(self, group, self._screen, self._bars)

    def say(self, line: str) -> None:
        """A line that stays."""
        self._screen.print(line, soft_wrap=True, markup=False)

    def finished_elsewhere(self, run: PlannedRun, text: str) -> None:
        """Another launcher has finished a run that was waiting here."""
        self.advance([run], 1.0)
        self.say(f"{self.number(run)} {run.spec.run_id}  {text}")

    def number(self, run: PlannedRun) -> str:
        """Its place in the plan."""
        return f"[{self._plan.runs.index(run) + 1}/{len(self._plan.runs)}]"

    def advance(self, runs: Sequence[PlannedRun], share: float) -> str:
        """Runs are so far; what is left of the sweep, in words."""
        self._done.update({run.spec.run_id: share * run.spec.total_flops for run in runs})
        done = sum(self._done.values())
        left = _left(
            (self._todo - done) * (time.monotonic() - self._began) / done if done else None
        )
        if self._bars:
            self._bars.update(self._sweep_bar, completed=done / self._todo, text=left)
        return left


class GroupProgress:
    """Progress of runs that train as one program; several such may train side by side."""

    def __init__(
        self,
        sweep: SweepDisplay,
        group: Sequence[PlannedRun],
        screen: Console,
        bars: Progress | None,
    ):
        self._sweep, self._group, self._screen, self._bars = sweep, group, screen, bars
        self._began = time.monotonic()
        self._last_line = self._began
        self._first: tuple[int, float] | None = None  # where this launch's rate is counted from
        self._unfinished = len(group)
        others = f" and {len(group) - 1} more" if len(group) > 1 else ""
        self._name = f"{sweep.number(group[0])} {group[0].spec.run_id}{others}"
        if bars:
            spec = group[0].spec
            name = f"{sweep.number(group[0])} {spec.size} {spec.step.precision.name}{others}"
            self._bar = bars.add_task(name, total=1.0, text="compiling")

    def watch(self, report: Report) -> None:
        """A group reports."""
        now, share = time.monotonic(), report.tick / report.total_ticks
        self._first = self._first or (report.tick, now)
        ticks, seconds = report.tick - self._first[0], now - self._first[1]
        left = (report.total_ticks - report.tick) * seconds / ticks if ticks else None
        text, sweep_left = self._numbers(report, left), self._sweep.advance(self._group, share)
        if self._bars:
            self._bars.update(self._bar, completed=share, text=text)
        elif now - self._last_line > 10:
            self._last_line = now
            line = f"  {self._name}  {share:4.0%}  {text}, sweep {sweep_left}"
            self._screen.print(line, soft_wrap=True, markup=False)

    def _numbers(self, report: Report, left: float | None) -> str:
        loss = f"{report.loss:.3f} nats" if report.loss is not None else "not finite"
        rate = f"{count(report.tokens_per_s)} tok/s" if report.tokens_per_s else ""
        parts = [f"step {report.tick}/{report.total_ticks}", f"loss {loss}", rate, _left(left)]
        return "  ".join(part for part in parts if part)

    def finish(self, run: PlannedRun, text: str) -> None:
        """A run ended; leave a line of it."""
        self._sweep.advance([run], 1.0)
        took = duration(time.monotonic() - self._began)
        line = f"{self._sweep.number(run)} {run.spec.run_id}  {text}  ({took})"
        self._screen.print(line, soft_wrap=True, markup=False)
        self._unfinished -= 1
        if self._bars and not self._unfinished:
            self._bars.remove_task(self._bar)

    def leave(self, text: str) -> None:
        """The group is given up unfinished."""
        self._sweep.advance(self._group, 0.0)
        self._sweep.say(f"{self._name}  {text}")
        if self._bars:
            self._bars.remove_task(self._bar)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{duration(seconds)} left"
