"""One run of a group: what it has done so far, and the files it writes."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax import hosts, telemetry, tracking
from bitnet_jax.checkpoint import Checkpointer, DamagedCheckpoint
from bitnet_jax.data import Corpus, train_batches
from bitnet_jax.disk import Patience, is_full
from bitnet_jax.files import SCHEMA_VERSION, remove_torn, within, write_json
from bitnet_jax.loss import bits_per_byte
from bitnet_jax.results import endpoint_row
from bitnet_jax.spec import RunSpec
from bitnet_jax.train_step import TrainState
from bitnet_jax.trajectory import Segment

# So many non-finite steps in a row are a divergence: more than the halvings of a float16 loss scale
# from 2^15 to 1, so an arm is not called diverged for finding its scale. The run goes back to its
# last anchor (`trajectory.py`) and tries other data, `rollbacks` times at most.
SKIPS_TO_DIVERGE = 25

# What a run writes to as it stands; other files are replaced by new ones.
WRITTEN_IN_PLACE = ("checkpoints", "metrics.jsonl", "model", "wandb")

# An endpoint's train_loss is the mean over so many last steps of its decay, however it was logged.
TRAIN_LOSS_STEPS = 50


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """What a run does beside training. None of it can change a result.

    log_every, eval_every: optimizer steps; 0 evaluates at endpoints only.
    log_layers: a further line with the statistics of each projection of each block.
    gradient_sample: weights on which an endpoint's gradient is compared with finite differences.
    checkpoint_seconds: between checkpoints.
    keep_model: write the last endpoint's parameters.
    parallel: programs that share the machine while this one trains.
    dispatch: optimizer steps a call of the compiled program, at most.
    resident_bytes: token files of up to this size are put on the device.
    """

    log_every: int = 50
    eval_every: int = 0
    log_layers: bool = True
    gradient_sample: int = 0
    checkpoint_seconds: float = 60.0
    keep_model: bool = True
    parallel: int = 1
    dispatch: int = 1
    resident_bytes: int = 2**30
    wandb_mode: str | None = None
    wandb_project: str = "bitnet_jax"

    @property
    def slots(self) -> int:
        """Steps that the compiled program has room for.

        Never one: XLA would take that axis off, fuse otherwise and round otherwise.
        """
        return max(2, self.dispatch)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to train. config: what the user wrote, resolved, kept beside the run's identity.

    microbatches: of a step, where they are to be more than the spec's: those of a run that is made
      again, whose batch was cut for want of memory. They change how sums are rounded.
    """

    spec: RunSpec
    run_dir: Path
    config: dict[str, Any]
    microbatches: int = 0


@dataclasses.dataclass
class Progress:
    """All that a run remembers beside its training state. JSON values only.

    window: losses since the last log line. tail: the last TRAIN_LOSS_STEPS of this segment.
    skips: non-finite steps in a row; worst_skips: the most of this segment; skipped: in all.
    finite_losses: whether the losses of these were finite; collapsed: of `worst_skips`, too, where
      the loss is scaled.
    group: the ids of the runs that it was begun with.
    metrics_bytes, metrics_sha256: how much of metrics.jsonl this progress has written, and what.
    model: the fingerprint of the parameters in `model/`. origins: the distinct values of
      provenance under which the run has been trained, in order.
    idle: whether the run waits for this segment's end, since it has diverged in it.
    microbatches: of a step, more than were asked for where memory ran out; 0 before the first step.
    groups: how many runs trained as one program with it, itself included: the distinct numbers.
    rollbacks: made so far, of the trunk and all decays. shift, trunk_shift: how often the data has
      been moved on, in this segment and in the trunk that it belongs to.
    anchor: this progress at the last anchor.
    """

    tick: int = 0
    window: list[float] = dataclasses.field(default_factory=list)
    tail: list[float] = dataclasses.field(default_factory=list)
    train_loss: float | None = None
    grad_norm: float | None = None
    regularizer: float | None = None
    loss_scale: float = 1.0
    skips: int = 0
    worst_skips: int = 0
    skipped: int = 0
    finite_losses: bool = True
    collapsed: bool = False
    endpoints: list[dict] = dataclasses.field(default_factory=list)
    run_id: str = ""
    group: list[str] = dataclasses.field(default_factory=list)
    metrics_bytes: int = 0
    metrics_sha256: str | None = None
    model: str | None = None
    origins: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    wall_s: float = 0.0
    has_stash: bool = False
    idle: bool = False
    microbatches: int = 0
    groups: list[int] = dataclasses.field(default_factory=list)
    rollbacks: int = 0
    shift: int = 0
    trunk_shift: int = 0
    anchor: dict[str, Any] | None = None


