"""A results table of two arms whose laws are known, as a sweep would have written it."""

import numpy as np
import pandas as pd

SIZES = {"0.2m": 2.1e5, "0.5m": 5e5, "1m": 1.1e6, "2m": 2.2e6}
TRIGRAM = {"byte trigram (Witten-Bell)": 2.97 * np.log(2)}


def endpoints(seeds: int = 1, ternary_worth: float = 0.8) -> pd.DataFrame:
    """Four sizes, two budgets, two arms; a ternary parameter is worth `ternary_worth`."""
    rng = np.random.default_rng(0)
    rows = []
    for arm, worth in (("ternary", ternary_worth), ("fp16", 1.0)):
        for size, n in SIZES.items():
            for seed in range(seeds):
                for d in (8 * np.sqrt(n * 5e5), 16 * np.sqrt(n * 5e5)):
                    loss = 0.95 + 12 / (worth * n) ** 0.28 + 55 / d**0.33
                    loss *= np.exp(2e-3 * rng.normal())
                    rows.append({
                        "run_id": f"{size}-{arm}-s{seed}-ab12cd", "sweep": "quickstart",
                        "size": size, "precision": arm, "seed": seed, "params_total": int(n),
                        "params_non_embedding": int(0.9 * n), "params_quantized": int(0.8 * n),
                        "tokens": int(d), "unique_tokens": 10_000_000, "flops": 7.1 * n * d,
                        "flops_6nd": 6 * n * d, "loss": loss, "loss_stderr": 0.004,
                        "bits_per_byte": loss / np.log(2), "train_loss": loss - 0.05,
                        "model_bits": n * (1.58 if arm == "ternary" else 16),
                        "energy_pj_per_token": 2.5 * n, "peak_lr": 3e-3, "batch_tokens": 8192,
                        "schedule": "wsd", "warmup_tokens": 1e5, "status": "ok", "wall_s": 11.0,
                        "device": "cpu", "jax_version": "0.10.2", "git_commit": "abcdef1",
                    })  # fmt: skip
    return pd.DataFrame(rows)
