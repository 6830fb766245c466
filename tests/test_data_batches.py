"""Batches: a pure function of (seed, step), every row once an epoch; fixed validation rows."""

import numpy as np
import pytest

from bitnet_jax.data import (
    DataError,
    RowReader,
    train_batches,
    validation_positions,
    validation_rows,
)

T, B = 8, 4
TOKENS = np.arange(8 * T + 3, dtype=np.uint16)  # its own index: a row names its start


def row_starts(batches, first_row, rows):
    """The start of each row in the order of presentation."""
    steps = range(first_row // B, (first_row + rows) // B)
    return np.concatenate([batches[step][:, 0] for step in steps])


def test_rows_are_shifted_by_one_and_consecutive():
    batch = train_batches(TOKENS, T, B, seed=0)[3]
    assert batch.shape == (B, T + 1) and batch.dtype == np.int32
    np.testing.assert_array_equal(np.diff(batch, axis=1), 1)
    assert (batch[:, 0] % T == 0).all()


def test_pure_function_of_seed_and_step():
    ahead, again = train_batches(TOKENS, T, B, seed=5), train_batches(TOKENS, T, B, seed=5)
    backwards = [ahead[step] for step in reversed(range(10))][::-1]
    for step in range(10):
        np.testing.assert_array_equal(backwards[step], again[step])


@pytest.mark.parametrize("step, steps", [(0, 1), (0, 7), (3, 4), (11, 1)])
def test_starts_are_those_of_the_batches(step, steps):
    """Across the borders of epochs, too: an epoch of these is two batches."""
    batches = train_batches(TOKENS, T, B, seed=3)
    starts = batches.starts(step, steps)
    assert starts.shape == (steps, B) and starts.dtype == np.int64
    for row, i in zip(starts, range(step, step + steps), strict=True):
        np.testing.assert_array_equal(row, batches[i][:, 0])
    with pytest.raises(IndexError):
        batches.starts(-1, 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_a_reader_gives_the_same_rows_wherever_the_tokens_lie(dtype):
    """On the device from so many bytes on, of a whole file or of what a call wants."""
    tokens = np.random.default_rng(0).integers(0, 250, 8 * T + 3).astype(dtype)
    starts = train_batches(tokens, T, B, seed=0).starts(0, 6).reshape(2, 3, B)
    expected = tokens[starts[..., None] + np.arange(T + 1)]
    for size, resident in ((tokens.nbytes, True), (tokens.nbytes - 1, False), (0, False)):
        reader = RowReader(tokens, T, size)
        assert reader.resident == resident
        given, begins = reader(starts)
        assert begins.shape == starts.shape and begins.dtype == np.int32
        assert given.dtype == dtype and given.ndim == 1
        assert given.size == (tokens.size if resident else starts.size * (T + 1))
        found = np.asarray(given)[begins[..., None] + np.arange(T + 1)]
        np.testing.assert_array_equal(found, expected)


def test_a_reader_of_a_file_on_disk(tmp_path):
    """What is not resident is read where it is wanted, of a file far larger than the call's rows"""
    np.arange(5000 * T + 1, dtype=np.uint16).tofile(tmp_path / "tokens")
    tokens = np.memmap(tmp_path / "tokens", np.uint16, "r")
    starts = np.array([[0, 4999 * T], [17 * T, 17 * T]])
    for size in (0, 2**20):
        given, begins = RowReader(tokens, T, size)(starts)
        rows = np.asarray(given)[begins[..., None] + np.arange(T + 1)]
        np.testing.assert_array_equal(rows, starts[..., None] + np.arange(T + 1))


def test_every_epoch_covers_every_row_once_in_an_own_order():
    batches = train_batches(TOKENS, T, B, seed=1)
    assert batches.rows_per_epoch == 8
    orders = [row_starts(batches, 8 * epoch, 8) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(8) * T)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])


def test_batches_that_span_epochs():
    tokens = np.arange(6 * T + 1)  # 6 rows in batches of 4: the second batch spans two epochs
    starts = row_starts(train_batches(tokens, T, B, seed=2), 0, 12)
    np.testing.assert_array_equal(np.sort(starts), np.repeat(np.arange(6) * T, 2))
    assert len(set(starts[:6])) == 6


def test_no_epoch_of_one_seed_is_an_epoch_of_the_next():
    """grain alone would shuffle epoch 1 of seed 0 as epoch 0 of seed 1."""
    tokens = np.arange(64 * T + 1)
    first, second = (train_batches(tokens, T, B, seed) for seed in (0, 1))
    assert not np.array_equal(row_starts(first, 64, 64), row_starts(second, 0, 64))
    assert not np.array_equal(row_starts(first, 0, 64), row_starts(second, 0, 64))


def test_unique_tokens():
    batches = train_batches(TOKENS, T, B, seed=0)
    assert [batches.unique_tokens(step) for step in range(4)] == [0, 4 * T, 8 * T, 8 * T]


@pytest.mark.parametrize(("tokens", "rows"), [(T, 0), (T + 1, 1), (2 * T, 1), (2 * T + 1, 2)])
def test_exact_lengths(tokens, rows):
    if rows:
        assert train_batches(np.zeros(tokens, np.uint8), T, B, 0).rows_per_epoch == rows
        return
    with pytest.raises(DataError, match="training data has 8 tokens.*takes 9"):
        train_batches(np.zeros(tokens, np.uint8), T, B, 0)
    with pytest.raises(DataError, match="validation data has 8 tokens"):
        validation_rows(np.zeros(tokens, np.uint8), T)
    with pytest.raises(DataError, match="validation data has 0 tokens"):
        validation_rows(np.zeros(0, np.uint8), T)


def test_negative_step():
    with pytest.raises(IndexError):
        train_batches(TOKENS, T, B, 0)[-1]


def test_all_validation_rows_cover_every_target_once():
    for everything in (None, 0, 10_000):
        positions = validation_positions(TOKENS, T, everything)
        np.testing.assert_array_equal(positions.ravel(), np.arange(1, 8 * T + 1))


@pytest.mark.parametrize("max_tokens", [1, T, 3 * T, 5 * T + 1, None])
def test_validation_rows_match_their_positions(max_tokens):
    tokens = np.random.default_rng(0).integers(0, 256, 8 * T + 3).astype(np.uint8)
    rows = validation_rows(tokens, T, max_tokens)
    assert rows.shape == (8 if max_tokens is None else max(1, max_tokens // T), T + 1)
    assert rows.dtype == np.int32
    positions = validation_positions(tokens, T, max_tokens)
    np.testing.assert_array_equal(rows[:, 1:], tokens[positions])
    np.testing.assert_array_equal(rows[:, :-1], tokens[positions - 1])


def test_validation_rows_spread_over_the_whole_text():
    tokens = np.arange(1000 * T + 1)
    starts = validation_rows(tokens, T, 10 * T)[:, 0]
    np.testing.assert_array_equal(starts, np.arange(10) * 100 * T)
