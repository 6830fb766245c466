"""Fingerprints: of every bit, of what stands where, and of nothing else."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import programs
from bitnet_jax.fingerprint import _sums, fingerprint

TREE = {
    "kernel": np.linspace(-1, 1, 6 * 5 * 4, dtype=np.float32).reshape(6, 5, 4),
    "latents": np.linspace(-1, 1, 12).reshape(3, 4).astype(jnp.bfloat16),
    "codes": np.arange(-9, 9, dtype=np.int8),
    "mask": np.array([True, False, True]),
    "steps": np.int32(7),
}


def flipped(tree, name, bit):
    leaf = np.array(tree[name])
    words = leaf.reshape(-1).view(np.uint8)
    words[bit // 8] ^= 1 << bit % 8
    return {**tree, name: words.view(leaf.dtype).reshape(leaf.shape)}


def spelt_out(tree):
    """In whole numbers of 64 bits, cut to 32 by hand; small leaves first, then the large ones."""
    leaves = {name: np.asarray(leaf) for name, leaf in sorted(tree.items())}
    names = "\n".join(f"['{name}'] {leaf.dtype} {leaf.shape}" for name, leaf in leaves.items())
    salt = zlib.crc32(names.encode())
    words = [
        leaf.reshape(-1).view(f"u{leaf.itemsize}").astype(np.uint64) for leaf in leaves.values()
    ]
    words.sort(key=lambda leaf: len(leaf) > 2**20)
    words = np.concatenate(words)
    places = salt + np.arange(len(words), dtype=np.uint64)

    def cut(numbers):
        return numbers & np.uint64(2**32 - 1)

    def mix(word, multiplier):
        return cut((word ^ (word >> np.uint64(15))) * np.uint64(multiplier))

    digits = ""
    for spread, first, second in (
        (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35),
        (0x27D4EB2F, 0x165667B1, 0xCC9E2D51),
    ):
        weights = mix(cut(cut(places) * np.uint64(spread)), first) | np.uint64(1)
        mixed = mix(mix(cut(words * weights), first), second)
        digits += f"{(salt * spread + int(mixed.sum())) % 2**32:08x}"
    return digits


def test_known_answer():
    """What is on disk is compared with this, in whatever version: it may not change."""
    assert fingerprint(TREE) == spelt_out(TREE)
    large = {"a": np.arange(2**20 + 3, dtype=np.int32), **TREE}
    assert fingerprint(large) == spelt_out(large)
    known = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.int32(-1)}
    assert fingerprint(known) == spelt_out(known) == "4d1911b98a4699ac"


@pytest.mark.parametrize("name", ["kernel", "latents", "codes", "steps"])
def test_every_bit_counts_in_both_sums(name):
    before = np.asarray(_sums(TREE))
    leaf = np.asarray(TREE[name])
    for bit in range(0, 8 * leaf.nbytes, 7 if leaf.nbytes > 100 else 1):
        assert (np.asarray(_sums(flipped(TREE, name, bit))) != before).all(), bit


def test_two_signs_do_not_cancel():
    """As they would in a sum of odd multiples: 2^31 times an even number is 0."""
    negated = {**TREE, "kernel": -TREE["kernel"]}
    assert TREE["kernel"].size % 2 == 0 and fingerprint(negated) != fingerprint(TREE)
    first = flipped(TREE, "kernel", 31)
    prints = {fingerprint(flipped(first, "kernel", 32 * i + 31)) for i in range(1, 100)}
    assert len(prints) == 99 and fingerprint(TREE) not in prints


def test_places_names_types_and_shapes_count():
    kernel = TREE["kernel"]
    swapped = kernel.copy()
    swapped[0, 0, 0], swapped[0, 0, 1] = kernel[0, 0, 1], kernel[0, 0, 0]
    others = [
        {**TREE, "kernel": swapped},
        {**TREE, "kernel": kernel.reshape(5, 6, 4)},
        {**TREE, "kernel": kernel.transpose(0, 2, 1)},
        {**TREE, "kernel": kernel.view(np.int32)},
        {**TREE, "kernel": np.zeros_like(kernel)},
        {**TREE, "kernel": -np.zeros_like(kernel)},
        {**TREE, "kernel": np.zeros((6, 5, 3), np.float32)},
        {**TREE, "more": np.zeros(0, np.float32)},
        {**{key: leaf for key, leaf in TREE.items() if key != "steps"}, "ticks": TREE["steps"]},
        {key: leaf for key, leaf in TREE.items() if key != "mask"},
    ]
    assert len({fingerprint(tree) for tree in (TREE, *others)}) == len(others) + 1


def test_a_member_of_a_group_has_the_fingerprint_it_has_alone():
    other = jax.tree.map(lambda x: x[..., ::-1] if np.ndim(x) else x + 1, TREE)
    group = jax.tree.map(lambda *xs: jnp.stack(xs), TREE, other, TREE)
    found = [fingerprint(programs.part(group, i)) for i in range(3)]
    assert found == [fingerprint(TREE), fingerprint(other), fingerprint(TREE)]
    assert found[0] != found[1]
