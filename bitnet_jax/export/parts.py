"""What of a model is no projection: embedding, head and norms, all float32 in every client."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from bitnet_jax.export.model import Linear, TrainedModel


class Part(NamedTuple):
    """block: None outside the blocks. name: as in the tree of parameters."""

    block: int | None
    name: str
    values: Float32[np.ndarray, "..."]


def parts(model: TrainedModel) -> Iterator[Part]:
    """Embedding, final norm, head where it is no embedding, and the norms of every block."""
    params = model.params
    yield Part(None, "embedding", params["embedding"])
    yield Part(None, "final_norm", params["final_norm"]["scale"])
    if not model.config.tied_embeddings:
        yield Part(None, "head", params["head"])
    stacked = params["blocks"]
    norms = {name: stacked[name] for name in ("attention_norm", "mlp_norm")}
    if model.config.norms == "sub":
        norms |= {f"{group}/sub_norm": stacked[group]["sub_norm"] for group in ("attention", "mlp")}
    for name, norm in norms.items():
        for block, scale in enumerate(norm["scale"]):
            yield Part(block, name, scale)


def values(linear: Linear) -> Float32[np.ndarray, "F D"]:
    """What the model multiplies with, before it is cast to the arm's dtype."""
    return linear.master if linear.codes is None else linear.codes * linear.scale


class Stored(NamedTuple):
    """A file's content, read back.

    parts: by (block, name). matrices: a projection's numbers, or its codes and scale.
    """

    parts: dict[tuple[int | None, str], np.ndarray]
    matrices: dict[tuple[int, str], "Matrix"]


class Matrix(NamedTuple):
    """A projection as a file holds it: floats without a scale, or integer codes and one."""

    numbers: np.ndarray
    scale: float | None
