"""A synthetic language whose entropy rate is known exactly: the floor of any model's loss.

Every symbol belongs to a class. The classes of the last two symbols are the state, and each state
draws the next symbol from its own Zipf distribution: an own order of the symbols and an own
exponent. The state follows from the text alone, so the entropy rate is the exact sum over states
of stationary probability times entropy, and a model that sees two symbols back can reach it.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int, UInt8

from bitnet_jax.data import corpus
from bitnet_jax.data.errors import DataError

NAME = "synthetic"
_EXPONENTS = (0.8, 2.0)  # 3.6 to 1.4 nats with 64 symbols: some contexts are easy, some are hard
_TRAIN_TOKENS = 8_000_000
_VALID_TOKENS = 500_000


class SyntheticLanguage:
    """A stationary source of symbols 0 .. alphabet_size - 1 with `classes`**2 states.

    Args:
      seed: which language. Two seeds are two languages of similar entropy.
      alphabet_size: symbols, at most 256. Symbol x is of class x modulo `classes`.
    """

    def __init__(self, seed: int = 0, alphabet_size: int = 64, classes: int = 8):
        if not 1 <= classes <= alphabet_size <= 256:
            raise DataError(
                f"alphabet_size={alphabet_size}, classes={classes}: need "
                "1 <= classes <= alphabet_size <= 256"
            )
        self.alphabet_size = alphabet_size
        self.classes = classes
        random = np.random.default_rng(seed)
        states = classes**2
        exponents = random.uniform(*_EXPONENTS, (states, 1))
        ranks = random.permuted(np.tile(np.arange(1.0, alphabet_size + 1), (states, 1)), axis=1)
        weights = ranks**-exponents
        self.emissions: Float64[np.ndarray, "states symbols"] = weights / weights.sum(
            axis=1, keepdims=True
        )

    @cached_property
    def next_state(self) -> Int[np.ndarray, "states symbols"]:
        """State (a, b), numbered a * classes + b with b the newer class, goes on to (b, c)."""
        newer = np.arange(self.classes**2)[:, None] % self.classes
        return newer * self.classes + np.arange(self.alphabet_size) % self.classes

    @cached_property
    def stationary(self) -> Float64[np.ndarray, " states"]:
        """The stationary distribution over states: pi = pi P with a sum of 1."""
        states = len(self.emissions)
        transitions = np.zeros((states, states))
        np.add.at(transitions, (np.arange(states)[:, None], self.next_state), self.emissions)
        equations = np.vstack([transitions.T - np.eye(states), np.ones(states)])
        return np.linalg.lstsq(equations, np.eye(states + 1)[-1], rcond=None)[0]

    @property
    def entropy_rate(self) -> float:
        """Exact, in nats a token."""
        entropies = -(self.emissions * np.log(self.emissions)).sum(axis=1)
        return float(self.stationary @ entropies)

    def sample(self, n: int, seed: int) -> UInt8[np.ndarray, " n"]:
        """One chain of n symbols that starts from the stationary distribution."""
        random = np.random.default_rng(seed)
        state = int(random.choice(len(self.stationary), p=self.stationary))
        # Plain lists: the chain is sequential, and a list lookup is far faster than an array's.
        # The last bound is infinite lest rounding leave a draw above the whole sum.
        bounds = [[*row[:-1], np.inf] for row in np.cumsum(self.emissions, axis=1).tolist()]
        next_state = self.next_state.tolist()
        chain = bytearray()
        for start in range(0, n, 1 << 20):
            for draw in random.random(min(n - start, 1 << 20)).tolist():
                symbol = bisect_right(bounds[state], draw)
                chain.append(symbol)
                state = next_state[state][symbol]
        return np.frombuffer(chain, np.uint8)

    def log_prob(self, tokens: Int[np.ndarray, "*rows T"]) -> Float64[np.ndarray, "*rows T"]:
        """Nats of each token given those before it in its row, exactly.

        The first two tokens of a row do not tell the state of which they were drawn: their
        probabilities average over it, as a model's must that sees nothing before the row. So
        rows cost a little more than the entropy rate, and these numbers say how much.
        """
        tokens = np.asarray(tokens).astype(np.int64)
        result = np.empty(tokens.shape)
        # joint[..., s]: probability of the tokens so far, and that the chain started in state s.
        joint = np.broadcast_to(self.stationary, (*tokens.shape[:-1], len(self.stationary)))
        state = np.broadcast_to(np.arange(len(self.stationary)), joint.shape)
        for i in range(min(2, tokens.shape[-1])):
            token = tokens[..., i, None]
            before = joint.sum(axis=-1)
            joint = joint * self.emissions[state, token]
            state = self.next_state[state, token]
            result[..., i] = np.log(joint.sum(axis=-1) / before)
        symbol_class = tokens % self.classes
        known = symbol_class[..., :-2] * self.classes + symbol_class[..., 1:-1]
        result[..., 2:] = np.log(self.emissions[known, tokens[..., 2:]])
        return result


def prepare_synthetic(out: Path) -> None:
    """Writes the built-in language: one chain of 8,000,000 tokens to train, 500,000 to validate."""
    language = SyntheticLanguage()
    sizes = {"train": _TRAIN_TOKENS, "valid": _VALID_TOKENS}
    with corpus.building(out) as partial:
        counts = {}
        for seed, (split, size) in enumerate(sizes.items(), 1):
            writer = corpus.SplitWriter(partial, split, language.alphabet_size, eot_token=None)
            writer.add(language.sample(size, seed), text_bytes=size)
            counts[split] = writer.finish()
        manifest = {
            "schema": corpus.SCHEMA,
            "name": NAME,
            "tokenizer": {"name": NAME, "sha256": None},
            "vocab_size": language.alphabet_size,
            "dtype": corpus.token_dtype(language.alphabet_size).name,
            "eot_token": None,
            "entropy_rate_nats": language.entropy_rate,
            "sources": [],
            "splits": counts,
        }
        corpus.write_manifest(partial, manifest)
