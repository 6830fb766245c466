"""The training loop: a resolved run in, endpoints out, and nothing lost in between."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import telemetry, tracking
from bitnet_jax.checkpoint import Checkpointer, save_model
from bitnet_jax.data import Corpus, train_batches, validation_rows
from bitnet_jax.evaluate import held_out_loss
from bitnet_jax.gradient_check import estimator_cosine
from bitnet_jax.loss import bits_per_byte
from bitnet_jax.results import endpoint_row
from bitnet_jax.spec import RunSpec
from bitnet_jax.train_step import (
    StepConfig,
    TrainState,
    compiled_init,
    compiled_train_step,
)
from bitnet_jax.trajectory import Segment, locate, total_ticks

# So many non-finite steps in a row end a segment: more than the halvings of a float16 loss scale
# from 2^15 to 1, so an arm is not called diverged for finding its scale.
SKIPS_TO_DIVERGE = 25

# An endpoint's train_loss is the mean over so many last steps of its decay, however it was logged.
TRAIN_LOSS_STEPS = 50


class Interrupted(Exception):
    """The run was asked to stop; a checkpoint of this moment has been written."""


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """What a run does beside training. None of it can change a result.

    log_every, eval_every: optimizer steps; 0 evaluates at endpoints only.
    log_layers: a further line with the statistics of each projection of each block.
    gradient_sample: weights on which an endpoint's gradient is compared with finite differences.
    checkpoint_seconds: between checkpoints.
    keep_model: write the last endpoint's parameters.
    """

    log_every: int = 50
    eval_every: int = 0
    log_layers: bool = True
    gradient_sample: int = 0
    checkpoint_seconds: float = 60.0
    keep_model: bool = True
    wandb_mode: str | None = None
    wandb_project: str = "bitnet_jax"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a watcher is told at every log step; the rate is None until it is known."""

    tick: int
    total_ticks: int
    loss: float | None
    tokens_per_s: float | None


@dataclasses.dataclass
class Progress:
    """All that a run remembers beside its training state. JSON values only.

    window: losses since the last log line. tail: the last TRAIN_LOSS_STEPS of this segment.
    skips: non-finite steps in a row; worst_skips: the most of this segment; skipped: in all.
    metrics_bytes: how much of metrics.jsonl this progress has written.
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
    endpoints: list[dict] = dataclasses.field(default_factory=list)
    metrics_bytes: int = 0
    wall_s: float = 0.0
    has_stash: bool = False


def train_and_evaluate(
    spec: RunSpec,
    corpus: Corpus,
    run_dir: Path,
    options: LoopOptions,
    config: dict[str, Any],
    watch: Callable[[Report], None] = lambda report: None,
    should_stop: Callable[[int], bool] = lambda tick: False,
) -> dict[str, Any]:
    """Train a run to its last endpoint, from its newest checkpoint if it has one.

    config: what the user wrote, resolved, kept in config.json beside the run's identity.
    watch: called at every log step. should_stop: asked before every step.
    Returns the summary, as in summary.json: status `ok` or `diverged`, and a row an endpoint.

    Raises:
      Interrupted: should_stop said so; calling again goes on from there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    origin = tracking.provenance()
    header = {"schema_version": tracking.SCHEMA_VERSION, "run_id": spec.run_id, **origin}
    tracking.write_json(
        run_dir / "config.json", {**header, "identity": spec.identity(), "config": config}
    )
    loop = _Loop(spec, corpus, run_dir, options, config)
    try:
        loop.run(watch, should_stop)
    finally:
        loop.close()
    rows = [endpoint_row(spec, e, origin) for e in loop.progress.endpoints]
    failed = [row["status"] for row in rows if row["status"] != "ok"]
    summary = {
        **header,
        "status": failed[0] if failed else "ok",
        "skipped_steps": loop.progress.skipped,
        "wall_s": loop.progress.wall_s,
        "total_flops": float(spec.total_flops),
        "endpoints": rows,
    }
    tracking.write_json(run_dir / "summary.json", summary)
    return summary


