"""Published recipes as configs.

    python -m experiments.run --config=bitnet_jax/configs/presets.py:trilm --config.model.size=95k

Each function returns the keys in which a recipe differs from `default.py`, and cites its source.
Sizes, corpus, token budgets and warm-up stay the user's. So do learning rates, save where a rate is
what the recipe is about: the published ones belong to models a thousand times larger.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from bitnet_jax.configs import default
from bitnet_jax.errors import ConfigError

Overrides = dict[str, Any]

LLAMA: Overrides = {"model.norms": "pre", "model.activation": "silu", "model.gated": True}
_TWO_STAGE: Overrides = {"schedule.name": "two_stage"}


def bitnet_b158() -> Overrides:
    """BitNet b1.58 (arXiv:2402.17764; "Training Tips, Code and FAQ", 2024): LLaMA's block with an
    RMSNorm inside every linear layer instead of before it, trits by absmean, int8 activations, two
    stages of learning rate and weight decay."""
    return {**LLAMA, **_TWO_STAGE, "precision": "ternary", "model.norms": "inside"}


def bitnet_2b4t() -> Overrides:
    """BitNet b1.58 2B4T (arXiv:2504.12285): sub-norms and a squared ReLU gate. The block that
    bitnet.cpp has built in, and transformers as `bitnet`."""
    two_stage = {**_TWO_STAGE, "model.norms": "sub", "model.activation": "relu2"}
    return {**two_stage, "precision": "ternary"}


def bitnet_1bitllm() -> Overrides:
    """The reproduction of BitNet b1.58 by 1bitLLM (huggingface.co/1bitLLM/bitnet_b1_58-3B, 2024):
    sub-norms, as in 2B4T, and a SiLU gate. The block that llama.cpp has built in as `bitnet`."""
    return {**bitnet_2b4t(), "model.activation": "silu"}


def bitnet_b1() -> Overrides:
    """BitNet (arXiv:2310.11453): signs of centred weights, int8 activations, a norm inside every
    linear layer, an ungated MLP, SubLN's initialisation; linear decay after warm-up."""
    return {
        "precision": "binary",
        "model.norms": "inside",
        "model.gated": False,
        "model.activation": "gelu",
        "model.init": "subln",
        "schedule.decay_fraction": 0.85,
        "optim.b2": 0.98,
        "optim.weight_decay": 0.01,
    }


def trilm() -> Overrides:
    """TriLM (Spectra, arXiv:2407.12327): trits with 1e-5 added to their scale, 16-bit activations,
    LLaMA's block; the peak rate drops half way, weight decay ends at two thirds. (Its scale is one
    a tensor-parallel shard: quantization.granularity=shard.)"""
    return {
        **LLAMA,
        "precision": "ternary",
        "quantization.weights": "ternary_absmean_trilm",
        "quantization.activations": "none",
        "schedule.name": "trilm",
        "schedule.second_peak": 1.5 / 2.4,
    }


def bitnet_a48() -> Overrides:
    """BitNet a4.8 (arXiv:2411.04965): b1.58 whose activations have 4 bits in the last 5 % of the
    tokens. Here in every linear layer; the paper keeps 8 bits and sparsifies the inputs of the two
    projections that add to the residual stream."""
    return {**bitnet_2b4t(), "quantization.late_activations": "int4_absmean"}


def blog_bitnet15() -> Overrides:
    """The blog "Experiments with BitNet 1.5 (ngmi)" (joey00072, 2024): b1.58's layer in a LLaMA of
    15M parameters (8 layers, width 256, sequences of 256), one rate of 5e-4 for both arms.
    Its text takes the activations' scale over the time axis, which tells the past of the future;
    its code, as here, over features."""
    return {**_BLOG, "precision": "ternary", "model.norms": "inside"}


def blog_llama() -> Overrides:
    """The LLaMA that the blog's BitNet is compared with, at the same learning rate."""
    return {**_BLOG, "precision": "bf16"}


_BLOG: Overrides = {
    **LLAMA,
    "schedule.name": "cosine",
    "optim.peak_lr": 5e-4,
}

PRESETS: dict[str, Callable[[], Overrides]] = {
    f.__name__: f
    for f in (
        bitnet_b158,
        bitnet_2b4t,
        bitnet_1bitllm,
        bitnet_b1,
        trilm,
        bitnet_a48,
        blog_bitnet15,
        blog_llama,
    )
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The default config with a preset's changes.

    Raises:
      ConfigError: no such preset.
    """
    if arg not in PRESETS:
        raise ConfigError(f"preset {arg!r} is unknown; choose from {', '.join(PRESETS)}")
    config = default.get_config()
    config.name = arg
    config.update_from_flattened_dict(PRESETS[arg]())
    return config
