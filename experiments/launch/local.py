"""Train a plan's runs in this process, in groups of one shape and arm, beside other launchers.

An accelerator trains the small models of a group side by side, as one program. A CPU trains them no
faster so: there a group is a single run, but two of them share its cores, since the operations of a
small model are too short to occupy several. Either way one long-lived process compiles each shape
and arm once and serves every run of it.

Launchers of one sweep, wherever they run, share its folder and its runs by leases (`leases.py`).
A worker is a launcher that leaves as soon as it has nothing to do but wait for others, tries again
what fails, and gives up what fails too often without getting on (`failures.py`).
"""

import contextlib
import dataclasses
import functools
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import Any

from bitnet_jax import hosts
from bitnet_jax.configs.resolve import failures_allowed, group_size, loop_options, parallel
from bitnet_jax.results import endpoint_row
from bitnet_jax.tracking import provenance
from bitnet_jax.train import Interrupted, compile_ahead, train_group
from experiments.display import GroupProgress, SweepDisplay
from experiments.launch import gang
from experiments.launch.failures import Failures, count_failure, forget_failures, read_failures
from experiments.launch.leases import Held, Lease
from experiments.launch.sharing import Sharing, sharing
from experiments.plan import Plan, PlannedRun, first_line
from experiments.summary import read_summary

POLL = 1.0  # seconds between looks at what other launchers hold
RESULTS = "results"  # the lease on what is written of all runs together; no run's id


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a question the loop asks; the second one kills.

    By the system's hand, not as a KeyboardInterrupt: that would wait for the other threads, and for
    what the main one is doing outside of Python, such as compiling.
    """

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
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        if sys.stdout.isatty():  # the bars have hidden the cursor, and what kills brings none back
            os.write(sys.stdout.fileno(), b"\x1b[?25h")

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self, tick: int) -> bool:
        return self.signal is not None


def train_all(
    plan: Plan, display: SweepDisplay, should_stop: Callable[[int], bool]
) -> dict[str, list[dict[str, Any]]]:
    """Train what is not finished, together with whoever else does, until nothing is left.

    A failure does not stop the groups that follow.

    Returns rows of the runs that failed here, by run id; another launcher may have finished them.

    Raises:
      Interrupted: should_stop said so; the plan goes on from there when launched again.
      ConfigError: the leases cannot be written.
    """
    return _launch(plan, display, should_stop, is_worker=False).failures


def work(plan: Plan, display: SweepDisplay, should_stop: Callable[[int], bool]) -> bool:
    """Train what can be had, until each run is finished, given up or with others who live.

    What fails is tried again, by this worker or another, until it has failed so often without
    getting on as `launch.failures` allows.

    Returns whether all that came to its end here is well: no run diverged, none was given up.

    Raises:
      Interrupted, ConfigError: as `train_all`.
    """
    return _launch(plan, display, should_stop, is_worker=True).all_well


def _launch(
    plan: Plan, display: SweepDisplay, should_stop: Callable[[int], bool], is_worker: bool
) -> "_Launch":
    shared = sharing(plan, display.say)
    with shared.leases as leases:
        launch = _Launch(plan, display, should_stop, shared, is_worker)
        launch.run()
        finished = [run for run in plan.runs if run.finished]
        leases.clear(run.spec.run_id for run in finished)
        for run in finished:  # by whomever: who finished it may have been killed before he forgot
            forget_failures(run.directory)
    return launch


@contextlib.contextmanager
def alone(plan: Plan, display: SweepDisplay, should_stop: Callable[[int], bool]) -> Iterator[None]:
    """Inside, no other launcher writes the plan's results. Raises like `train_all`."""
    told = None
    with sharing(plan, display.say).leases as leases:
        while True:
            try:
                (lease,) = leases.claim([RESULTS])
                break
            except Held as held:
                if str(held) != told:
                    told = str(held)
                    display.say(f"waiting for {told}, which writes the results")
            _wait(should_stop)
        try:
            yield
        finally:
            leases.release(lease, done=True)


