"""Interpolated n-gram models with Witten-Bell smoothing: what a loss is to be compared with.

A language model that does not beat the trigram has learnt little. Witten-Bell mixes each order
with the next lower one, by how many distinct tokens have followed the context:

    p(w | h) = (c(h, w) + T(h) p(w | h')) / (c(h) + T(h))

where c counts in the training tokens, T(h) is the number of distinct followers of h, and h' is h
without its oldest token. Order 0 is uniform; a context never seen leaves p(w | h'). Source: Witten
and Bell 1991, in the interpolated form of Chen and Goodman 1999, section 2.5.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64, Integer


def witten_bell(
    train: Integer[np.ndarray, " train_tokens"],
    evaluate: Integer[np.ndarray, " tokens"],
    vocab_size: int,
    max_order: int,
) -> dict[int, Float64[np.ndarray, " tokens"]]:
    """Nats of each token of `evaluate` given those before it, by order 1 .. max_order.

    The first tokens, which have fewer than order - 1 before them, use the order that fits.

    Raises:
      ValueError: orders or ids out of range, or n-grams that do not fit 63 bits.
    """
    _check(train, evaluate, vocab_size, max_order)
    tables = dict(_count(train, vocab_size, max_order))  # highest order first
    probability = np.full(len(evaluate), 1 / vocab_size)
    nats = {}
    for order in range(1, max_order + 1):
        keys, counts = tables.pop(order)
        queries = _pack(evaluate, vocab_size, order)
        lower = probability[order - 1 :]
        probability = probability.copy()
        probability[order - 1 :] = _interpolate(keys, counts, queries, lower, vocab_size)
        nats[order] = -np.log(probability)
    return nats


def _check(train: np.ndarray, evaluate: np.ndarray, vocab_size: int, max_order: int) -> None:
    if max_order < 1 or vocab_size**max_order >= 2**63:
        raise ValueError(
            f"max_order={max_order}: must be 1 or more, with vocab_size**max_order below 2**63 "
            f"(vocab_size={vocab_size})"
        )
    for name, tokens in (("train", train), ("evaluate", evaluate)):
        if len(tokens) < max_order:
            raise ValueError(f"{name}: {len(tokens)} tokens, fewer than max_order={max_order}")
        if int(tokens.max()) >= vocab_size:
            raise ValueError(f"{name}: token {tokens.max()} is not below vocab_size={vocab_size}")


def _pack(tokens: np.ndarray, vocab_size: int, order: int) -> Int64[np.ndarray, " n-order+1"]:
    """Every n-gram as one integer, the oldest token the most significant digit."""
    count = len(tokens) - order + 1
    keys = np.zeros(count, np.int64)
    for offset in range(order):
        keys *= vocab_size
        keys += tokens[offset : offset + count]
    return keys


def _count(
    train: np.ndarray, vocab_size: int, max_order: int
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """The sorted distinct n-grams of each order with their counts, from the highest order down.

    Only the highest order sorts the whole text. Dropping the oldest token of all its n-grams gives
    those of the next lower order, but for the one that begins the text.
    """
    keys, counts = np.unique(_pack(train, vocab_size, max_order), return_counts=True)
    yield max_order, (keys, counts)
    for order in range(max_order - 1, 0, -1):
        first = _pack(train[:order], vocab_size, order)
        shorter = np.concatenate([keys % vocab_size**order, first])
        weights = np.append(counts, 1)
        by_key = np.argsort(shorter)
        shorter, weights = shorter[by_key], weights[by_key]
        starts = _run_starts(shorter)
        keys, counts = shorter[starts], np.add.reduceat(weights, starts)
        yield order, (keys, counts)


def _run_starts(values: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1]))


def _interpolate(
    keys: np.ndarray, counts: np.ndarray, queries: np.ndarray, lower: np.ndarray, vocab_size: int
) -> np.ndarray:
    """One order's probabilities of the queried n-grams from those of the order below."""
    contexts = keys // vocab_size
    starts = _run_starts(contexts)
    followers = np.diff(np.append(starts, len(keys)))
    totals = np.add.reduceat(counts, starts)
    at, seen = _find(contexts[starts], queries // vocab_size)
    total, distinct = totals[at] * seen, followers[at] * seen
    at, found = _find(keys, queries)
    count = counts[at] * found
    mixed = (count + distinct * lower) / np.maximum(total + distinct, 1)
    return np.where(seen, mixed, lower)


def _find(table: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices into a sorted table, and whether the query stands there."""
    at = np.minimum(np.searchsorted(table, queries), len(table) - 1)
    return at, table[at] == queries


def ngram_table(
    train: Integer[np.ndarray, " train_tokens"],
    evaluate: Integer[np.ndarray, " tokens"],
    vocab_size: int,
    max_order: int,
    positions: np.ndarray | None = None,
    cache_path: str | Path | None = None,
) -> dict[int, float]:
    """Mean nats a token by order, over all of `evaluate` or only the given positions of it.

    Args:
      positions: indices into `evaluate`, so that a model and the n-grams are averaged over the
        very same targets.
      cache_path: a JSON file that keeps the results by checksum of all arguments.
    """
    if cache_path is None:
        return _means(train, evaluate, vocab_size, max_order, positions)
    cache_path = Path(cache_path)
    key = _checksum(train, evaluate, vocab_size, max_order, positions)
    cached = _read_cache(cache_path)
    if key not in cached:
        means = _means(train, evaluate, vocab_size, max_order, positions)
        cached[key] = {str(order): mean for order, mean in means.items()}
        partial = cache_path.with_name(f".{cache_path.name}.{os.getpid()}")
        partial.write_text(json.dumps(cached, indent=2) + "\n")
        os.replace(partial, cache_path)
    return {int(order): mean for order, mean in cached[key].items()}


def _means(train, evaluate, vocab_size, max_order, positions) -> dict[int, float]:
    nats = witten_bell(train, evaluate, vocab_size, max_order)
    chosen = slice(None) if positions is None else positions
    return {order: float(values[chosen].mean()) for order, values in nats.items()}


def _checksum(train, evaluate, vocab_size, max_order, positions) -> str:
    digest = hashlib.sha256(f"{vocab_size} {max_order}".encode())
    for array in (train, evaluate, positions):
        if array is None:
            continue
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _read_cache(path: Path) -> dict[str, dict[str, float]]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # a damaged cache is only recomputed
        return {}
