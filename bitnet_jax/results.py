"""One row of the results table: everything the analysis needs to know of an endpoint."""

from typing import Any

from bitnet_jax import cost
from bitnet_jax.files import SCHEMA_VERSION
from bitnet_jax.quantize import normal_error
from bitnet_jax.spec import RunSpec


def endpoint_row(spec: RunSpec, endpoint: dict[str, Any], provenance: dict[str, str]) -> dict:
    """The table's columns, in order, for one endpoint.

    endpoint: `end` (optimizer steps), loss, loss_stderr, bits_per_byte, train_loss, unique_tokens,
      status, wall_s, as the training loop records them; losses are None where it diverged.
    FLOPs are the trajectory's own, as if it had been trained alone: sharing a trunk saves the
    sweep's time, not the endpoint's cost.
    """
    model, precision = spec.deployed.model, spec.deployed.precision
    parameters = cost.count_parameters(model)
    tokens = endpoint["end"] * spec.batch_tokens
    return {
        "run_id": spec.run_id,
        "size": spec.size,
        "precision": precision.name,
        "variant": spec.variant,
        "seed": spec.seed_init,
        "params_total": parameters.total,
        "params_non_embedding": parameters.non_embedding,
        "params_quantized": parameters.quantized,
        "tokens": tokens,
        "unique_tokens": endpoint["unique_tokens"],
        "flops": float(tokens * spec.flops_per_token),
        "flops_6nd": float(6 * parameters.non_embedding * tokens),
        "loss": endpoint["loss"],
        "loss_stderr": endpoint["loss_stderr"],
        "bits_per_byte": endpoint["bits_per_byte"],
        "train_loss": endpoint["train_loss"],
        "model_bits": cost.model_bits(model, precision),
        "energy_pj_per_token": cost.energy_per_token(model, precision, spec.data.sequence_length),
        "peak_lr": spec.peak_lr,
        "weight_decay": spec.weight_decay,
        "weight_mse": normal_error(precision.weight_quantizer),
        "batch_tokens": spec.batch_tokens,
        "schedule": spec.schedule.name,
        "warmup_tokens": spec.schedule.warmup_steps * spec.batch_tokens,
        "data": spec.data.name,
        "status": endpoint["status"],
        "wall_s": endpoint["wall_s"],
        "device": provenance["device"],
        "jax_version": provenance["jax_version"],
        "git_commit": provenance["git_commit"],
        "schema_version": SCHEMA_VERSION,
        **{f"tag_{key}": value for key, value in spec.tags},
    }
