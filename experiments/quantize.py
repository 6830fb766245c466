"""Can a trained 16-bit model be quantized to trits? A command and a number.

    python -m experiments.quantize --run=results/single/runs/RUN_ID

Evaluates the run's last model on its held-out text: as it was trained; with its weights rounded by
each of several quantizers, directly; and with scales calibrated on training batches, the weights
themselves staying as they are. Embedding, head and norms stay as they are too.

Options: --weights=NAME,NAME (bitnet_jax/quantize.py)  --granularity=tensor,channel
--activations=none|int8_absmax  --steps=N (of calibration; 0 for none)  --json
Exit status: 0, or 2 with one line for what cannot be done.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from rich.table import Table

from bitnet_jax.data import DataError, train_batches, validation_rows
from bitnet_jax.errors import ConfigError, choose
from bitnet_jax.evaluate import held_out_loss
from bitnet_jax.latents import latents
from bitnet_jax.loss import bits_per_byte
from bitnet_jax.model import with_linear_layers
from bitnet_jax.precision import Precision, get_precision, granularity
from bitnet_jax.train_step import eval_step
from experiments import display
from experiments.run import quiet_libraries
from experiments.runs import FinishedRun, load_run

WEIGHTS = ("int8_absmax", "int4_absmax", "ternary_absmean", "ternary_twn", "ternary_optimal")
CALIBRATION_RATE = 0.02  # of Adam on the logarithm of each scale


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    options = _parser().parse_args(argv)
    quiet_libraries()
    try:
        document = _measure(options)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(_without_nan(document), indent=1, allow_nan=False))
    else:
        _show(document)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--weights", default=",".join(WEIGHTS))
    parser.add_argument("--granularity", default="tensor,channel")
    parser.add_argument("--activations", default="none")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    return parser


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.steps < 0:
        raise ConfigError(f"steps={options.steps}: it must not be negative")
    run = load_run(options.run)
    arms = list(_arms(run, options))  # so that a mistake is met before anything is evaluated
    trained = _evaluate(run, run.spec.deployed.precision, run.params)
    rows = [_row(run, "as trained", None, False, trained)]
    for arm in arms:
        rows.append(_row(run, arm.weights, arm, False, _evaluate(run, arm, run.params)))
    if options.steps:
        for kind in options.granularity.split(","):
            arm, params = calibrate(run, kind, options.activations, options.steps)
            rows.append(_row(run, "ternary", arm, True, _evaluate(run, arm, params)))
    for row in rows:
        row["difference"] = row["loss"] - rows[0]["loss"]
    return {"run_id": run.spec.run_id, "calibration_steps": options.steps, "results": rows}


def _without_nan(value: Any) -> Any:
    """JSON has no NaN, which the error of a single row is: null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _arms(run: FinishedRun, options: argparse.Namespace) -> Iterator[Precision]:
    for kind in options.granularity.split(","):
        choose("granularity", kind, ("tensor", "channel"))
        for name in options.weights.split(","):
            arm = _arm(run, name, kind, options.activations)
            if arm.weight_quantizer.learned:
                raise ConfigError(
                    f"weights={name!r}: its scales are learned, which calibration does to "
                    "ternary ones: --steps; without it, take one whose scale follows from the "
                    "weights"
                )
            yield arm


def _arm(run: FinishedRun, weights: str, kind: str, activations: str) -> Precision:
    """The run's arm with its weights quantized after the fact."""
    own = run.spec.step.precision
    if own.quantized:
        raise ConfigError(
            f"run={str(run.directory)!r}: its weights are {own.weights} already; give a run of "
            "fp16, bf16 or fp32"
        )
    return get_precision(
        own.name.split("+")[0],
        weights=weights,
        activations=activations,
        granularity=granularity(kind, None),
        rotate=own.rotate,  # what the kernels were trained on
    )


def _evaluate(run: FinishedRun, arm: Precision, params: dict) -> tuple[float, float]:
    spec = run.spec
    rows = validation_rows(run.corpus.valid, spec.data.sequence_length, spec.data.eval_tokens)
    program = dataclasses.replace(spec.step, precision=arm)
    return held_out_loss(program, params, rows, spec.batch_size)


def calibrate(
    run: FinishedRun, kind: str, activations: str, steps: int
) -> tuple[Precision, dict[str, Any]]:
    """Scales of ternary weights that the loss on training batches prefers; all else is held.

    They start at the least squared error for normal weights, and Adam moves their logarithms along
    the gradient of a learned scale (`estimators.step_gradient`) for so many of the run's own
    batches. A scale also decides which weights become 0, at half of it.
    """
    arm = _arm(run, "ternary_lsq", kind, activations)
    start = latents(run.params, _arm(run, "ternary_optimal", kind, activations))
    scales = {name: latent.scale for name, latent in start.items()}
    program = dataclasses.replace(run.spec.step, precision=arm)
    optimizer = optax.adam(CALIBRATION_RATE)
    factors = jax.tree.map(jnp.zeros_like, scales)  # logarithms
    state = optimizer.init(factors)
    batches = train_batches(
        run.corpus.train, run.spec.data.sequence_length, run.spec.batch_size, run.spec.seed_data
    )

    @jax.jit
    def step(factors: dict, state: Any, tokens: Array) -> tuple[dict, Any]:
        def loss(factors: dict) -> Array:
            return eval_step(program, _scaled(run.params, scales, factors), tokens).mean()

        gradients = jax.grad(loss)(factors)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(factors, updates), state

    for index in range(steps):
        factors, state = step(factors, state, np.asarray(batches[index]))
    return arm, _scaled(run.params, scales, factors)


def _scaled(params: dict, scales: dict, factors: dict) -> dict:
    """The parameters with a learned scale beside every kernel."""
    steps = {name: {"step": scale * jnp.exp(factors[name])} for name, scale in scales.items()}
    return with_linear_layers(params, steps)


def _row(
    run: FinishedRun, label: str, arm: Precision | None, calibrated: bool, loss: tuple[float, float]
) -> dict[str, Any]:
    return {
        "weights": label,
        "granularity": arm.granularity.kind if arm else None,
        "activations": (arm or run.spec.deployed.precision).activations,
        "calibrated": calibrated,
        "loss": loss[0],
        "loss_stderr": loss[1],
        "bits_per_byte": bits_per_byte(loss[0], run.corpus.valid_bytes_per_token),
    }


def _show(document: dict[str, Any]) -> None:
    table = Table(title=f"{document['run_id']}: quantized after training", title_justify="left")
    for column in ("weights", "a scale a", "activations", "scales"):
        table.add_column(column)
    for column in ("loss, nats", "difference", "bits/byte"):
        table.add_column(column, justify="right")
    for row in document["results"]:
        table.add_row(
            row["weights"],
            row["granularity"] or "-",
            row["activations"],
            "calibrated" if row["calibrated"] else "direct" if row["granularity"] else "-",
            f"{row['loss']:.4f} ± {row['loss_stderr']:.4f}",
            f"{row['difference']:+.4f}",
            f"{row['bits_per_byte']:.3f}",
        )
    display.console().print(table)


if __name__ == "__main__":
    sys.exit(main())
