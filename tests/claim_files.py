"""Directories of results, invented so that it is known of every claim where it stands."""

import json
import math

import numpy as np
import pandas as pd
from test_ingredients import rows

from analysis import claims
from analysis.result_files import Results

SEEDS = (0, 1, 2)

FULL = {
    ("without", "float32 latents"): 0.05,
    ("instead", "bfloat16 latents, stochastic"): 0.05,
    ("instead", "estimator clipped"): 0.0,
    ("instead", "estimator trust"): 0.0,
    ("instead", "estimator stochastic"): 0.0,
    ("without", "residual init"): 0.05,
    ("instead", "init nanotron"): 0.05,
    ("instead", "init SubLN"): 0.05,
    ("instead", "init quantizer"): 0.05,
    ("instead", "sin^2 toward levels"): 0.0,
    ("instead", "sin^2 away from levels"): 0.0,
    ("instead", "dampening"): 0.0,
    ("instead", "dampening reversed"): 0.0,
    ("instead", "sin^2 toward levels, weak"): 0.0,
    ("instead", "sin^2 away from levels, weak"): 0.0,
    ("instead", "dampening, weak"): 0.0,
    ("instead", "dampening reversed, weak"): 0.0,
    ("instead", "Lion"): 0.0,
    ("instead", "Muon"): 0.0,
    ("instead", "Bop"): 0.0,
    ("instead", "clipped latents"): 0.0,
    ("without", "squared ReLU"): 0.05,
    ("without", "sub-norms"): 0.05,
    ("without", "weight decay"): 0.0,
    ("instead", "norm in every linear"): 0.0,
    ("instead", "activations ternary_absmean"): 0.1,
    ("instead", "activations ternary_twn"): 0.1,
    ("instead", "activations ternary_twn, rotated"): 0.1,
    ("instead", "fp16"): -0.06,
    ("instead", "warm-up linear"): 0.0,
    ("instead", "warm-up exponential"): 0.0,
    ("instead", "warm-up sigmoid"): 0.0,
    ("instead", "schedule two-stage"): 0.0,
    ("instead", "schedule cosine"): 0.0,
    ("instead", "schedule TriLM"): 0.0,
    **{("instead", f"weights ternary_{i}"): 0.01 * i for i in range(1, 8)},
}
MINIMAL = {
    ("with", "trust estimator"): 0.0,
    ("with", "residual init"): -0.05,
    ("with", "SubLN init"): -0.05,
    ("with", "quantizer init"): -0.05,
    ("with", "sin^2 toward levels"): 0.0,
    ("with", "squared ReLU"): -0.05,
    ("with", "sub-norms"): -0.05,
    ("with", "norm in every linear"): -0.05,
    ("with", "weight decay"): 0.0,
    ("with", "ternary activations"): 0.1,
    ("with", "linear warm-up"): 0.0,
    ("with", "two-stage schedule"): 0.0,
}
BASES = {"full": FULL, "minimal": MINIMAL}


def write(root, name, frame):
    path = root / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)


def runs(base, variants, noise=1e-3, diverged=None):
    """A base of loss 2 and its variants {(kind, change): effect}; `diverged`: {change: seeds}."""
    frames = [rows(base, "base", "", [2.0] * 3)]
    for i, ((kind, change), effect) in enumerate(variants.items()):
        losses = list(2 + effect + noise * np.roll([-1.0, 0.0, 1.0], i))
        for seed in (diverged or {}).get(change, ()):
            losses[seed] = None
        error = 0.19 + effect if change.startswith("weights") else 0.19
        factor = "weights" if change.startswith("weights") else ""
        frames.append(rows(base, kind, change, losses, factor, mse=error))
    return pd.concat(frames, ignore_index=True)


def write_ingredients(root, changes=None, bases=BASES, **options):
    """The invented effects with some changed: {(base, kind, change): effect or None for no row}."""
    effects = {(base, *key): x for base, own in bases.items() for key, x in own.items()}
    effects.update(changes or {})
    frames = [
        runs(
            base,
            {k[1:]: x for k, x in effects.items() if k[0] == base and x is not None},
            **options,
        )
        for base in BASES
    ]
    write(root, "ingredients/endpoints", pd.concat(frames))


def write_latents(root, entropy=1.5):
    frame = pd.DataFrame({
        "run_id": ["a", "b", "c"], "seed": 0, "tag_base": "full",
        "tag_kind": ["base", "base", "instead"], "tag_change": ["", "", "estimator clipped"],
        "latent_entropy": [entropy - 0.1, entropy + 0.1, 0.3], "gradient_cosine": [0.8, 0.9, 0.7],
    })  # fmt: skip
    write(root, "ingredients/latents", frame.drop(columns="gradient_cosine"))
    write(root, "gradients/latents", frame.drop(columns="latent_entropy"))


def write_presets(root, held_out=0.05, trained=0.05):
    noise = np.array([-1e-3, 0.0, 1e-3])
    bitnet = rows("llama", "instead", "blog_bitnet15", list(3 + held_out + noise))
    llama = rows("llama", "instead", "blog_llama", [3.0] * 3)
    frame = pd.concat([rows("llama", "base", "", [2.0] * 3), llama, bitnet])
    frame["train_loss"] = [*[2.0] * 3, *[3.0] * 3, *(3 + trained + noise)]
    write(root, "presets/endpoints", frame.assign(peak_lr=5e-4))


