"""Held-out loss of a model."""

import math

import jax
import numpy as np
from jaxtyping import Int32

from bitnet_jax.train_step import StepConfig, compiled_eval_step


def held_out_loss(
    program: StepConfig, params: dict, rows: Int32[np.ndarray, "rows T1"], batch_size: int
) -> tuple[float, float]:
    """Mean loss and its standard error, nats a token, over validation rows [., T+1].

    The error treats rows as independent; it is NaN for a single one. Every batch has `batch_size`
    rows, the last filled up with copies that are not counted.
    """
    evaluate = compiled_eval_step(program)
    short = -len(rows) % batch_size
    filled = np.concatenate([rows, np.repeat(rows[-1:], short, axis=0)])
    batches = filled.reshape(-1, batch_size, rows.shape[1])
    nats = np.concatenate(jax.device_get([evaluate(params, batch) for batch in batches]))
    nats = nats[: len(rows)].astype(np.float64)
    error = nats.std(ddof=1) / math.sqrt(len(nats)) if len(nats) > 1 else math.nan
    return float(nats.mean()), float(error)