class _Loop:
    """One run while it trains. `state` is what the next step starts from."""

    def __init__(
        self, spec: RunSpec, corpus: Corpus, run_dir: Path, options: LoopOptions, config: dict
    ):
        self.spec, self.options, self.run_dir = spec, options, run_dir
        self.segments = spec.segments
        self.batches = train_batches(
            corpus.train, spec.data.sequence_length, spec.batch_size, spec.seed_data
        )
        self.rows = validation_rows(corpus.valid, spec.data.sequence_length, spec.data.eval_tokens)
        self.bytes_per_token = corpus.valid_bytes_per_token
        self.state: TrainState = compiled_init(spec.step)(spec.seed_init)
        self.stash: TrainState | None = None
        self.progress = Progress()
        self.checkpointer = Checkpointer(run_dir / "checkpoints")
        restored = self.checkpointer.restore_latest(self.state)
        if restored:
            self.state, self.stash, progress = restored
            self.progress = Progress(**progress)
        self.pending: list[dict[str, jax.Array]] = []  # metrics not yet fetched
        self.log = tracking.MetricsLog(run_dir / "metrics.jsonl", keep=self.progress.metrics_bytes)
        self.wandb = tracking.Wandb(
            options.wandb_mode, options.wandb_project, spec.run_id, run_dir, config
        )

    def run(self, watch: Callable[[Report], None], should_stop: Callable[[int], bool]) -> None:
        """Make every remaining tick. Metrics are fetched at log steps, so that no step waits."""
        self.clock = self.last_save = self.last_report = time.monotonic()
        self.reported_tick: int | None = None  # the first interval holds compilation: no rate
        while self.progress.tick < total_ticks(self.segments):
            if should_stop(self.progress.tick):
                self._save()
                raise Interrupted(self.spec.run_id)
            index, step = locate(self.segments, self.progress.tick)
            segment = self.segments[index]
            if step == segment.start:
                self._begin(segment)
            factors = self.spec.schedule.factors(step, segment.decay)
            self._remember(step, segment)
            self._dispatch(step, segment, *factors)
            done, last = step + 1, step + 1 == segment.end
            # Before the checkpoint below, which would otherwise not know of this line.
            if self.options.eval_every and done % self.options.eval_every == 0 and not last:
                valid_loss = self._evaluate(self._evaluated(step, segment))[0]
                self._write("eval", segment, done, valid_loss=valid_loss)
            if done % self.options.log_every == 0 or last:
                self._log_train(segment, done, *factors)
                watch(self._report())
                diverged = self._has_diverged(segment, last)
                if segment.is_decay and (last or diverged):
                    self._finish_decay(index, diverged)
                elif diverged:
                    self._give_up(index)
                elif time.monotonic() - self.last_save > self.options.checkpoint_seconds:
                    self._save()

    def _begin(self, segment: Segment) -> None:
        self.progress.tail, self.progress.worst_skips = [], 0
        if segment.is_decay:
            # The step donates its input, so what is set aside must be a copy.
            self.stash = jax.tree.map(jnp.copy, self.state)

    def _has_diverged(self, segment: Segment, last: bool) -> bool:
        """Too many steps skipped in a row; or all of a decay, so that nothing has decayed.

        Asked at log steps, but by a segment's end the answer does not depend on where they lie.
        """
        undecayed = segment.is_decay and last and self.progress.skips >= segment.steps
        return undecayed or self.progress.worst_skips >= SKIPS_TO_DIVERGE

    def _remember(self, step: int, segment: Segment) -> None:
        """Before the last two steps of a log interval, keep the codes that they start from."""
        every = self.options.log_every
        next_log = min((step // every + 1) * every, segment.end)
        if self.spec.step.precision.quantized and next_log - step <= 2:
            snapshots = telemetry.remember(
                self.state.snapshots, self.state.params, self.spec.step.precision
            )
            self.state = self.state.replace(snapshots=snapshots)

    def _dispatch(self, step: int, segment: Segment, lr_factor: float, decay_factor: float) -> None:
        learning_rate = np.float32(lr_factor * self.spec.peak_lr)
        weight_decay = np.float32(decay_factor * self.spec.weight_decay)
        program, strength = self.spec.phases.program(self.spec.step, step, segment.decay)
        self.state, metrics = compiled_train_step(program)(
            self.state, self.batches[step], learning_rate, weight_decay, np.float32(strength)
        )
        self.pending.append(metrics)
        self.progress.tick += 1

    def _drain(self) -> None:
        """Fetch what is pending into the progress."""
        progress = self.progress
        for metrics in jax.device_get(self.pending):
            progress.skips = int(metrics["skips"])
            progress.worst_skips = max(progress.worst_skips, progress.skips)
            progress.skipped += int(progress.skips > 0)
            progress.grad_norm = _number(metrics["grad_norm"])
            if "regularizer" in metrics:
                progress.regularizer = _number(metrics["regularizer"])
            progress.loss_scale = float(metrics["loss_scale"])
            if progress.skips == 0:
                progress.window.append(float(metrics["loss"]))
                progress.tail = [*progress.tail, float(metrics["loss"])][-TRAIN_LOSS_STEPS:]
        self.pending = []

    def _log_train(self, segment: Segment, done: int, lr_factor: float, decay: float) -> None:
        """One line: the mean loss since the line before, and the state of the optimizer."""
        self._drain()
        progress, step = self.progress, self.spec.step
        window = progress.window
        progress.train_loss = sum(window) / len(window) if window else None
        progress.window = []
        values = {
            "loss": progress.train_loss,
            "grad_norm": progress.grad_norm,
            "learning_rate": lr_factor * self.spec.peak_lr,
            "weight_decay": decay * self.spec.weight_decay,
            "skipped_steps": progress.skipped,
        }
        if step.precision.loss_scaling:
            values["loss_scale"] = progress.loss_scale
        if step.regularizer != "none":
            values["regularizer"] = progress.regularizer
        if self.spec.phases.warmup != "none":
            values["strength"] = self.spec.phases.program(step, done - 1, segment.decay)[1]
        if step.precision.quantized:
            self._log_latents(segment, done, values)
        self._write("train", segment, done, **values)

    def _log_latents(self, segment: Segment, done: int, values: dict[str, float | None]) -> None:
        """Add the latents' statistics to a train line, and write the line of the layers."""
        snapshots, stats = telemetry.observe(
            self.state.snapshots, self.state.params, self.spec.step.precision
        )
        self.state = self.state.replace(snapshots=snapshots)
        stats = jax.device_get(stats)
        sizes = {name: codes[0].size for name, codes in snapshots.logged.items()}
        means = telemetry.summarize(stats, sizes)
        values.update({f"latent_{key}": _number(value) for key, value in means.items()})
        if self.options.log_layers:
            layers = {
                name: {key: [_short(x) for x in row] for key, row in layer.items()}
                for name, layer in stats.items()
            }
            self.log.write({"kind": "layers", **self._place(segment, done), "layers": layers})

    def _write(self, kind: str, segment: Segment, done: int, **values: float | None) -> None:
        self.log.write({"kind": kind, **self._place(segment, done), **values})
        numbers = {f"{kind}/{key}": value for key, value in values.items() if value is not None}
        self.wandb.log(numbers, self.progress.tick)

    def _place(self, segment: Segment, done: int) -> dict[str, int | None]:
        branch = segment.end * self.spec.batch_tokens if segment.is_decay else None
        return {"step": done, "tokens": done * self.spec.batch_tokens, "decay_to": branch}

    def _report(self) -> Report:
        now, tick = time.monotonic(), self.progress.tick
        ticks = tick - self.reported_tick if self.reported_tick is not None else None
        rate = ticks * self.spec.batch_tokens / (now - self.last_report) if ticks else None
        self.last_report, self.reported_tick = now, tick
        return Report(tick, total_ticks(self.segments), self.progress.train_loss, rate)

    def _evaluated(self, step: int, segment: Segment) -> StepConfig:
        """The arm of this step, with all its quantization."""
        program, _ = self.spec.phases.program(self.spec.step, step, segment.decay)
        return dataclasses.replace(program, warming=False)

    def _evaluate(self, program: StepConfig) -> tuple[float | None, float | None]:
        """Held-out loss and its standard error; None where they are not finite."""
        values = held_out_loss(program, self.state.params, self.rows, self.spec.batch_size)
        return _number(values[0]), _number(values[1])

    def _finish_decay(self, index: int, diverged: bool) -> None:
        """Record the endpoint and put the trunk back."""
        segment = self.segments[index]
        loss, error = (None, None) if diverged else self._evaluate(self.spec.deployed)
        self._record(segment, loss, error)
        values = {"valid_loss": loss, "valid_loss_stderr": error}
        if self.options.gradient_sample and self.spec.step.precision.quantized and loss is not None:
            values["gradient_cosine"] = self._gradient_cosine()
        self._write("endpoint", segment, segment.end, **values)
        last = segment.end == self.spec.ends[-1]
        if self.options.keep_model and last and loss is not None:
            save_model(self.run_dir, self.state.params)
        assert self.stash is not None
        self.state, self.stash = self.stash, None
        self._jump_to(index + 1)

    def _gradient_cosine(self) -> float | None:
        """On the first held-out rows, and weights drawn by the run's seed."""
        rows, seed = self.rows[: self.spec.batch_size], self.spec.seed_init
        sample = self.options.gradient_sample
        cosine = estimator_cosine(self.spec.deployed, sample, self.state.params, rows, seed)
        return _number(cosine)

    def _give_up(self, index: int) -> None:
        """The trunk diverged: so has every endpoint that would have come of it."""
        for segment in self.segments[index:]:
            if segment.is_decay:
                self._record(segment, None, None)
        self._jump_to(len(self.segments))

    def _record(self, segment: Segment, loss: float | None, error: float | None) -> None:
        bits = bits_per_byte(loss, self.bytes_per_token) if loss is not None else None
        tail = self.progress.tail
        self.progress.endpoints.append(
            {
                "end": segment.end,
                "loss": loss,
                "loss_stderr": error,
                "bits_per_byte": bits,
                "train_loss": sum(tail) / len(tail) if tail and loss is not None else None,
                "unique_tokens": self.batches.unique_tokens(segment.end),
                "status": "diverged" if loss is None else "ok",
                "wall_s": self._wall_s(),
            }
        )

    def _jump_to(self, index: int) -> None:
        self.progress.tick = total_ticks(self.segments[:index])
        self.progress.skips = 0

    def _wall_s(self) -> float:
        """Seconds of training so far, over all launches."""
        now = time.monotonic()
        self.progress.wall_s += now - self.clock
        self.clock = now
        return self.progress.wall_s

    def _save(self) -> None:
        self._drain()
        self._wall_s()
        self.progress.metrics_bytes = self.log.bytes
        self.progress.has_stash = self.stash is not None
        values = dataclasses.asdict(self.progress)
        self.checkpointer.save(self.progress.tick, self.state, self.stash, values)
        self.last_save = time.monotonic()

    def close(self) -> None:
        self.checkpointer.close()
        self.log.close()
        self.wandb.close()


def _number(value: Any) -> float | None:
    """A JSON number; None for what JSON cannot hold."""
    return float(value) if np.isfinite(value) else None


def _short(value: Any) -> float | None:
    """The same to five digits: a line holds hundreds of these."""
    return float(f"{value:.5g}") if np.isfinite(value) else None