def write_rates(root, ratios=(1.3, 1.2)):
    """Parabolas in log rate, least at .004 in float16 and at that times the ratio in ternary."""
    found = []
    for n, ratio in enumerate(ratios, 1):
        for arm, optimum in (("fp16", 0.004), ("ternary", 0.004 * ratio)):
            for rate in 1e-3 * 2.0 ** np.arange(8):
                loss = 2 + 0.1 * math.log(rate / optimum) ** 2
                found.append((f"{n}0k", arm, n * 10_000, rate, loss))
    names = ["size", "precision", "params_non_embedding", "peak_lr", "loss"]
    frame = pd.DataFrame(found, columns=names).assign(tokens=600_000, seed=0, status="ok")
    write(root, "learning_rate/endpoints", frame)


def write_optimizers(root):
    frame = pd.DataFrame({
        "tag_optimizer": ["lion"] * 3 + ["muon"] * 2, "precision": "ternary", "status": "ok",
        "peak_lr": [1e-3, 2e-3, 4e-3, 1e-3, 2e-3], "loss": [2.1, 2.0, 2.2, 2.1, 2.0],
    })  # fmt: skip
    write(root, "optimizers/endpoints", frame)


def write_quickstart(root, sizes=(2e4, 2e5), seeds=(0,), slope=0.0):
    found = []
    for n in sizes:
        for seed in seeds:
            for arm, factor in (("fp16", 1.0), ("ternary", 1.03 * (n / sizes[0]) ** slope)):
                for tokens in (1e5, 2e5):
                    noise = 1 + 1e-4 * (seed - 1) * (arm == "ternary")
                    found.append((f"{n:g}", arm, n, seed, tokens, 2 * factor * noise))
    names = ["size", "precision", "params_non_embedding", "seed", "tokens", "loss"]
    frame = pd.DataFrame(found, columns=names).assign(loss_stderr=0.004, status="ok")
    write(root, "quickstart/endpoints", frame)


def write_quantize(root, absmean=1.0, best=0.5, calibrated=0.4, seeds=SEEDS):
    """Differences from the trained float16 model, at each seed."""
    (root / "quantize").mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        document = {"run_id": f"95k-fp16-s{seed}", "calibration_steps": 200, "results": [
            _quantized("as trained", None, False, 0.0),
            _quantized("int4_absmax", "channel", False, 0.01),
            _quantized("ternary_absmean", "tensor", False, absmean + 1e-3 * seed),
            _quantized("ternary_optimal", "channel", False, best + 1e-3 * seed),
            _quantized("ternary", "channel", True, calibrated + 1e-3 * seed),
        ]}  # fmt: skip
        (root / f"quantize/{seed}.json").write_text(json.dumps(document))


def _quantized(weights, granularity, calibrated, difference):
    return {
        "weights": weights, "granularity": granularity, "activations": "none",
        "calibrated": calibrated, "loss": 2 + difference, "loss_stderr": 0.004,
        "bits_per_byte": 3.0, "difference": difference,
    }  # fmt: skip


def write_ladder(root, bits=(5.0, 1.6), energy=(4.0, 2.0)):
    """Two sizes, 30k first; bits a ternary parameter, ternary picojoules to float16's 10."""
    found = []
    for size, n, own_bits, own_energy in zip(
        ("30k", "70b"), (30_000, 70_000_000_000), bits, energy, strict=True
    ):
        found.append((size, "fp16", n, int(0.9 * n), 16 * n, 10.0))
        found.append((size, "ternary", n, int(0.9 * n), own_bits * n, own_energy))
    names = ["size", "precision", "params_total", "params_non_embedding", "model_bits"]
    frame = pd.DataFrame(found[::-1], columns=[*names, "energy_pj_per_token"])
    write(root, "ladder", frame)


def write_decode(root, ratios=(2.5, 3.0)):
    named = {f"decode_speed/{i}": {"median": ratio} for i, ratio in enumerate(ratios)}
    (root / "decode.json").write_text(json.dumps({"ratios": named}))


def write_others(root):
    """Every file but the ingredients' endpoints."""
    for step in (
        write_latents, write_presets, write_rates, write_optimizers, write_quickstart,
        write_quantize, write_ladder, write_decode,
    ):  # fmt: skip
        step(root)


def write_small(root):
    """Every file, but few ingredients: quick to judge."""
    few = ("estimator clipped", "estimator trust", "estimator stochastic")
    few += ("Lion", "Muon", "Bop", "clipped latents", "fp16")
    minimal = {("with", x): MINIMAL["with", x] for x in ("trust estimator", "sub-norms")}
    full = {("instead", x): FULL["instead", x] for x in few}
    write_ingredients(root, bases={"full": full, "minimal": minimal})
    write_others(root)


def found(root):
    """Findings by the claims' numbers."""
    return {i: f for i, (_, f) in enumerate(claims.findings(Results(root)), 1)}
