"""Trits as the files of other clients keep them: arrays of bytes, and back.

Axes: F output and D input features of a projection; a code is -1, 0 or 1 and is stored as code + 1.
All but `pack_rows` cut a row of inputs into blocks that a CPU's instructions load at once, which is
why neighbouring values never share a byte.
"""

import numpy as np
from jaxtyping import Float32, Int8, UInt8

# Inputs that a block holds: a row must be a multiple of them.
TQ_BLOCK = 256
I2_S_BLOCK = 128
# Rows whose codes share a byte.
ROWS = 4

TQ1_0_BYTES = 54
TQ2_0_BYTES = 66
_POWERS_OF_3 = np.array([81, 27, 9, 3, 1], np.uint16)
# (first value, byte stride, values a byte) of TQ1_0's three parts.
_TQ1_0_PARTS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))


def pack_rows(codes: Int8[np.ndarray, "F D"]) -> UInt8[np.ndarray, "F/4 D"]:
    """transformers' packing: byte r holds rows r, r + F/4, r + 2F/4 and r + 3F/4, 2 bits each."""
    quarters = (codes + 1).astype(np.uint8).reshape(ROWS, -1, codes.shape[1])
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def unpack_rows(packed: UInt8[np.ndarray, "R D"]) -> Int8[np.ndarray, "4R D"]:
    """What `pack_rows` packed."""
    quarters = [(packed >> 2 * i & 3).astype(np.int8) - 1 for i in range(ROWS)]
    return np.concatenate(quarters)


def encode_tq2_0(codes: Int8[np.ndarray, "F D"]) -> UInt8[np.ndarray, "F D*66/256"]:
    """llama.cpp's TQ2_0: 64 bytes of four codes each, then a float16 scale, which is 1 here.

    In each half of a block, value j is in byte j mod 32 at bits 2 (j div 32).
    """
    halves = (codes + 1).astype(np.uint8).reshape(-1, 2, 4, 32)
    packed = halves[:, :, 0] | halves[:, :, 1] << 2 | halves[:, :, 2] << 4 | halves[:, :, 3] << 6
    return _with_scale(packed.reshape(-1, 64), codes.shape)


def decode_tq2_0(
    data: UInt8[np.ndarray, "F B"],
) -> tuple[Int8[np.ndarray, "F D"], Float32[np.ndarray, "F D/256"]]:
    """Codes, and each block's scale."""
    packed, scale = _without_scale(data, TQ2_0_BYTES)
    halves = packed.reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return (halves.astype(np.int8) - 1).reshape(len(data), -1), scale


def encode_tq1_0(codes: Int8[np.ndarray, "F D"]) -> UInt8[np.ndarray, "F D*54/256"]:
    """llama.cpp's TQ1_0: five codes a byte, 1.69 bits each, then a float16 scale, which is 1 here.

    The digits of a byte are base 3, the first value's the most significant. What is stored is not
    their number v but ceil(v 256 / 243), a fraction of 256: times 3, its carry is the next digit.
    Of the last 16 values only four share a byte, as the four highest of five digits.
    """
    digits = (codes + 1).astype(np.uint16).reshape(-1, TQ_BLOCK)
    parts = []
    for start, stride, count in _TQ1_0_PARTS:
        part = digits[:, start : start + stride * count].reshape(-1, count, stride)
        number = np.tensordot(part, _POWERS_OF_3[:count], axes=(1, 0))
        parts.append(((number * 256 + 242) // 243).astype(np.uint8))
    return _with_scale(np.concatenate(parts, axis=1), codes.shape)


def decode_tq1_0(
    data: UInt8[np.ndarray, "F B"],
) -> tuple[Int8[np.ndarray, "F D"], Float32[np.ndarray, "F D/256"]]:
    """Codes, and each block's scale."""
    packed, scale = _without_scale(data, TQ1_0_BYTES)
    codes, first = [], 0
    for _, stride, count in _TQ1_0_PARTS:
        fraction = packed[:, first : first + stride].astype(np.uint16)
        first += stride
        for _ in range(count):
            codes.append((fraction * 3 >> 8).astype(np.int8) - 1)
            fraction = (fraction * 3) & np.uint16(255)
    return np.concatenate(codes, axis=1).reshape(len(data), -1), scale


def encode_i2_s(codes: Int8[np.ndarray, "F D"], scale: float) -> UInt8[np.ndarray, "B"]:
    """bitnet.cpp's I2_S on x86: the whole matrix's codes, then its float32 scale in 32 bytes.

    Of 128 values, value j is in byte j mod 32 at bits 6 - 2 (j div 32).
    """
    groups = (codes + 1).astype(np.uint8).reshape(-1, 4, 32)
    packed = groups[:, 0] << 6 | groups[:, 1] << 4 | groups[:, 2] << 2 | groups[:, 3]
    tail = np.zeros(8, "<f4")
    tail[0] = scale
    return np.concatenate([packed.reshape(-1), tail.view(np.uint8)])


def decode_i2_s(
    data: UInt8[np.ndarray, "B"], shape: tuple[int, int]
) -> tuple[Int8[np.ndarray, "F D"], float]:
    """Codes and the scale."""
    size = shape[0] * shape[1] // 4
    groups = data[:size].reshape(-1, 1, 32) >> np.arange(6, -1, -2, dtype=np.uint8)[:, None] & 3
    scale = data[size : size + 4].copy().view("<f4")[0]
    return (groups.astype(np.int8) - 1).reshape(shape), float(scale)


def _with_scale(
    packed: UInt8[np.ndarray, "N B"], shape: tuple[int, ...]
) -> UInt8[np.ndarray, "F _"]:
    one = np.broadcast_to(np.array([1], "<f2").view(np.uint8), (len(packed), 2))
    return np.concatenate([packed, one], axis=1).reshape(shape[0], -1)


def _without_scale(
    data: UInt8[np.ndarray, "F B"], size: int
) -> tuple[UInt8[np.ndarray, "N _"], Float32[np.ndarray, "F _"]]:
    blocks = data.reshape(-1, size)
    scale = blocks[:, -2:].copy().view("<f2").astype(np.float32)
    return blocks[:, :-2], scale.reshape(len(data), -1)
