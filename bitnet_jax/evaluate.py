"""Held-out loss of a model."""

import math

import jax
import numpy as np
from jaxtyping import Int32

from bitnet_jax.programs import compiled_eval
from bitnet_jax.train_step import StepConfig


def held_out_loss(
    program: StepConfig, params: dict, rows: Int32[np.ndarray, "rows T1"], batch_size: int
) -> tuple[float, float]:
    """Mean loss and its standard error, nats a token, over validation rows [., T+1].

    The error treats rows as independent; it is NaN for a single one. Every batch has `batch_size`
    rows, the last filled up with copies that are not counted.
    """
    every_run = jax.tree.map(lambda x: x[None], params)
    return held_out_losses(program, 1, every_run, rows, batch_size)[0]


def held_out_losses(
    program: StepConfig,
    runs: int,
    params: dict,
    rows: Int32[np.ndarray, "rows T1"],
    batch_size: int,
) -> list[tuple[float, float]]:
    """`held_out_loss` of each of several runs, whose parameters have a leading runs axis."""
    evaluate = compiled_eval(program, runs)
    short = -len(rows) % batch_size
    filled = np.concatenate([rows, np.repeat(rows[-1:], short, axis=0)])
    batches = filled.reshape(-1, batch_size, rows.shape[1])
    nats = jax.device_get([evaluate(params, batch) for batch in batches])
    return [_mean(run) for run in np.concatenate(nats, axis=1)[:, : len(rows)]]


def _mean(nats: np.ndarray) -> tuple[float, float]:
    nats = nats.astype(np.float64)
    error = nats.std(ddof=1) / math.sqrt(len(nats)) if len(nats) > 1 else math.nan
    return float(nats.mean()), float(error)