@dataclasses.dataclass
class _Claim:
    """A group that is this launcher's to train, and the leases on its runs."""

    group: list[PlannedRun]
    leases: list[Lease]

    @property
    def lost(self) -> bool:
        return any(lease.lost for lease in self.leases)


class _Launch:
    """Groups on their way: each worker, a thread, takes the next one until none is left.

    A program for a CPU that calls batched LAPACK (jnp.linalg.solve and the like) must not train
    beside another: such calls wait inside the threads that they need (seen with jax 0.10.2).
    """

    def __init__(
        self,
        plan: Plan,
        display: SweepDisplay,
        should_stop: Callable[[int], bool],
        shared: Sharing,
        is_worker: bool,
    ) -> None:
        self._plan, self._display, self._should_stop = plan, display, should_stop
        self._shared, self._leases, self._is_worker = shared, shared.leases, is_worker
        self._waiting = grouped(plan.runs)
        wanted = max((parallel(group[0].config) for group in self._waiting), default=1)
        self._workers = 1 if hosts.several() else max(1, min(wanted, len(self._waiting)))
        self._taking = threading.Lock()
        self._background = ThreadPoolExecutor(max_workers=1)
        self._compiling: dict[tuple, Future] = {}  # by program
        self._stopped = False
        self.failures: dict[str, list[dict[str, Any]]] = {}
        self.all_well = True

    def run(self) -> None:
        others = max(self._workers - 1, 1)
        with self._background, ThreadPoolExecutor(max_workers=others) as threads:
            futures = [threads.submit(self._work) for _ in range(self._workers - 1)]
            try:
                self._work()  # in the main thread, which is the one that signals interrupt
                for future in futures:
                    future.result()
            except BaseException:
                self._stopped = True
                raise

    def _work(self) -> None:
        while (claim := self._take()) is not None:
            progress = self._display.start(claim.group)
            try:
                summaries = self._train(claim, progress)
            except Interrupted:
                self._stopped = True
                raise
            except Exception as error:
                if claim.lost:
                    self._give_up(claim, progress)
                else:
                    self._fail(claim.group, error, progress)
                if hosts.several():
                    gang.fail()
            else:
                for run, summary in zip(claim.group, summaries, strict=True):
                    forget_failures(run.directory)
                    progress.finish(run, _outcome(summary))
                    self.all_well &= summary["status"] == "ok"
            finally:
                self._release(claim.group, claim.leases)

    def _train(self, claim: _Claim, progress: GroupProgress) -> list[dict[str, Any]]:
        options = loop_options(claim.group[0].config)
        gang.lead(claim.group)
        with self._shared.training(claim.leases):
            return train_group(
                gang.jobs_of(claim.group),
                self._plan.corpus,
                # A lone run shares the machine with nobody, whatever the config allows.
                dataclasses.replace(options, parallel=self._workers),
                watch=progress.watch,
                should_stop=self._stop,
                guard=lambda: self._leases.guard(claim.leases),
            )

    def _fail(self, group: list[PlannedRun], error: Exception, progress: GroupProgress) -> None:
        """Leave the traceback with every run of the group. Called while the error is handled."""
        left = []
        for run in group:
            path = run.directory / "failure.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(traceback.format_exc())
            failures = self._count(run, first_line(error))
            if self._is_worker and not failures.given_up:
                left.append(run)
                continue
            progress.finish(run, f"FAILED: {first_line(error)}; see {path}")
            self.failures[run.spec.run_id] = _failed_rows(run)
            self.all_well = False
        if left:
            progress.leave(f"failed, to be tried again: {first_line(error)}; see {path}")
            with self._taking:
                self._waiting.append(left)

    def _count(self, run: PlannedRun, reason: str) -> Failures:
        """Count a failure of a run whose lease is held here; only a worker gives it up."""
        most = failures_allowed(run.config) if self._is_worker else math.inf
        rows = functools.partial(_failed_rows, run)
        return count_failure(run.directory, run.spec.run_id, reason, most, rows)

    def _give_up(self, claim: _Claim, progress: GroupProgress) -> None:
        """Another launcher took over what this one was silent about for too long."""
        progress.leave("taken over by another launcher")
        self._release(claim.group, claim.leases)
        with self._taking:
            self._waiting.append(claim.group)

    def _release(self, runs: Iterable[PlannedRun], leases: Iterable[Lease]) -> None:
        leases = list(leases)
        kept = self._shared.keep(leases, self._stop)
        done = kept & {run.spec.run_id for run in runs if run.finished}
        for lease in leases:
            self._leases.release(lease, done=lease.name in done)

    def _stop(self, tick: int) -> bool:
        """What one worker has been told holds for all."""
        return self._stopped or self._should_stop(tick)

    def _take(self) -> _Claim | None:
        """The next group, whose programs are there, are being made, or are for it to make.

        None once no run is left, neither here nor, unfinished, with another launcher; of a worker,
        once others hold all that is left and each has been seen to live since.
        """
        told: set[str] = set()
        idle_since: float | None = None
        while True:
            with self._taking:
                if self._stopped or not self._waiting:
                    return None
                held: list[Held] = []
                claim = self._claim_next(held)
                if claim is not None:
                    break
            holders = {str(each) for each in held}
            if holders - told:
                self._display.say(f"waiting for runs of {', '.join(sorted(holders))}")
                told |= holders
            if idle_since is None:
                idle_since = self._leases.clock()
            elif held and self._is_worker and all(each.moved > idle_since for each in held):
                self._display.say(f"left to {', '.join(sorted(holders))}")
                return None
            if held:
                _wait(self._stop)
        own = self._compiling[_program(claim.group)]
        if not own.cancel():
            own.result()
        if self._stopped:
            self._release(claim.group, claim.leases)
            return None
        return claim

    def _claim_next(self, held: list[Held]) -> _Claim | None:
        """The first group that can be had in whole; None if each is with others, who go to `held`.

        Begins to compile for the one behind it. Called by one worker at a time.
        """
        place = 0
        while place < len(self._waiting):
            try:
                claim, rest = self._claim(self._waiting[place])
            except Held as holder:
                held.append(holder)
                place += 1
                continue
            self._waiting[place : place + 1] = rest
            if claim is not None:
                self._compiling.setdefault(_program(claim.group), _done())
                if place < len(self._waiting):
                    self._compile_ahead(self._waiting[place])
                return claim
        return None

    def _claim(self, group: list[PlannedRun]) -> tuple[_Claim | None, list[list[PlannedRun]]]:
        """What is to be trained of a group at once, and what is left of it for later.

        Meanwhile others may have finished some of its runs, and begun some.

        Raises:
          Held: another launcher has one of them.
        """
        runs = [run for run in group if not run.finished]
        leases = self._leases.claim([run.spec.run_id for run in runs])
        try:
            self._shared.look(runs)
        except Held:
            self._leases.give_back(leases)
            raise
        for run in group:
            if run.finished:
                self._display.finished_elsewhere(run, _outcome_elsewhere(run))
        orphans = {lease.name for lease in leases if lease.orphaned}
        left = [run for run in runs if not run.finished and self._wanted(run, orphans)]
        first, *rest = grouped(left) or [[]]
        chosen = {run.spec.run_id for run in first}
        self._release(runs, [lease for lease in leases if lease.name not in chosen])
        own = [lease for lease in leases if lease.name in chosen]
        return (_Claim(first, own) if first else None), rest

    def _wanted(self, run: PlannedRun, orphans: Collection[str]) -> bool:
        """Whether a run that is claimed should be trained. orphans: ids of those whose last holder
        has ended without a word, which is counted."""
        if run.spec.run_id in orphans:
            failures = self._count(run, "its worker ended without a word")
            news = f"its worker has ended without a word ({failures.count} without getting on)"
            self._display.say(f"{self._display.number(run)} {run.spec.run_id}  {news}")
            self.all_well &= not (self._is_worker and failures.given_up)
        if self._is_worker and (known := read_failures(run.directory)).given_up:
            text = f"FAILED: given up after {known.count} failures: {known.reason}"
            self._display.finished_elsewhere(run, text)
            return False
        return True

    def _compile_ahead(self, group: list[PlannedRun]) -> None:
        program = _program(group)
        if program not in self._compiling and not hosts.several():
            task = self._background.submit(_compile_ahead, self._plan, group)
            self._compiling[program] = task


