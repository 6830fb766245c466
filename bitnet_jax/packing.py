"""Codes of a few levels, several to a byte: 2 bits each, or trits at five to a byte in base 3.

A code's place on its quantizer's grid is a digit; a byte is a number of such digits, the first of
them the lowest. `pack` and `unpack` are arithmetic alone, for programs (JAX's arrays) as for files
(numpy's). `to_bytes` and `from_bytes` are for files: they look at every value and refuse what is
not a code.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int8, UInt8

from bitnet_jax.errors import ConfigError
from bitnet_jax.quantize import Quantizer


class PackingError(ConfigError):
    """Values that are no codes, or bytes that no codes were packed to; it says which and where."""


class Packing(NamedTuple):
    """levels: that a digit tells apart. codes: digits a byte."""

    levels: int
    codes: int

    @property
    def bits(self) -> float:
        """Bits that a code takes."""
        return 8 / self.codes

    @property
    def bytes(self) -> int:
        """How many of the 256 bytes stand for codes."""
        return self.levels**self.codes


TWO_BITS = Packing(4, 4)
BASE_3 = Packing(3, 5)  # 3^5 = 243 of a byte's 256 values
PACKINGS = {"2bit": TWO_BITS, "base3": BASE_3}


def fits(quantizer: Quantizer, packing: Packing = TWO_BITS) -> bool:
    """Whether its codes have few enough levels."""
    return quantizer.reach is not None and quantizer.levels <= packing.levels


def pack(
    codes: Int8[Array, "*B F"], quantizer: Quantizer, packing: Packing = TWO_BITS
) -> UInt8[Array, "*B ceil(F/n)"]:
    """Codes as digits, n to a byte along the last axis; the last byte is filled up with zeros."""
    numbers: Any = codes.__array_namespace__()
    places = ((codes - quantizer.low) // quantizer.gap).astype(numbers.uint8)
    short = -codes.shape[-1] % packing.codes
    places = numbers.pad(places, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    count = places.shape[-1] // packing.codes
    digits = places.reshape(*codes.shape[:-1], count, packing.codes)
    packed = digits[..., 0]
    for i in range(1, packing.codes):
        packed = packed + digits[..., i] * numbers.uint8(packing.levels**i)
    return packed


def unpack(
    packed: UInt8[Array, "*B ceil(F/n)"],
    size: int,
    quantizer: Quantizer,
    packing: Packing = TWO_BITS,
) -> Int8[Array, "*B F"]:
    """The codes again; size: how many there are along the last axis, F."""
    numbers: Any = packed.__array_namespace__()
    digits = [packed // packing.levels**i % packing.levels for i in range(packing.codes)]
    places = numbers.stack(digits, axis=-1)
    count = packed.shape[-1] * packing.codes
    places = places.reshape(*packed.shape[:-1], count)[..., :size].astype(numbers.int8)
    return places * numbers.int8(quantizer.gap) + numbers.int8(quantizer.low)


def packed_size(codes: int, packing: Packing) -> int:
    """Bytes that so many codes take, laid end to end."""
    return -(-codes // packing.codes)


def to_bytes(
    codes: Int8[np.ndarray, "..."], quantizer: Quantizer, packing: Packing, what: str = "codes"
) -> UInt8[np.ndarray, "N"]:
    """All codes, laid end to end in row-major order, so that one byte at most is not full.

    what: they are, for the message.

    Raises:
      PackingError: a grid of too many levels, values of another type, or one that is not on the
        grid.
    """
    _check_fits(quantizer, packing, what)
    if codes.dtype != np.int8:
        raise PackingError(f"{what}: of type {codes.dtype}; codes are int8")
    # Counted from the lowest code and modulo 256, so that no value beyond either end comes out low.
    places = codes.view(np.uint8) - np.uint8(quantizer.low % 256)
    high = (quantizer.levels - 1) * quantizer.gap
    wrong = places > high if quantizer.gap == 1 else (places > high) | (places % quantizer.gap != 0)
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        grid = range(quantizer.low, quantizer.high + 1, quantizer.gap)
        raise PackingError(
            f"{what}: {int(codes[where])} at {list(where)} is not a code; they are "
            f"{', '.join(map(str, grid))}"
        )
    return pack(codes.reshape(-1), quantizer, packing)  # type: ignore[arg-type, return-value]


def from_bytes(
    packed: UInt8[np.ndarray, "N"],
    shape: tuple[int, ...],
    quantizer: Quantizer,
    packing: Packing,
    what: str = "codes",
) -> Int8[np.ndarray, "..."]:
    """The codes that `to_bytes` packed, in their shape.

    Raises:
      PackingError: a grid of too many levels, bytes of another type or number, one that five trits
        do not give, a place beyond the grid, or what fills the last byte up is not zero.
    """
    _check_fits(quantizer, packing, what)
    size = math.prod(shape)
    if packed.dtype != np.uint8 or packed.ndim != 1:
        raise PackingError(f"{what}: {packed.dtype}{list(packed.shape)}; bytes are uint8[N]")
    if len(packed) != packed_size(size, packing):
        raise PackingError(
            f"{what}: {len(packed)} bytes; {size} codes take {packed_size(size, packing)}"
        )
    if packing.bytes < 256 and (wrong := packed >= packing.bytes).any():
        where = int(wrong.argmax())
        raise PackingError(
            f"{what}: byte {where} is {packed[where]}; {packing.codes} codes of {packing.levels} "
            f"levels give at most {packing.bytes - 1}"
        )
    whole = len(packed) * packing.codes
    codes: Any = unpack(packed, whole, quantizer, packing)  # type: ignore[arg-type]
    if quantizer.levels < packing.levels and (wrong := codes[:size] > quantizer.high).any():
        where = int(wrong.argmax())
        place = (int(codes[where]) - quantizer.low) // quantizer.gap
        raise PackingError(
            f"{what}: byte {where // packing.codes} has the place {place}; a grid of "
            f"{quantizer.levels} levels has places up to {quantizer.levels - 1}"
        )
    if (codes[size:] != quantizer.low).any():
        raise PackingError(f"{what}: byte {len(packed) - 1} goes on after the last of {size} codes")
    return codes[:size].reshape(shape)


def _check_fits(quantizer: Quantizer, packing: Packing, what: str) -> None:
    if not fits(quantizer, packing):
        raise PackingError(
            f"{what}: a grid of {quantizer.levels} levels; {packing.codes} codes a byte leave "
            f"room for {packing.levels}"
        )


def code_counts(codes: Int8[np.ndarray, "..."]) -> np.ndarray:
    """How often each of the 256 values of an int8 is there."""
    return np.bincount(codes.reshape(-1).view(np.uint8), minlength=256)


def entropy(counts: Iterable[int]) -> float:
    """Bits a code of its distribution, taking codes as independent (order 0); 0 of none."""
    found = np.asarray([count for count in counts if count], np.float64)
    if not found.size:
        return 0.0
    shares = found / found.sum()
    return max(0.0, float(-(shares * np.log2(shares)).sum()))
