"""Files of named arrays in the safetensors format: 8 bytes of length, a JSON header, the arrays.

Written out because it is short, its files open everywhere, and a reader of our own checks every
number of the header against the size of the file before anything is made of it. Nothing is run,
and nothing is allocated that the file does not hold.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bitnet_jax.files import DamagedFile, replacing

DTYPES = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
ALIGNMENT = 64  # of the first array; each has a dtype of at most 4 bytes, the widest first
LONGEST_HEADER = 2**26  # bytes
MOST_AXES = 8


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write the file whole or not at all. Raises OSError."""
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {METADATA: dict(metadata)}
    offset = 0
    for name in ordered:
        array, begin = tensors[name], offset
        offset += array.nbytes
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, offset],
        }
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of a file; the arrays are views of it, read as they are used.

    Raises:
      DamagedFile: not such a file, cut off, or with a header that does not describe it.
      OSError: it cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise DamagedFile(path, "it is no safetensors file, or cut off in its header")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        metadata = header.pop(METADATA, {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
        places = {name: _place(entry) for name, entry in header.items()}
        _check_cover(places, size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFile(path, f"its header says {str(error)[:100]!r}") from error
    data = np.memmap(path, np.uint8, "r", 8 + length) if size > 8 + length else np.zeros(0, "u1")
    arrays = {
        name: data[begin:end].view(dtype).reshape(shape)
        for name, (dtype, shape, begin, end) in places.items()
    }
    return arrays, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


Place = tuple[np.dtype, tuple[int, ...], int, int]


def _place(entry: dict[str, Any]) -> Place:
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    numbers = [*shape, begin, end]
    if len(shape) > MOST_AXES or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise ValueError(f"shape {shape}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} in {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _check_cover(places: Mapping[str, Place], size: int) -> None:
    """Every byte belongs to one array: nothing is shared, hidden or cut off."""
    offset = 0
    for dtype, _, begin, end in sorted(places.values(), key=lambda place: place[2:]):
        if begin != offset or begin % dtype.itemsize:
            raise ValueError(f"an array at {begin}, where {offset} is the next")
        offset = end
    if offset != size:
        raise ValueError(f"{offset} bytes of arrays, of which {size} are there")