def _wait(should_stop: Callable[[int], bool]) -> None:
    """Until it is time to look again.

    Raises:
      Interrupted: should_stop said so.
    """
    end = time.monotonic() + POLL
    while time.monotonic() < end:
        if should_stop(0):
            raise Interrupted("while waiting for another launcher")
        time.sleep(POLL / 10)


def _done() -> Future:
    future: Future = Future()
    future.set_result(None)
    return future


def _program(group: list[PlannedRun]) -> tuple:
    """What decides which compiled programs a group needs."""
    return group[0].spec.step, group[0].spec.phases, group[0].spec.data, len(group)


def _compile_ahead(plan: Plan, group: list[PlannedRun]) -> None:
    run = group[0]
    with contextlib.suppress(Exception):  # said when the group's turn comes
        compile_ahead(run.spec, len(group), plan.corpus, loop_options(run.config))


def grouped(runs: Iterable[PlannedRun]) -> list[list[PlannedRun]]:
    """The unfinished runs in groups that train as one program, in the order of their first runs."""
    groups: dict[tuple, list[list[PlannedRun]]] = {}
    order = []
    unfinished = [run for run in runs if not run.finished]
    begun_with = _begun_with(unfinished)
    for run in unfinished:
        size = group_size(run.config)
        # A run that is half done does not go back to the start for the sake of a new one.
        together = begun_with.get(run.spec.run_id)
        key = run.spec.group, loop_options(run.config), size, together
        kind = groups.setdefault(key, [])
        if not kind or len(kind[-1]) == size:
            kind.append([])
            order.append(kind[-1])
        kind[-1].append(run)
    return order