class Member:
    """A run of a group while it trains. Its state is a part of the group's, which it never sees."""

    def __init__(self, job: Job, corpus: Corpus, options: LoopOptions, patiently: Patience):
        self._patiently = patiently
        self.spec, self.run_dir, self.options = job.spec, job.run_dir, options
        self._config = job.config
        self._bytes_per_token = corpus.valid_bytes_per_token
        self.batches = train_batches(
            corpus.train, self.spec.data.sequence_length, self.spec.batch_size, self.spec.seed_data
        )
        self.progress = Progress(run_id=self.spec.run_id)
        self.checkpointer = patiently(self._prepare)

    def _prepare(self) -> Checkpointer:
        if hosts.first():
            within(self.run_dir, *(self.run_dir / name for name in WRITTEN_IN_PLACE))
            self.run_dir.mkdir(parents=True, exist_ok=True)
            for directory in (self.run_dir, self.run_dir / "checkpoints"):
                remove_torn(directory)
        hosts.meet()
        return Checkpointer(self.run_dir / "checkpoints")

    @property
    def _origin(self) -> dict[str, str]:
        """Provenance; where launches differed in it, all values that there were."""
        return {key: tracking.JOINED.join(values) for key, values in self.progress.origins.items()}

    @property
    def _header(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "run_id": self.spec.run_id, **self._origin}

    def open(self, group: Sequence[str]) -> None:
        """Write the config, and open the logs, cut back to what the progress knows of.

        group: the ids of the runs that train with it. The file says with which it was begun, since
        it goes on with them after an interruption: programs of other numbers round otherwise.
        """
        for key, value in tracking.provenance(self.spec.step.mesh).items():
            known = self.progress.origins.setdefault(key, [])
            if value not in known:
                known.append(value)
        document = {**self._header, "identity": self.spec.identity(), "config": self._config}
        self.progress.group = self.progress.group or list(group)
        document["group"] = self.progress.group
        self._log: tracking.MetricsLog | tracking.NoLog = tracking.NoLog()
        self._wandb: tracking.Wandb | tracking.NoLog = self._log
        if not hosts.first():
            return
        write_json(self.run_dir / "config.json", document)
        self._log = tracking.MetricsLog(
            self.run_dir / "metrics.jsonl", self.spec.run_id, keep=self.progress.metrics_bytes
        )
        self._wandb = tracking.Wandb(
            self.options.wandb_mode,
            self.options.wandb_project,
            self.spec.run_id,
            self.run_dir,
            self._config,
        )

    @property
    def finished(self) -> bool:
        """Whether every endpoint is recorded."""
        return len(self.progress.endpoints) == len(self.spec.ends)

    def begin(self) -> None:
        """A segment begins, or begins again."""
        progress = self.progress
        progress.tail, progress.worst_skips, progress.collapsed = [], 0, False
        progress.idle = self.finished

    def jump_to(self, tick: int) -> None:
        """Leave a segment. Whatever a decay has come to, the trunk knows nothing of it."""
        progress = self.progress
        progress.tick, progress.skips = tick, 0
        progress.shift = progress.trunk_shift

    def anchor(self) -> None:
        """Remember this moment, to go back to."""
        self.progress.metrics_bytes = self._log.bytes
        self.progress.metrics_sha256 = self._log.digest
        self.progress.anchor, self.progress.has_stash = None, False
        self.progress.anchor = dataclasses.asdict(self.progress)

    def starts(self, step: int, count: int) -> np.ndarray:
        """Where the rows of `count` steps begin in the tokens [count, B].

        Each rollback moves the data on by the length of the whole run: to rows that the run has
        not seen, while the corpus has such.
        """
        return self.batches.starts(step + self.progress.shift * self.spec.ends[-1], count)

    def may_roll_back(self) -> bool:
        """Whether a divergence now is not yet the end."""
        return self.progress.rollbacks < self.spec.rollbacks

    def roll_back(self, blamed: bool, segment: Segment, done: int) -> None:
        """Go back to the anchor; one that is blamed goes on from there with other data.

        done: optimizer steps at the anchor. A run of the group that is not blamed makes the same
        steps and lines again.
        """
        now, anchor = self.progress, self.progress.anchor
        assert anchor is not None
        kept = {
            "wall_s": now.wall_s,
            "microbatches": now.microbatches,
            "groups": now.groups,
            "origins": now.origins,
            "rollbacks": now.rollbacks + blamed,
            "anchor": anchor,
        }
        self.progress = Progress(**{**anchor, **kept})
        self._log.cut(self.progress.metrics_bytes)
        if not blamed:
            return
        self.progress.shift += 1
        if not segment.is_decay:
            self.progress.trunk_shift = self.progress.shift
        cause = "collapsed" if now.collapsed else "diverged"
        self.write_text("rollback", segment, done, cause=cause, rollbacks=self.progress.rollbacks)
        self.anchor()  # so that a later rollback knows of this one

    def receive(self, metrics: dict[str, np.ndarray]) -> None:
        """Take in the metrics [K] of further steps."""
        progress = self.progress
        for loss, skips in zip(metrics["loss"], metrics["skips"], strict=True):
            progress.skips = int(skips)
            progress.skipped += int(progress.skips > 0)
            progress.finite_losses = bool(np.isfinite(loss)) and (
                progress.finite_losses or progress.skips == 0
            )
            if progress.skips > progress.worst_skips:
                progress.worst_skips = progress.skips
                scaled = self.spec.step.precision.loss_scaling
                progress.collapsed = scaled and progress.finite_losses
            if progress.skips == 0:
                progress.window.append(float(loss))
                progress.tail = [*progress.tail, float(loss)][-TRAIN_LOSS_STEPS:]
        progress.grad_norm = number(metrics["grad_norm"][-1])
        progress.loss_scale = float(metrics["loss_scale"][-1])
        if "regularizer" in metrics:
            progress.regularizer = number(metrics["regularizer"][-1])

    def diverged(self, segment: Segment, last: bool) -> bool:
        """Too many steps skipped in a row; or all of a decay, so that nothing has decayed.

        Asked at log steps, but by a segment's end the answer does not depend on where they lie.
        """
        undecayed = segment.is_decay and last and self.progress.skips >= segment.steps
        return undecayed or self.progress.worst_skips >= SKIPS_TO_DIVERGE

    def log_train(
        self,
        segment: Segment,
        done: int,
        factors: tuple[float, float],
        stats: dict[str, dict[str, Any]] | None,
        sizes: dict[str, int],
    ) -> None:
        """One line: the mean loss since the line before, and the state of optimizer and latents.

        stats, sizes: `telemetry.observe`'s, where weights are quantized.
        """
        progress, spec = self.progress, self.spec
        window = progress.window
        progress.train_loss = sum(window) / len(window) if window else None
        progress.window = []
        values = {
            "loss": progress.train_loss,
            "grad_norm": progress.grad_norm,
            "learning_rate": factors[0] * spec.peak_lr,
            "weight_decay": factors[1] * spec.weight_decay,
            "skipped_steps": progress.skipped,
        }
        if spec.step.precision.loss_scaling:
            values["loss_scale"] = progress.loss_scale
        if spec.step.regularizer != "none":
            values["regularizer"] = progress.regularizer
        if spec.phases.warmup != "none":
            values["strength"] = spec.phases.program(spec.step, done - 1, segment.decay)[1]
        if stats is not None:
            means = telemetry.summarize(stats, sizes)
            values.update({f"latent_{key}": number(value) for key, value in means.items()})
            if self.options.log_layers:
                layers = {
                    name: {key: [_short(x) for x in row] for key, row in layer.items()}
                    for name, layer in stats.items()
                }
                place = self._place(segment, done)
                self._write({"kind": "layers", **place, "layers": layers})
        self.write("train", segment, done, **values)

    def write(self, kind: str, segment: Segment, done: int, **values: float | None) -> None:
        """A line of metrics.jsonl, and the same for Weights & Biases."""
        self._write({"kind": kind, **self._place(segment, done), **values})
        numbers = {f"{kind}/{key}": value for key, value in values.items() if value is not None}
        self._wandb.log(numbers, self.progress.tick)

    def write_text(self, kind: str, segment: Segment, done: int, **values: Any) -> None:
        """A line of metrics.jsonl that is no measurement."""
        self._write({"kind": kind, **self._place(segment, done), **values})

    def _write(self, record: dict[str, Any]) -> None:
        self._patiently(lambda: self._log.write(record))

    def _place(self, segment: Segment, done: int) -> dict[str, int | None]:
        batch_tokens = self.spec.batch_tokens
        branch = segment.end * batch_tokens if segment.is_decay else None
        return {"step": done, "tokens": done * batch_tokens, "decay_to": branch}

    def record(
        self, segment: Segment, loss: float | None = None, error: float | None = None
    ) -> None:
        """An endpoint; one without a loss has diverged, or its float16 loss scale has collapsed:
        gradients overflowed at any scale, though the losses were finite."""
        tail = self.progress.tail
        lost = "collapsed" if self.progress.collapsed else "diverged"
        self.progress.endpoints.append(
            {
                "end": segment.end,
                "loss": loss,
                "loss_stderr": error,
                "bits_per_byte": None
                if loss is None
                else bits_per_byte(loss, self._bytes_per_token),
                "train_loss": sum(tail) / len(tail) if tail and loss is not None else None,
                "unique_tokens": self.batches.unique_tokens(segment.end),
                "status": lost if loss is None else "ok",
                "wall_s": self.progress.wall_s,
            }
        )

    def restore(self, tick: int, like: TrainState) -> tuple[TrainState, TrainState | None]:
        """The state of a checkpoint, and that set aside while a branch decays.

        Raises:
          DamagedCheckpoint: it, or the log that it goes on from, is not what was written.
        """
        state, stash, saved = self.checkpointer.restore(tick, like)
        try:
            # One from before schema version 2 does not say whose it is.
            progress = Progress(**{"run_id": self.spec.run_id, **saved})
        except TypeError as error:
            raise DamagedCheckpoint("progress: it has other keys than this code's") from error
        if (progress.run_id, progress.tick) != (self.spec.run_id, tick):
            whose = f"{progress.run_id} at tick {progress.tick}"
            raise DamagedCheckpoint(f"progress: it is that of {whose}")
        known, size = progress.metrics_sha256, progress.metrics_bytes
        if hosts.first() and not tracking.log_begins(self.run_dir / "metrics.jsonl", size, known):
            raise DamagedCheckpoint(f"metrics.jsonl does not begin with the {size} bytes it had")
        self.progress = progress
        return state, stash

    def forget(self) -> None:
        """What a checkpoint told that its group cannot go on from."""
        self.progress = Progress(run_id=self.spec.run_id)

    def save(self, state: TrainState, stash: TrainState | None) -> None:
        """A checkpoint of this moment, written in the background if there is room."""
        self._patiently(self._log.sync)
        self.progress.metrics_bytes = self._log.bytes
        self.progress.metrics_sha256 = self._log.digest
        self.progress.has_stash = stash is not None
        moment = self.progress.tick, state, stash, dataclasses.asdict(self.progress)
        self._patiently(lambda: self.checkpointer.save(*moment))

    def summarize(self) -> dict[str, Any]:
        """Write and return the summary: status `ok`, `diverged` or `collapsed`, and a row an
        endpoint."""
        rows = [endpoint_row(self.spec, e, self._origin) for e in self.progress.endpoints]
        failed = [row["status"] for row in rows if row["status"] != "ok"]
        summary = {
            **self._header,
            "status": failed[0] if failed else "ok",
            "skipped_steps": self.progress.skipped,
            "rollbacks": self.progress.rollbacks,
            "microbatches": self.progress.microbatches,
            "groups": self.progress.groups,
            "wall_s": self.progress.wall_s,
            "total_flops": float(self.spec.total_flops),
            "metrics": {"bytes": self._log.bytes, "sha256": self._log.digest},
            "model": self.progress.model,
            "endpoints": rows,
        }
        if hosts.first():
            write_json(self.run_dir / "summary.json", summary)
        return summary

    def close(self) -> None:
        """Wait for what is being written. Called whatever happened, also before `open`."""
        try:
            self.checkpointer.close()
        except Exception as error:
            if not is_full(error):
                raise
            last = "the disk is full: the last checkpoint was not written, the one before it stays"
            print(f"warning: {self.spec.run_id}: {last}", file=sys.stderr, flush=True)
        for log in (getattr(self, "_log", None), getattr(self, "_wandb", None)):
            if log is not None:
                log.close()


def number(value: Any) -> float | None:
    """A JSON number; None for what JSON cannot hold."""
    return float(value) if np.isfinite(value) else None


def _short(value: Any) -> float | None:
    """The same to five digits: a line holds hundreds of these."""
    return float(f"{value:.5g}") if np.isfinite(value) else None
