"""Batches: training rows in a random order that is a pure function of the step, and fixed ones.

Row i of T + 1 tokens begins at token i * T: the last target of a row is the first input of the
next, so that every token but the first is a target exactly once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Int32, Int64, Integer

from bitnet_jax.data.errors import DataError


class TrainBatches:
    """`batches[step]` is the int32 [B, T + 1] batch of a step, the same whenever it is asked for.

    Every epoch visits each row once, in an own order; a batch may span two epochs.
    """

    def __init__(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        sequence_length: int,
        batch_size: int,
        seed: int,
    ):
        self.rows_per_epoch = _rows(tokens, sequence_length, "training")
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self._tokens = tokens
        # grain shuffles epoch e by seed + e: with plain seeds, the second epoch of seed 0 would
        # be the first of seed 1. Hashed seeds lie far apart.
        grain_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        # Only indices go through grain: one gather of the rows is faster than one read a row.
        self._order = grain.MapDataset.range(self.rows_per_epoch).shuffle(grain_seed).repeat()

    def __getitem__(self, step: int) -> Int32[np.ndarray, "B T+1"]:
        return _gather(self._tokens, self.starts(step, 1)[0], self.sequence_length)

    def starts(self, step: int, steps: int) -> Int64[np.ndarray, "steps B"]:
        """Where the rows of the batches of steps [step, step + steps) begin in the tokens."""
        if step < 0:
            raise IndexError(f"step {step}: batches are numbered from 0")
        first = step * self.batch_size
        rows = [self._order[i] for i in range(first, first + steps * self.batch_size)]
        return np.array(rows, np.int64).reshape(steps, -1) * self.sequence_length

    def unique_tokens(self, step: int) -> int:
        """Target tokens seen in `step` batches, each counted once."""
        return min(step * self.batch_size, self.rows_per_epoch) * self.sequence_length


class RowReader:
    """Rows of tokens as a program reads them: an array of tokens, and where its rows begin.

    Token files of up to `resident_bytes` are put on the device once, and only where rows begin is
    sent after that. Of larger ones, the rows of each call are gathered here and sent.
    """

    def __init__(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        sequence_length: int,
        resident_bytes: int,
        put: Callable[[np.ndarray], Any] = jax.device_put,
    ):
        # Where rows begin is an int32 on the device.
        self.resident = tokens.nbytes <= resident_bytes and len(tokens) <= 2**31
        self._tokens = put(np.asarray(tokens)) if self.resident else tokens
        self._sequence_length = sequence_length

    def __call__(self, starts: Int64[np.ndarray, "*B"]) -> tuple[Any, Int32[np.ndarray, "*B"]]:
        """Tokens, and where the rows at `starts` of the file begin in them."""
        if self.resident:
            return self._tokens, starts.astype(np.int32)
        length = self._sequence_length + 1
        rows = self._tokens[starts.reshape(-1, 1) + np.arange(length)]
        begins = np.arange(starts.size, dtype=np.int32) * length
        return rows.reshape(-1), begins.reshape(starts.shape)


def train_batches(
    tokens: Integer[np.ndarray, " tokens"], sequence_length: int, batch_size: int, seed: int
) -> TrainBatches:
    """Batches of `batch_size` rows of `sequence_length` inputs and targets.

    Raises:
      DataError: fewer tokens than one row takes.
    """
    return TrainBatches(tokens, sequence_length, batch_size, seed)


def validation_rows(
    tokens: Integer[np.ndarray, " tokens"], sequence_length: int, max_tokens: int | None = None
) -> Int32[np.ndarray, "rows T+1"]:
    """Rows spread evenly over the whole validation text, the same in every run.

    Args:
      max_tokens: an upper bound of the targets, at least one row; None or 0 for all.

    Raises:
      DataError: fewer tokens than one row takes.
    """
    starts = _validation_starts(tokens, sequence_length, max_tokens)
    return _gather(tokens, starts, sequence_length)


def validation_positions(
    tokens: Integer[np.ndarray, " tokens"], sequence_length: int, max_tokens: int | None = None
) -> Int64[np.ndarray, "rows T"]:
    """The index in `tokens` of every target of `validation_rows` with the same arguments."""
    starts = _validation_starts(tokens, sequence_length, max_tokens)
    return starts[:, None] + 1 + np.arange(sequence_length)


def _validation_starts(tokens: np.ndarray, sequence_length: int, max_tokens: int | None):
    total = _rows(tokens, sequence_length, "validation")
    rows = min(total, max(1, max_tokens // sequence_length)) if max_tokens else total
    return np.arange(rows) * total // rows * sequence_length


def _rows(tokens: np.ndarray, sequence_length: int, split: str) -> int:
    rows = (len(tokens) - 1) // sequence_length
    if rows < 1:
        raise DataError(
            f"the {split} data has {len(tokens)} tokens: a row of sequence_length="
            f"{sequence_length} takes {sequence_length + 1}; shorten it or use more text"
        )
    return rows


def _gather(tokens: np.ndarray, starts: np.ndarray, sequence_length: int) -> np.ndarray:
    return tokens[starts[:, None] + np.arange(sequence_length + 1)].astype(np.int32)