def _begun_with(runs: list[PlannedRun]) -> dict[str, tuple[str, ...]]:
    """By run id the group that a run was begun in, be it that only others of it have been."""
    known = {run.spec.run_id: run.group for run in runs}
    begun = {run_id: group for run_id, group in known.items() if group is not None}
    for group in list(begun.values()):
        for run_id in group:
            begun.setdefault(run_id, group)
    return begun


def _outcome(summary: dict[str, Any]) -> str:
    if summary["status"] != "ok":
        return summary["status"].upper()
    losses = ", ".join(f"{row['bits_per_byte']:.3f}" for row in summary["endpoints"])
    return f"{losses} bits a byte"


def _outcome_elsewhere(run: PlannedRun) -> str:
    """Of a run that another launcher has finished."""
    try:
        outcome = _outcome(read_summary(run.directory))
    except (OSError, ValueError, KeyError, TypeError):
        return "done by another launcher"  # what is wrong with it is said when all are collected
    return f"{outcome}, by another launcher"


def _failed_rows(run: PlannedRun) -> list[dict[str, Any]]:
    nothing = dict.fromkeys(("loss", "loss_stderr", "bits_per_byte", "train_loss", "wall_s"))
    return [
        endpoint_row(
            run.spec, {"end": end, "unique_tokens": 0, "status": "failed", **nothing}, provenance()
        )
        for end in run.spec.ends
    ]
