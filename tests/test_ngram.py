"""Witten-Bell against its formula, spelled out with dictionaries."""

import json
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from analysis import ngram

TEXT = (
    b"it was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    b"age of foolishness, it was the epoch of belief, it was the epoch of incredulity"
)
TRAIN = np.frombuffer(TEXT * 2 + b"it was spring", np.uint8)
EVALUATE = np.frombuffer(b"it was the season of Light, it was the season of Darkness\x80", np.uint8)


def slow_probability(train, history, token, vocab_size):
    """p(token | history) by the formula, recursively."""
    if history is None:
        return 1 / vocab_size
    followers = defaultdict(Counter)
    order = len(history) + 1
    for i in range(len(train) - order + 1):
        followers[bytes(train[i : i + order - 1])][int(train[i + order - 1])] += 1
    lower = slow_probability(train, history[1:] if history else None, token, vocab_size)
    counts = followers[history]
    if not counts:
        return lower
    return (counts[token] + len(counts) * lower) / (counts.total() + len(counts))


def test_against_the_formula_at_every_order():
    nats = ngram.witten_bell(TRAIN, EVALUATE, 256, max_order=5)
    assert list(nats) == [1, 2, 3, 4, 5]
    for order, values in nats.items():
        expected = [
            -math.log(slow_probability(TRAIN, bytes(EVALUATE[max(0, i - order + 1) : i]), w, 256))
            for i, w in enumerate(EVALUATE.tolist())
        ]
        np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_orders_do_not_depend_on_the_highest():
    alone = ngram.witten_bell(TRAIN, EVALUATE, 256, max_order=2)
    together = ngram.witten_bell(TRAIN, EVALUATE, 256, max_order=6)
    for order in alone:
        np.testing.assert_array_equal(alone[order], together[order])


@pytest.mark.parametrize("context", [b"it wa", b"e", b"zzzz", b"ze ag"])
def test_probabilities_sum_to_one(context):
    total = np.zeros(5)
    for token in range(256):
        evaluate = np.frombuffer(context + bytes([token]), np.uint8)
        evaluate = np.concatenate([np.zeros(5, np.uint8), evaluate])
        nats = ngram.witten_bell(TRAIN, evaluate, 256, max_order=5)
        total += [math.exp(-values[-1]) for values in nats.values()]
    np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_wide_tokens():
    random = np.random.default_rng(0)
    train, evaluate = (random.zipf(1.5, n) % 8192 for n in (5000, 500))
    wide = ngram.witten_bell(train.astype(np.uint16), evaluate, 8192, max_order=4)
    assert all(np.isfinite(values).all() for values in wide.values())
    with pytest.raises(ValueError, match="max_order=5: must be"):
        ngram.witten_bell(train, evaluate, 8192, max_order=5)
    with pytest.raises(ValueError, match="is not below vocab_size=100"):
        ngram.witten_bell(train, evaluate, 100, max_order=2)
    with pytest.raises(ValueError, match="fewer than max_order"):
        ngram.witten_bell(train, evaluate[:1], 8192, max_order=2)


def test_table_over_positions():
    nats = ngram.witten_bell(TRAIN, EVALUATE, 256, max_order=3)
    positions = np.array([[1, 2], [7, 8]])
    table = ngram.ngram_table(TRAIN, EVALUATE, 256, 3, positions)
    assert table == {order: values[[1, 2, 7, 8]].mean() for order, values in nats.items()}
    everywhere = ngram.ngram_table(TRAIN, EVALUATE, 256, 3)
    assert everywhere == {order: values.mean() for order, values in nats.items()}


def test_cache(tmp_path, monkeypatch):
    path = tmp_path / "ngrams.json"
    first = ngram.ngram_table(TRAIN, EVALUATE, 256, 3, cache_path=path)
    other = ngram.ngram_table(TRAIN[:-1], EVALUATE, 256, 3, cache_path=path)
    assert other != first
    assert len(json.loads(path.read_text())) == 2
    monkeypatch.setattr(ngram, "witten_bell", None)  # whatever follows is the cache's
    assert ngram.ngram_table(TRAIN, EVALUATE, 256, 3, cache_path=path) == first
    monkeypatch.undo()
    path.write_text("damaged")
    assert ngram.ngram_table(TRAIN, EVALUATE, 256, 3, cache_path=path) == first
