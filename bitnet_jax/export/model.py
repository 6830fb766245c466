"""A trained model as it leaves: what a client needs to compute it, and where it came from.

Clients keep a matrix as [out, in], the transpose of a kernel here, and have no stacked blocks.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int8

from bitnet_jax.latents import latents
from bitnet_jax.model import TransformerConfig
from bitnet_jax.precision import Precision


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """Parameters and what they mean.

    precision: the arm as it is deployed.
    params: float32 masters, the tree of `model.init_params`.
    context_length: positions that it was trained on.
    tokenizer: a file of the `tokenizers` library; None for bytes.
    end_of_text: the token between documents, if the corpus has any.
    provenance: of the run, for people: run_id, git_commit, corpus and the like.
    symbols: what the tokens are, where they are neither bytes nor a tokenizer's: a name, such as
      that of the synthetic language.
    """

    config: TransformerConfig
    precision: Precision
    params: dict
    context_length: int
    tokenizer: Path | None
    end_of_text: int | None
    provenance: dict[str, str]
    symbols: str | None = None


class Linear(NamedTuple):
    """A projection of one block.

    name: such as `attention/q`.
    master: as it was trained. codes and scale: what the arm makes of it; codes * scale is what the
      model multiplies with. scale has shape [1, 1] where the matrix shares one. Of an arm that
      quantizes nothing both are None.
    """

    block: int
    name: str
    master: Float[np.ndarray, "F D"]
    codes: Int8[np.ndarray, "F D"] | None
    scale: Float[np.ndarray, "_ _"] | None


def linears(model: TrainedModel) -> Iterator[Linear]:
    """Every projection, block by block."""
    stacked = latents(model.params, model.precision)
    for block in range(model.config.layers):
        for name, latent in stacked.items():
            # [I, d, F], the inputs cut into I slices with scales [I, 1, F or 1] of their own.
            values, codes = (
                np.asarray(a[block]).reshape(-1, a.shape[-1]).T
                for a in (latent.values, latent.codes)
            )
            if not model.precision.quantized:
                yield Linear(block, name, values, None, None)
                continue
            scale = np.asarray(latent.scale[block])
            if scale.shape[0] > 1:
                scale = np.repeat(scale, latent.codes.shape[2], axis=1)
            yield Linear(block, name, values, codes, scale.reshape(-1, scale.shape[-1]).T)
