"""Models of random weights, for the tests of exports."""

import dataclasses
import functools

import jax
import numpy as np

from bitnet_jax.export.model import TrainedModel
from bitnet_jax.model import TransformerConfig, init_params
from bitnet_jax.precision import get_precision

SHAPE = {"vocab_size": 256, "layers": 2, "width": 32, "ff_width": 96, "heads": 4, "kv_heads": 2}
WIDE = {**SHAPE, "width": 256, "ff_width": 512}


def trained(precision="ternary", tokenizer=None, arm=None, **changes):
    """A model whose norms are not all ones, as after training."""
    model = described(precision, tokenizer, arm, **changes)
    model.params.update(_params(model.config, model.precision))
    return model


def described(precision="ternary", tokenizer=None, arm=None, **changes):
    """The same without parameters, for what is refused before they are looked at."""
    config = TransformerConfig(**{**SHAPE, **changes})
    provenance = {"run_id": "some-run", "git_commit": "abc", "corpus": "some-text"}
    arm = get_precision(precision, **(arm or {}))
    return TrainedModel(config, arm, {}, 64, tokenizer, 0, provenance)


@functools.cache
def _params(config, arm):
    """Drawn by NumPy: Flax would compile an initialisation for every shape."""
    generator = np.random.default_rng(0)

    def draw(path, like):
        if path[-1].key == "scale":  # a norm's
            return generator.uniform(0.5, 1.5, like.shape).astype(np.float32)
        inputs = like.shape[-2] if path[-1].key == "kernel" else like.shape[-1]
        return (generator.normal(size=like.shape) * inputs**-0.5).astype(np.float32)

    shapes = jax.eval_shape(lambda: init_params(config, arm, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def rows(count=64, length=64, seed=0):
    """Token ids, as of held-out text."""
    return np.random.default_rng(seed).integers(1, 256, (count, length)).astype(np.int32)


def of_symbols(**changes):
    """Such as of the synthetic language: its tokens are no text, and none is an end of one."""
    model = trained(vocab_size=64, **changes)
    return dataclasses.replace(model, end_of_text=None, symbols="synthetic")
