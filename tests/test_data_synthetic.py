"""The synthetic language: its entropy rate is exact, and its samples have it."""

import itertools

import numpy as np
import pytest

from bitnet_jax.data import DataError, SyntheticLanguage, load
from bitnet_jax.data import synthetic as module


def test_entropy_rate_against_brute_force():
    """A tiny language as a chain over pairs of symbols, its distribution by power iteration."""
    language = SyntheticLanguage(seed=3, alphabet_size=3, classes=2)
    pairs = list(itertools.product(range(3), repeat=2))
    chain = np.zeros((9, 9))
    entropies = np.zeros(9)
    for i, (older, newer) in enumerate(pairs):
        p = language.emissions[older % 2 * 2 + newer % 2]
        entropies[i] = -sum(x * np.log(x) for x in p)
        for symbol in range(3):
            chain[i, pairs.index((newer, symbol))] += p[symbol]
    distribution = np.linalg.matrix_power(chain, 1000)[0]
    assert distribution.sum() == pytest.approx(1)
    assert language.entropy_rate == pytest.approx(distribution @ entropies, rel=1e-12)


def test_samples_have_the_entropy_rate():
    language = SyntheticLanguage()
    nats = -language.log_prob(language.sample(200_000, seed=0))
    blocks = nats.reshape(100, -1).mean(axis=1)  # blocks, for the tokens are not independent
    error = blocks.std(ddof=1) / 10
    assert abs(blocks.mean() - language.entropy_rate) < 4 * error
    assert error < 0.005


def test_log_prob_is_a_distribution_over_whole_texts():
    """The probabilities of all texts of four symbols sum to one: positions 0 and 1 included."""
    language = SyntheticLanguage(seed=1, alphabet_size=4, classes=2)
    texts = np.array(list(itertools.product(range(4), repeat=4)))
    log_prob = language.log_prob(texts)
    assert np.exp(log_prob.sum(axis=1)).sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(language.log_prob(texts[7]), log_prob[7])


def test_unknown_context_costs_more():
    language = SyntheticLanguage()
    rows = language.sample(64 * 1000, seed=1).reshape(-1, 64)
    mean = -language.log_prob(rows).mean(axis=0)
    assert mean[0] > mean[1] > mean[2:].mean() + 0.05


def test_sample_frequencies_follow_the_state():
    language = SyntheticLanguage(seed=2, alphabet_size=4, classes=2)
    sample = language.sample(300_000, seed=0).astype(int)
    state = sample[:-2] % 2 * 2 + sample[1:-1] % 2
    for s in range(4):
        counts = np.bincount(sample[2:][state == s], minlength=4)
        p = language.emissions[s]
        error = np.sqrt(p * (1 - p) / counts.sum())
        np.testing.assert_array_less(np.abs(counts / counts.sum() - p), 5 * error)


def test_seeds():
    language = SyntheticLanguage()
    np.testing.assert_array_equal(language.sample(100, 1), SyntheticLanguage().sample(100, 1))
    assert not np.array_equal(language.sample(100, 1), language.sample(100, 2))
    assert SyntheticLanguage(seed=1).entropy_rate != language.entropy_rate
    with pytest.raises(DataError, match="alphabet_size=300"):
        SyntheticLanguage(alphabet_size=300)


def test_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TRAIN_TOKENS", 1000)
    monkeypatch.setattr(module, "_VALID_TOKENS", 500)
    module.prepare_synthetic(tmp_path / "synthetic")
    corpus = load(tmp_path / "synthetic")
    assert (corpus.vocab_size, len(corpus.train), len(corpus.valid)) == (64, 1000, 500)
    assert corpus.manifest["entropy_rate_nats"] == SyntheticLanguage().entropy_rate
    assert not np.array_equal(corpus.train[:500], corpus.valid)
