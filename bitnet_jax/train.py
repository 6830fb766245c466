"""The training loop: resolved runs in, endpoints out, and nothing lost in between.

A group of runs of one shape, arm and schedule trains in step, as one compiled program
(`programs.py`); a lone run is a group of one. Every run has files and checkpoints of its own
(`member.py`), and one that diverges leaves the others untouched.
"""

import dataclasses
import functools
import math
import operator
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import hosts, programs
from bitnet_jax.checkpoint import DamagedCheckpoint, save_model
from bitnet_jax.data import Corpus, RowReader, validation_rows
from bitnet_jax.disk import GaveUp, Patience
from bitnet_jax.evaluate import held_out_losses
from bitnet_jax.gradient_check import estimator_cosine
from bitnet_jax.member import Job, LoopOptions, Member, number
from bitnet_jax.model import linear_layers
from bitnet_jax.spec import RunSpec
from bitnet_jax.train_step import StepConfig, TrainState
from bitnet_jax.trajectory import Segment, locate, total_ticks


class Interrupted(Exception):
    """The runs were asked to stop; a checkpoint of this moment has been written."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a watcher is told at every log step; the rate is None until it is known.

    loss: the mean over the runs. tokens_per_s: of all of them together.
    """

    tick: int
    total_ticks: int
    loss: float | None
    tokens_per_s: float | None


def train_and_evaluate(
    spec: RunSpec,
    corpus: Corpus,
    run_dir: Path,
    options: LoopOptions,
    config: dict[str, Any],
    watch: Callable[[Report], None] = lambda report: None,
    should_stop: Callable[[int], bool] = lambda tick: False,
) -> dict[str, Any]:
    """`train_group` of a single run."""
    job = Job(spec, run_dir, config)
    return train_group([job], corpus, options, watch, should_stop)[0]


