"""Held-out loss against the rows computed one by one."""

import math

import jax
import numpy as np
import pytest

from bitnet_jax.configs.resolve import resolve
from bitnet_jax.data import validation_rows
from bitnet_jax.evaluate import held_out_loss
from bitnet_jax.model import apply_model
from bitnet_jax.train_step import compiled_init


@pytest.fixture(scope="module")
def case(tiny_config, tiny_corpus):
    """(program, initial parameters, 29 rows, the last of them unlike the others)."""
    spec = resolve(tiny_config(), tiny_corpus)
    rows = validation_rows(tiny_corpus.valid, spec.data.sequence_length, spec.data.eval_tokens)
    rows = np.concatenate([rows[:-1], np.full_like(rows[:1], 200)])  # a byte it never saw
    assert len(rows) == 29
    # An untrained model is about as wrong about every row; with larger logits it is not.
    params = compiled_init(spec.step)(0).params
    params = {**params, "embedding": params["embedding"] * 4}
    return spec.step, params, rows


@pytest.fixture(scope="module")
def nats(case):
    """Mean loss of each row, from the logits of that row alone, in float64."""
    program, params, rows = case

    @jax.jit
    def logits_of(tokens):
        return apply_model(program.model, program.precision, params, tokens)

    found = []
    for row in rows:
        logits = np.asarray(logits_of(row[None, :-1])[0], np.float64)
        log_z = np.log(np.exp(logits).sum(axis=-1))
        found.append(np.mean(log_z - logits[np.arange(len(logits)), row[1:]]))
    return np.array(found)


@pytest.mark.parametrize("batch_size", [1, 8, 29, 40])
def test_mean_and_error_of_the_rows(case, nats, batch_size):
    """Whatever the batch size: one that divides 29, one that does not, one that is larger."""
    loss, error = held_out_loss(*case, batch_size)
    assert isinstance(loss, float) and isinstance(error, float)
    assert loss == pytest.approx(nats.mean(), rel=1e-6)
    variance = sum((x - nats.mean()) ** 2 for x in nats) / 28
    assert error == pytest.approx(math.sqrt(variance / 29), rel=1e-5)


def test_padding_would_show(case, nats):
    """The copies of the last row that fill a batch of 8 would move both numbers."""
    loss, error = held_out_loss(*case, 8)
    filled = np.concatenate([nats, nats[-1:].repeat(3)])
    assert abs(filled.mean() - loss) > 1e-3 * loss
    assert abs(filled.std(ddof=1) / math.sqrt(32) - error) > 1e-2 * error


def test_order_of_the_rows_does_not_matter(case):
    program, params, rows = case
    assert held_out_loss(program, params, rows[::-1], 8) == pytest.approx(
        held_out_loss(program, params, rows, 8), rel=1e-6
    )


def test_equal_rows_have_no_error(case, nats):
    program, params, rows = case
    loss, error = held_out_loss(program, params, rows[:1].repeat(3, axis=0), 8)
    assert loss == pytest.approx(nats[0], rel=1e-6) and error == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_one_row_has_no_error_to_speak_of(case, nats, batch_size):
    program, params, rows = case
    loss, error = held_out_loss(program, params, rows[:1], batch_size)
    assert loss == pytest.approx(nats[0], rel=1e-6) and math.isnan(error)


def test_a_broken_model_is_not_a_number(case):
    program, params, rows = case
    broken = {**params, "embedding": params["embedding"] * math.nan}
    assert all(math.isnan(x) for x in held_out_loss(program, broken, rows, 8))
