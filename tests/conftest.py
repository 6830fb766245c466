"""Settings that every test runs under."""

import os

os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

# Silent broadcasting of ranks hides shape mistakes.
jax.config.update("jax_numpy_rank_promotion", "raise")