def train_group(
    jobs: Sequence[Job],
    corpus: Corpus,
    options: LoopOptions,
    watch: Callable[[Report], None] = lambda report: None,
    should_stop: Callable[[int], bool] = lambda tick: False,
    guard: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Train runs to their last endpoint, from the newest checkpoint that all of them have.

    Where memory runs out, the batch is cut into more microbatches, and a group into its runs.

    jobs: of one `RunSpec.group`. watch: called at every log step.
    should_stop: asked before every call of the compiled program.
    guard: called before anything is written; what it raises abandons the runs as they are on disk.
    Returns their summaries, as in summary.json.

    Raises:
      Interrupted: should_stop said so; calling again goes on from there.
    """
    microbatches = max(jobs[0].spec.step.microbatches, *(job.microbatches for job in jobs))
    while True:
        try:
            loop = _Loop(jobs, corpus, options, should_stop, guard, microbatches)
            return _train_group(loop, watch)
        except GaveUp as error:
            raise Interrupted(jobs[0].spec.run_id) from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            more = _more_microbatches(jobs[0].spec, microbatches)
            if more is None and len(jobs) == 1:
                raise
        if more is None:
            _warn(f"out of memory: training the {len(jobs)} runs of a group one by one")
            return [train_group([j], corpus, options, watch, should_stop, guard)[0] for j in jobs]
        microbatches = more
        names = ", ".join(job.spec.run_id for job in jobs)
        _warn(f"out of memory: {names}: going on with {more} microbatches a step; the batch is as "
              "it was, its sums are rounded otherwise")  # fmt: skip


def _more_microbatches(spec: RunSpec, microbatches: int) -> int | None:
    """The next number that cuts the batch into smaller equal parts, doubled if that can be."""
    larger = [n for n in range(microbatches + 1, spec.batch_size + 1) if spec.batch_size % n == 0]
    halved = 2 * microbatches
    return halved if halved in larger else next(iter(larger), None)


def _train_group(loop: "_Loop", watch: Callable[[Report], None]) -> list[dict[str, Any]]:
    try:
        loop.run(watch)
    finally:
        loop.close()
    return loop.summarize()


def compile_ahead(spec: RunSpec, runs: int, corpus: Corpus, options: LoopOptions) -> None:
    """Compile what `train_group` will want for so many runs, and keep it on disk.

    For another thread, while the device trains something else. Only of use where
    `programs.keep_programs` has said where.
    """
    data, slots = spec.data, options.slots
    seeds = jax.ShapeDtypeStruct((runs,), jnp.int32)
    init = programs.compiled_init(spec.step, runs)
    init.lower(seeds).compile()
    state = programs.place(jax.eval_shape(init, seeds), runs, spec.step.mesh)
    rows = _reader(spec, runs, corpus, options)(np.zeros((runs, slots, spec.batch_size), np.int64))
    rates = np.zeros((runs, slots), np.float32)
    schedule = programs.Schedule(rates, rates, rates[0], np.zeros(slots, bool))
    for program in spec.phases.programs(spec.step):
        steps = programs.compiled_steps(program, runs, data.sequence_length)
        steps.lower(state, *rows, schedule, np.int32(0)).compile()
    batch = jax.ShapeDtypeStruct((spec.batch_size, data.sequence_length + 1), jnp.int32)
    programs.compiled_eval(spec.deployed, runs).lower(state.params, batch).compile()
    if spec.step.precision.quantized:
        observe = programs.compiled_observe(spec.step.precision, runs, spec.step.mesh)
        observe.lower(state.snapshots, state.params).compile()


def _reader(spec: RunSpec, runs: int, corpus: Corpus, options: LoopOptions) -> RowReader:
    put = functools.partial(programs.replicate, runs=runs, mesh=spec.step.mesh)
    return RowReader(corpus.train, spec.data.sequence_length, options.resident_bytes, put)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


class _Loop:
    """A group while it trains. `state` is what the next step starts from, a runs axis leading.

    stash: the state of the last anchor: what a run that diverges goes back to, and, in a decay,
      what the trunk goes on from.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        corpus: Corpus,
        options: LoopOptions,
        should_stop: Callable[[int], bool],
        guard: Callable[[], None],
        microbatches: int,
    ):
        self.spec, self.options, self.runs = jobs[0].spec, options, len(jobs)
        # Asked at the same tick by every process: what one has been told holds for all.
        self.should_stop = lambda tick: hosts.any_of(should_stop(tick))
        self.guard = guard
        self.patiently = Patience(lambda: should_stop(self.tick))
        if {job.spec.group for job in jobs} != {self.spec.group}:
            raise ValueError("a group's runs may differ in seeds, learning rate and decay alone")
        self.segments = self.spec.segments
        data = self.spec.data
        self.reader = _reader(self.spec, self.runs, corpus, options)
        self.rows = validation_rows(corpus.valid, data.sequence_length, data.eval_tokens)
        self.tick = 0
        self.guard()
        self.members = [Member(job, corpus, options, self.patiently) for job in jobs]
        self.stash: TrainState | None = None
        seeds = np.array([job.spec.seed_init for job in jobs], np.int32)
        init = programs.compiled_init(self.spec.step, self.runs)
        self.state: TrainState = self._placed(init(seeds))
        self._restore()
        parts = max(microbatches, *(m.progress.microbatches for m in self.members))
        self.step = dataclasses.replace(self.spec.step, microbatches=parts)
        steps_left = self.tick < total_ticks(self.segments)
        for member in self.members:
            member.progress.microbatches = parts
            if steps_left:  # a run that only lacks its summary may come back without its group
                member.progress.groups = sorted({*member.progress.groups, self.runs})
        self.pending: list[tuple[dict[str, jax.Array], int]] = []  # metrics not yet fetched
        self.guard()
        for member in self.members:
            member.open([job.spec.run_id for job in jobs])

    def _restore(self) -> None:
        """Go back to the newest checkpoint that every member has and that is what was saved.

        One that is not is removed, and said so. Where there is none the runs start again.
        """
        self.guard()
        had = any(member.checkpointer.ticks() for member in self.members)
        while (tick := self._newest_common()) is not None:
            found = [self._restored(member, tick) for member in self.members]
            whole = [pair for pair in found if pair is not None]
            if hosts.all_of(len(whole) == self.runs):
                states, stashes = zip(*whole, strict=True)
                self.tick, self.state = tick, self._stack(states)
                self.stash = None if stashes[0] is None else self._stack(stashes)
                return
        if had:
            for member in self.members:
                member.forget()
            names = ", ".join(member.spec.run_id for member in self.members)
            _warn(f"{names}: no checkpoint to go on from: training starts again from step 0")

    def _newest_common(self) -> int | None:
        """The newest tick at which every member has a checkpoint; what lies beyond is removed."""
        common = set.intersection(*(set(m.checkpointer.ticks()) for m in self.members))
        # Another process may see the folder as it was a moment ago.
        newest = int(hosts.told(str(max(common, default=-1))))
        for member in self.members:
            member.checkpointer.forget_after(newest)
        return None if newest < 0 else newest

    def _restored(self, member: Member, tick: int) -> tuple[TrainState, TrainState | None] | None:
        """A member's states at a tick; None, without a checkpoint there, where it is damaged."""
        try:
            return member.restore(tick, programs.part(self.state, 0))
        except DamagedCheckpoint as error:
            member.checkpointer.forget(tick)
            _warn(f"{member.spec.run_id}: tick {tick}: damaged checkpoint removed: {error}")
            return None

    def _stack(self, states: Sequence[TrainState]) -> TrainState:
        return self._placed(jax.tree.map(lambda *xs: jnp.stack(xs), *states))

    def _placed(self, states: TrainState) -> TrainState:
        return programs.place(states, self.runs, self.spec.step.mesh)

    def run(self, watch: Callable[[Report], None]) -> None:
        """Make every remaining tick. Metrics are fetched at log steps, so that no step waits."""
        self.clock = self.last_save = self.last_report = time.monotonic()
        self.reported_tick: int | None = None  # the first interval holds compilation: no rate
        while self.tick < total_ticks(self.segments):
            if self.should_stop(self.tick):
                self._save()
                raise Interrupted(self.spec.run_id)
            index, step = locate(self.segments, self.tick)
            segment = self.segments[index]
            if step == segment.start:
                for member in self.members:
                    member.begin()
            if segment.anchored(step):
                if step > segment.start and self._rolled_back(segment):
                    continue
                self._drop_anchor(segment)
            count = self._steps_together(step, segment)
            self._dispatch(step, count, segment)
            done, last = step + count, step + count == segment.end
            # Before the checkpoint below, which would otherwise not know of this line.
            if self.options.eval_every and done % self.options.eval_every == 0 and not last:
                self._evaluate_on_the_way(segment, done)
            if done % self.options.log_every == 0 or last:
                self._log_train(segment, done)
                watch(self._report())
                self._end_or_save(index, last)
        if self.runs > 1:
            self._save()  # so that a group cut short while it writes its summaries has nothing left

    def _drop_anchor(self, segment: Segment) -> None:
        """Set the state aside. A step donates its input, so this must be a copy."""
        if segment.is_decay or self.spec.rollbacks:
            self._drain()
            self.stash = programs.copied(self.state)
            for member in self.members:
                member.progress.tick = self.tick
                member.anchor()

    def _rolled_back(self, segment: Segment, last: bool = False) -> bool:
        """Go back to the anchor if a run has diverged and may try other data: all of the group,
        since it trains in step. The others make the same steps again, to the same bits."""
        self._drain()
        blamed = [
            not m.progress.idle and m.may_roll_back() and m.diverged(segment, last)
            for m in self.members
        ]
        if not any(blamed):
            return False
        self.guard()
        anchor = self.members[0].progress.anchor
        assert anchor is not None and self.stash is not None
        self.tick = anchor["tick"]
        for member, guilty in zip(self.members, blamed, strict=True):
            member.roll_back(guilty, segment, locate(self.segments, self.tick)[1])
        self.state = programs.copied(self.stash)
        return True

    def _steps_together(self, step: int, segment: Segment) -> int:
        """How many steps from this one on can be one call: up to the next thing to do."""
        end = min(segment.next_anchor(step), step + self.options.dispatch)
        for every in (self.options.log_every, self.options.eval_every):
            if every:
                end = min(end, (step // every + 1) * every)
        program = self._program(step, segment)[0]
        same = (s for s in range(step + 1, end) if self._program(s, segment)[0] != program)
        return next(same, end) - step

    def _program(self, step: int, segment: Segment) -> tuple[StepConfig, float]:
        return self.spec.phases.program(self.step, step, segment.decay)

    def _dispatch(self, step: int, count: int, segment: Segment) -> None:
        program = self._program(step, segment)[0]
        starts = np.stack([self._padded(m.starts(step, count)) for m in self.members])
        steps = programs.compiled_steps(program, self.runs, self.spec.data.sequence_length)
        self.state, metrics = steps(
            self.state,
            *self.reader(starts),
            self._schedule(range(step, step + count), segment),
            np.int32(count),
        )
        self.pending.append((metrics, count))
        self.tick += count

    def _padded(self, values: Any) -> np.ndarray:
        """Along the steps, to as many as a call has room for."""
        values = np.asarray(values)
        short = self.options.slots - len(values)
        return np.pad(values, [(0, short)] + [(0, 0)] * (values.ndim - 1))

    def _schedule(self, steps: range, segment: Segment) -> programs.Schedule:
        """`remember` is true before the last two steps of a log interval."""
        factors = [self.spec.schedule.factors(step, segment.decay) for step in steps]
        lr, decay = self._padded(np.array(factors)).T
        every = self.options.log_every
        next_log = (min((step // every + 1) * every, segment.end) for step in steps)
        peaks = np.array([[m.spec.peak_lr, m.spec.weight_decay] for m in self.members])
        return programs.Schedule(
            (peaks[:, :1] * lr).astype(np.float32),
            (peaks[:, 1:] * decay).astype(np.float32),
            self._padded(np.array([self._program(s, segment)[1] for s in steps], np.float32)),
            self._padded([log - step <= 2 for log, step in zip(next_log, steps, strict=True)]),
        )

    def _drain(self) -> None:
        """Fetch what is pending, for the members that still want to know."""
        for metrics, count in jax.device_get(self.pending):
            for index, member in enumerate(self.members):
                if not member.progress.idle:
                    member.receive({key: m[index, :count] for key, m in metrics.items()})
        self.pending = []

    def _log_train(self, segment: Segment, done: int) -> None:
        self._drain()
        factors = self.spec.schedule.factors(done - 1, segment.decay)
        stats, sizes = self._observe()
        self.guard()
        for index, member in enumerate(self.members):
            member.progress.tick = self.tick
            if not member.progress.idle:
                own = None if stats is None else jax.tree.map(operator.itemgetter(index), stats)
                member.log_train(segment, done, factors, own, sizes)

    def _observe(self) -> tuple[Any, dict[str, int]]:
        """Statistics of the latents of all runs, and the weights of each projection's kernel."""
        precision = self.spec.step.precision
        if not precision.quantized:
            return None, {}
        observe = programs.compiled_observe(precision, self.runs, self.spec.step.mesh)
        snapshots, stats = observe(self.state.snapshots, self.state.params)
        self.state = self.state.replace(snapshots=snapshots)
        layers = linear_layers(self.state.params).items()
        sizes = {name: math.prod(layer["kernel"].shape[2:]) for name, layer in layers}
        return jax.device_get(stats), sizes

    def _report(self) -> Report:
        now, tick = time.monotonic(), self.tick
        ticks = tick - self.reported_tick if self.reported_tick is not None else None
        tokens = self.spec.batch_tokens * self.runs
        rate = ticks * tokens / (now - self.last_report) if ticks else None
        self.last_report, self.reported_tick = now, tick
        losses = [m.progress.train_loss for m in self.members]
        known = [loss for loss in losses if loss is not None]
        mean = sum(known) / len(known) if known else None
        return Report(tick, total_ticks(self.segments), mean, rate)

    def _end_or_save(self, index: int, last: bool) -> None:
        """At a log step: end what has diverged or is done; otherwise save now and then."""
        segment = self.segments[index]
        if self._rolled_back(segment, last):
            return
        for member in self.members:
            if not member.progress.idle and member.diverged(segment, last):
                self._give_up(member, index)
        if last or all(member.progress.idle for member in self.members):
            if segment.is_decay:
                self._finish_decay(index)
            if all(member.finished for member in self.members):
                index = len(self.segments) - 1
            self._jump_to(index + 1)
        if hosts.any_of(time.monotonic() - self.last_save > self.options.checkpoint_seconds):
            self._save()

    def _give_up(self, member: Member, index: int) -> None:
        """A member diverged. With a trunk, so has every endpoint that would have come of it."""
        segment = self.segments[index]
        self.guard()
        member.progress.idle = True
        self._tick_clock()
        if segment.is_decay:
            member.record(segment)
            nothing = {"valid_loss": None, "valid_loss_stderr": None}
            member.write("endpoint", segment, segment.end, **nothing)
            return
        for later in self.segments[index:]:
            if later.is_decay:
                member.record(later)

    def _evaluate_on_the_way(self, segment: Segment, done: int) -> None:
        """In the arm of the step just made, with all its quantization."""
        program = dataclasses.replace(self._program(done - 1, segment)[0], warming=False)
        losses = self._evaluate(program)
        self.guard()
        for member, (loss, _) in zip(self.members, losses, strict=True):
            if not member.progress.idle:
                member.progress.tick = self.tick
                member.write("eval", segment, done, valid_loss=loss)

    def _evaluate(self, program: StepConfig) -> list[tuple[float | None, float | None]]:
        """Held-out loss and its standard error of each run; None where they are not finite."""
        batch, params = self.spec.batch_size, self.state.params
        losses = held_out_losses(program, self.runs, params, self.rows, batch)
        return [(number(loss), number(error)) for loss, error in losses]

    def _finish_decay(self, index: int) -> None:
        """Record the endpoint of every member still there, and put the trunk back."""
        segment = self.segments[index]
        alive = [i for i, member in enumerate(self.members) if not member.progress.idle]
        losses = self._evaluate(self.spec.deployed) if alive else []
        self._tick_clock()
        for i in alive:
            member, (loss, error) = self.members[i], losses[i]
            member.record(segment, loss, error)
            values = {"valid_loss": loss, "valid_loss_stderr": error}
            params = programs.part(self.state.params, i)
            sample = self.options.gradient_sample if self.spec.step.precision.quantized else 0
            if sample and loss is not None:
                values["gradient_cosine"] = self._gradient_cosine(params, member.spec)
            self.guard()
            member.write("endpoint", segment, segment.end, **values)
            last = segment.end == self.spec.ends[-1]
            if self.options.keep_model and last and loss is not None:
                save = functools.partial(save_model, member.run_dir, params)
                member.progress.model = self.patiently(save)
        assert self.stash is not None
        self.state, self.stash = self.stash, None

    def _gradient_cosine(self, params: dict, spec: RunSpec) -> float | None:
        """On the first held-out rows, and weights drawn by the run's seed."""
        rows, sample = self.rows[: spec.batch_size], self.options.gradient_sample
        return number(estimator_cosine(spec.deployed, sample, params, rows, spec.seed_init))

    def _jump_to(self, index: int) -> None:
        self.tick = total_ticks(self.segments[:index])
        for member in self.members:
            member.jump_to(self.tick)

    def _tick_clock(self) -> None:
        """Seconds of training so far, over all launches; a run's share of the machine's."""
        now = time.monotonic()
        for member in self.members:
            member.progress.wall_s += (now - self.clock) / (self.runs * self.options.parallel)
        self.clock = now

    def _save(self) -> None:
        self._drain()
        self._tick_clock()
        for index, member in enumerate(self.members):
            self.guard()
            member.progress.tick = self.tick
            state, stash = programs.part((self.state, self.stash), index)
            member.save(state, stash)
        self.last_save = time.monotonic()

    def summarize(self) -> list[dict[str, Any]]:
        """Write what each run has come to."""
        summaries = []
        for member in self.members:
            self.guard()
            summaries.append(self.patiently(member.summarize))
        return summaries

    def close(self) -> None:
        for member in self.members:
            member.close()
