"""What two documents and the papers say of BitNet, claim by claim, against what was measured here.

    python -m analysis.claims results/cpu-2core [--json]

Every number and verdict is computed from the files under the root (`analysis.result_files`) by the
rules of `analysis.verdicts`, or by a claim's own, which its `how` states; a file that is not there
makes a claim "not measured yet" and is named with the command that writes it. Losses are held-out,
in nats a token.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from analysis.command import Parser, status
from analysis.ingredients import BASE, COVERAGE, weight_variants
from analysis.learning_rate import optima
from analysis.multiplicity import SIGNIFICANT
from analysis.result_files import Missing, Results, against
from analysis.tables import AnalysisError, count_text, finished, numbers, require
from analysis.verdicts import (
    MARGIN,
    Finding,
    Verdict,
    all_or_none,
    beside,
    by_name,
    clearly,
    cost,
    every,
    gain,
    helps,
    judged,
    needed,
    opposite,
    some,
)

TRIT_BITS = math.log2(3)
STORAGE_TOLERANCE = 0.05  # relative: how near to log2(3) an average of "1.58 bits" has to lie
SAVING = (0.55, 0.82)  # of energy, as claimed
SPEEDUP = 2.0  # the lower end of what is claimed
SEVERAL = 2.0  # times: the least that "several times higher" can mean
STRONG = 0.7  # a rank correlation from which one may speak of predicting
LAW_SPAN, LAW_SEEDS, LAW_SLOPE = 100.0, 3, 0.01  # what a statement on the scaling law asks for


@dataclass(frozen=True)
class Claim:
    text: str
    source: str
    how: str
    judge: Callable[[Results], Finding]


def _optional(measure: Callable[[], Finding]) -> Finding:
    """What decides nothing must not make a claim "not measured yet"."""
    try:
        return measure()
    except Missing as missing:
        return Finding(Verdict.MISSING, note=str(missing))


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t interval, infinite for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), math.inf
    half = stats.t.ppf((1 + COVERAGE) / 2, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(half)


# Claims judged by effects alone.


def _shadow_weights(results: Results) -> Finding:
    effects = results.effects
    return every(
        judged(needed, cost(effects, "full", "without", "float32 latents")),
        judged(needed, cost(effects, "full", "instead", "bfloat16 latents, stochastic")),
    )


def _straight_through(results: Results) -> Finding:
    effects = results.effects
    better = some(
        *(
            judged(needed, gain(effects, "full", "instead", f"estimator {name}"))
            for name in ("clipped", "trust", "stochastic")
        ),
        judged(needed, gain(effects, "minimal", "with", "trust estimator")),
    )
    cosine = _optional(lambda: _gradient_cosine(results))
    return replace(beside(opposite(better), cosine), note=cosine.note)


def _gradient_cosine(results: Results) -> Finding:
    """How near the estimators' gradients come to finite differences, mean over seeds."""
    rows = results.gradients
    with results.about("gradients/latents"):
        means = rows.groupby("tag_change")["gradient_cosine"].mean().dropna()
    names = {"": "identity", **{f"estimator {n}": n for n in ("clipped", "trust", "stochastic")}}
    values = {f"gradient cosine, {names[key]}": means[key] for key in names if key in means}
    text = ", ".join(f"{key.split(', ')[1]} {value:.3f}" for key, value in values.items())
    return Finding(Verdict.HOLDS, f"gradient cosine: {text}" if text else "", "", values)


def _initialisation(results: Results) -> Finding:
    effects, plain = results.effects, results.against_plain_init
    specials = ("init nanotron", "init SubLN", "init quantizer")
    residual = judged(needed, cost(effects, "full", "without", "residual init"))
    full = (judged(needed, gain(plain, "full", "instead", name)) for name in specials)
    added = ("residual init", "SubLN init", "quantizer init")
    minimal = (judged(needed, gain(effects, "minimal", "with", name)) for name in added)
    return every(some(residual, *full), some(*minimal))


_WEAK = ("", ", weak")  # the sweep's two coefficients


def _regularizer(results: Results) -> Finding:
    effects = results.effects
    names = [f"{name}{weak}" for name in ("sin^2 toward levels", "dampening") for weak in _WEAK]
    toward = some(
        *(judged(helps, gain(effects, "full", "instead", name)) for name in names),
        judged(helps, gain(effects, "minimal", "with", "sin^2 toward levels")),
    )
    away = [
        f"{x}{weak}" for x in ("sin^2 away from levels", "dampening reversed") for weak in _WEAK
    ]
    return beside(toward, *(judged(helps, cost(effects, "full", "instead", x)) for x in away))


def _optimizer(results: Results) -> Finding:
    effects = results.effects
    found = some(
        *(
            judged(needed, gain(effects, "full", "instead", name))
            for name in ("Lion", "Muon", "Bop", "clipped latents")
        )
    )
    rates = _optional(lambda: _rates(results))
    note = "whether 16-bit training would gain the same is not measured"
    return replace(beside(found, rates), note="; ".join(filter(None, (rates.note, note))))


def _rates(results: Results) -> Finding:
    """The best rate tried of each optimizer, and whether it lies at an end of those tried."""
    frame = results.table("optimizers/endpoints")
    with results.about("optimizers/endpoints"):
        require(frame, "tag_optimizer", "precision", "peak_lr", "loss")
        rows = finished(frame)[lambda f: f["precision"] == "ternary"]
        numbers(rows, "loss")
        numbers(rows, "peak_lr")
    texts = []
    for name, own in rows.groupby("tag_optimizer"):
        rates = sorted(own["peak_lr"].unique())
        best = own.loc[own["loss"].idxmin(), "peak_lr"]
        end = ", at an end" if len(rates) > 1 and best in (rates[0], rates[-1]) else ""
        texts.append(f"{name} {best:g} of {len(rates)}{end}")
    return Finding(Verdict.HOLDS, note=f"best rates tried: {', '.join(texts)}")


def _squared_relu(results: Results) -> Finding:
    return _left_out_and_added(results, "squared ReLU")


def _sub_norms(results: Results) -> Finding:
    effects = results.effects
    inside = judged(needed, cost(effects, "full", "instead", "norm in every linear"))
    alone = judged(needed, gain(effects, "minimal", "with", "norm in every linear"))
    return beside(_left_out_and_added(results, "sub-norms"), inside, alone)


def _left_out_and_added(results: Results, ingredient: str) -> Finding:
    """Needed in both recipes: it costs to leave it out of one, it gains to add it to the other."""
    effects = results.effects
    return every(
        judged(needed, cost(effects, "full", "without", ingredient)),
        judged(needed, gain(effects, "minimal", "with", ingredient)),
    )


def _ternary_activations(results: Results) -> Finding:
    effects = results.effects
    names = ("ternary_absmean", "ternary_twn", "ternary_twn, rotated")
    full = [judged(needed, cost(effects, "full", "instead", f"activations {n}")) for n in names]
    minimal = judged(needed, cost(effects, "minimal", "with", "ternary activations"))
    return opposite(every(*full, minimal))


def _warmup(results: Results) -> Finding:
    effects = results.effects
    shapes = ("linear", "exponential", "sigmoid")
    full = (judged(helps, gain(effects, "full", "instead", f"warm-up {x}")) for x in shapes)
    return some(*full, judged(helps, gain(effects, "minimal", "with", "linear warm-up")))


def _two_stage(results: Results) -> Finding:
    effects = results.effects
    found = some(
        judged(helps, gain(effects, "full", "instead", "schedule two-stage")),
        judged(helps, gain(effects, "minimal", "with", "two-stage schedule")),
    )
    others = [("instead", "schedule cosine"), ("instead", "schedule TriLM")]
    others.append(("without", "weight decay"))
    aside = (judged(helps, cost(effects, "full", *key)) for key in others)
    return beside(found, *aside, judged(helps, gain(effects, "minimal", "with", "weight decay")))


def _worse(results: Results) -> Finding:
    effects = results.effects
    # The variant is float16, so its gain is what ternary training costs.
    excess = gain(effects, "full", "instead", "fp16")
    found = judged(clearly, excess)
    if not isinstance(excess, str) and math.isfinite(excess.mid):
        base_loss = effects["full", "instead", "fp16"]["base_loss"]
        relative = excess.mid / (base_loss - excess.mid)
        text = f"{found.number} (ternary {relative:+.1%})"
        found = replace(found, number=text, values={**found.values, "relative": relative})
    return beside(found, _optional(lambda: _quickstart_gap(results)))


def _quickstart_gap(results: Results) -> Finding:
    """The gap at each size's largest budget."""
    last = results.largest_budgets
    texts = [f"{row['size']} {row['difference']:+.3f}" for row in last.to_dict("records")]
    mean = float(last["relative"].mean())
    text = f"quickstart, ternary minus float16: {', '.join(texts)}, mean {mean:+.1%}"
    return Finding(Verdict.HOLDS, text, values={"quickstart, relative": mean})


def _blog(results: Results) -> Finding:
    frame = results.table("presets/endpoints")
    with results.about("presets/endpoints"):
        require(frame, "train_loss", "tag_change")
        numbers(finished(frame), "peak_lr")
        held_out = against(frame, "llama", "blog_llama")
        trained = against(frame.assign(loss=frame["train_loss"]), "llama", "blog_llama")
    names = ("held-out", "training")
    parts = []
    for name, effects in zip(names, (held_out, trained), strict=True):
        excess = cost(by_name(effects), "llama", "instead", "blog_bitnet15")
        label = f"BitNet minus LLaMA, {name} loss"
        excess = label if isinstance(excess, str) else excess._replace(label=label)
        parts.append(judged(needed, excess))
    blog = frame["tag_change"].isin(["blog_bitnet15", "blog_llama"])
    rates = sorted(frame.loc[blog, "peak_lr"].unique())
    note = f"peak rate{'s' * (len(rates) > 1)} {', '.join(f'{rate:g}' for rate in rates)}"
    return replace(every(*parts), note=note if rates else "")


# Claims with a rule of their own.


def _storage(results: Results) -> Finding:
    rows = results.ladder
    per = rows["model_bits"] / rows["params_total"]
    near = (per - TRIT_BITS).abs() <= STORAGE_TOLERANCE * TRIT_BITS
    shown = rows.assign(per=per).iloc[[0, -1]].to_dict("records")
    texts = [f"{row['per']:.2f} bits a parameter at {row['size']}" for row in shown]
    values = {f"bits a parameter, {row['size']}": float(row["per"]) for row in shown}
    share = 1 - rows["params_non_embedding"] / rows["params_total"]
    note = f"embedding and head: {share.iloc[0]:.0%} of {rows['size'].iloc[0]}, "
    note += f"{share.iloc[-1]:.0%} of {rows['size'].iloc[-1]}; within "
    note += f"{STORAGE_TOLERANCE:.0%} of {TRIT_BITS:.3f} bits: {', '.join(rows['size'][near])}"
    note += "no size" if not near.any() else ""
    verdict = Verdict.HOLDS if near.iloc[-1] else Verdict.FAILS
    entropy = _optional(lambda: _entropy(results))
    return beside(Finding(verdict, ", ".join(texts), note, values), entropy)


def _entropy(results: Results) -> Finding:
    rows = results.latents
    with results.about("ingredients/latents"):
        mean = float(numbers(rows[rows["tag_kind"] == BASE], "latent_entropy").mean())
    text = f"a trit of the trained base carries {mean:.3f} bits"
    return Finding(Verdict.HOLDS, text, values={"entropy, bits a weight": mean})


def _quantizing(results: Results) -> Finding:
    runs = results.quantized
    trained = gain(results.effects, "full", "instead", "fp16")
    if isinstance(trained, str):
        return Finding(Verdict.MISSING, f"{trained}: not measured")
    measured = {
        "direct absmean": _least(runs, "ternary_absmean", False),
        "best direct ternary": _least(runs, "ternary", False),
        "calibrated scales": _least(runs, "ternary", True),
        "direct int4": _least(runs, "int4", False),
    }
    direct = measured["best direct ternary"]
    if not direct:
        return Finding(Verdict.MISSING, "a directly quantized model: not measured")
    mean, half = _interval(direct)
    verdict = Verdict.UNKNOWN
    # An undecided cost of training (NaN) leaves the margin as the bound.
    if mean - half > np.fmax(MARGIN, trained.high):
        verdict = Verdict.HOLDS
    elif mean + half < np.fmax(MARGIN, trained.low):
        verdict = Verdict.FAILS
    values = {name: float(np.mean(found)) for name, found in measured.items() if found}
    values["trained ternary"] = trained.mid
    text = "above float16: " + ", ".join(f"{k} {v:+.4f}" for k, v in values.items())
    return Finding(verdict, text, f"{len(direct)} float16 runs; best ± {half:.4f}", values)


def _least(runs: dict[str, list[dict[str, Any]]], weights: str, calibrated: bool) -> list[float]:
    """The least loss above float16 of each run that has such rows."""
    chosen = (
        [
            row["difference"]
            for row in rows
            if row["weights"].startswith(weights) and row["calibrated"] == calibrated
        ]
        for rows in runs.values()
    )
    return [min(found) for found in chosen if found]


def _decode(results: Results) -> Finding:
    ratios = results.decode_ratios
    texts = [f"{name.partition('/')[2]} {ratio:.2f}" for name, ratio in ratios.items()]
    verdict = all_or_none([ratio >= SPEEDUP for ratio in ratios.values()])
    return Finding(verdict, f"speed over its 16-bit twin: {', '.join(texts)}", values=ratios)


def _energy(results: Results) -> Finding:
    rows = results.ladder
    saving = 1 - rows["energy_pj_per_token"] / rows["energy_pj_per_token_fp16"]
    ends = [0, len(rows) - 1]
    texts = [f"{saving.iloc[i]:.0%} less at {rows['size'].iloc[i]}" for i in ends]
    inside = int(saving.between(*SAVING).sum())
    above = int((saving > SAVING[1]).sum())
    note = f"{inside} of {len(rows)} sizes inside the claimed range, {above} above it; "
    note += "in the arithmetic model only: memory traffic is not in it, nothing was measured"
    values = {f"saving, {rows['size'].iloc[i]}": float(saving.iloc[i]) for i in ends}
    verdict = all_or_none(list(saving >= SAVING[0]))
    return Finding(verdict, ", ".join(texts), note, values)


def _higher_rate(results: Results) -> Finding:
    frame = results.table("learning_rate/endpoints")
    with results.about("learning_rate/endpoints"):
        numbers(finished(frame), "loss")
        numbers(frame, "peak_lr")
        best = optima(frame)
        require(frame, "seed")
    keys = ["params_non_embedding", "size", "tokens"]
    arms = best.pivot(index=keys, columns="precision", values="optimum")
    if not {"ternary", "fp16"} <= set(arms):
        return Finding(Verdict.MISSING, "a ternary and a float16 row of rates: not measured")
    ratios = (arms["ternary"] / arms["fp16"]).dropna()
    seeds = frame["seed"].nunique()
    note = f"{seeds} seed{'s' * (seeds > 1)}; {len(arms) - len(ratios)} sizes with an optimum "
    note += "outside the rates tried"
    if len(ratios) < 2:
        return Finding(Verdict.UNKNOWN, "fewer than two sizes have both optima", note)
    values = {f"ratio, {key[1]}": float(ratio) for key, ratio in ratios.items()}
    text = ", ".join(f"{key.split(', ')[1]} {value:.2f}" for key, value in values.items())
    verdict = all_or_none(list(ratios >= SEVERAL))
    return Finding(verdict, f"ternary optimum over float16's: {text}", note, values)


def _prediction(results: Results) -> Finding:
    rows = weight_variants(results.comparison.effects)
    rows = rows[(rows["diverged"] == 0) & (rows["base"] == "full")]
    if rows.empty:
        return Finding(Verdict.MISSING, "other weight quantizers: not measured")
    n = len(rows)
    if n < 5 or rows["weight_mse"].nunique() < 2:
        return Finding(Verdict.UNKNOWN, f"{n} quantizers: too few for a correlation")
    found = stats.spearmanr(rows["weight_mse"], rows["difference"])
    rho, p = float(found.statistic), float(found.pvalue)
    verdict = Verdict.UNKNOWN
    if rho >= STRONG and p < SIGNIFICANT:
        verdict = Verdict.HOLDS
    elif rho < STRONG and _upper(rho, n) < STRONG:
        verdict = Verdict.FAILS
    text, values = f"Spearman {rho:.2f} over {n} variants (p {p:.2g})", {"spearman": rho}
    trits = rows[rows["change"].str.startswith("weights ternary")]
    if trits["weight_mse"].nunique() > 2:
        values["spearman, ternary"] = float(
            stats.spearmanr(trits["weight_mse"], trits["difference"]).statistic
        )
        text += f"; {values['spearman, ternary']:.2f} over the {len(trits)} ternary ones alone"
    return Finding(verdict, text, values=values)


def _upper(rho: float, n: int) -> float:
    """Upper end of a rank correlation's 95 % interval (Fieller et al. 1957)."""
    return math.tanh(math.atanh(max(rho, -1 + 1e-12)) + 1.96 * math.sqrt(1.06 / (n - 3)))


def _same_law(results: Results) -> Finding:
    pairs = results.largest_budgets
    span = float(pairs["n"].max() / pairs["n"].min())
    seeds = int(pairs.groupby("size")["seed"].nunique().min())
    sizes = f"{pairs['size'].nunique()} sizes, {count_text(pairs['n'].min())} to "
    text = f"{sizes}{count_text(pairs['n'].max())} (a factor of {span:.0f}), {seeds} seed"
    text += "s" * (seeds > 1)
    values = {"span": span, "seeds": float(seeds)}
    if span < LAW_SPAN or seeds < LAW_SEEDS:
        note = f"too little: a factor of {LAW_SPAN:.0f} and {LAW_SEEDS} seeds are asked for"
        return Finding(Verdict.UNKNOWN, text, note, values)
    fit = stats.linregress(np.log(pairs["n"]), np.log1p(pairs["relative"]))
    half = stats.t.ppf((1 + COVERAGE) / 2, len(pairs) - 2) * fit.stderr
    verdict = Verdict.UNKNOWN
    if abs(fit.slope) + half < LAW_SLOPE:
        verdict = Verdict.HOLDS
    elif abs(fit.slope) > half:
        verdict = Verdict.FAILS
    text += f"; slope of log(ternary / float16) on log(parameters) {fit.slope:+.4f} ± {half:.4f}"
    return Finding(verdict, text, values={**values, "slope": float(fit.slope)})


_OVERVIEW = "overview of what BitNet needs"
_BLOG = "blog 'Experiments with BitNet 1.5'"
_BOTH = "In both recipes: the loss rises where {0} left out of `full` and falls where added to "
_BOTH += "`minimal` (needed)."

CLAIMS = (
    Claim(
        "FP32 shadow weights are needed",
        _OVERVIEW,
        "`full` with latent weights kept in bfloat16, rounded to nearest and rounded "
        "stochastically: both must cost (needed).",
        _shadow_weights,
    ),
    Claim(
        "The identity is a good enough straight-through estimator",
        _OVERVIEW,
        "Clipped, trust and stochastic estimators in its place: holds if none gains as much as the "
        "margin; the cosine between its gradient and finite differences is shown, not judged.",
        _straight_through,
    ),
    Claim(
        "A special initialisation is needed",
        _OVERVIEW,
        "In both recipes: some special initialisation (residual, nanotron, SubLN, quantizer) "
        "gains over Flax's plain one (needed), which in `full` the last three are held against.",
        _initialisation,
    ),
    Claim(
        "A regularizer that pulls weights to -1, 0, +1 helps",
        _OVERVIEW,
        "sin^2 or dampening added, at a coefficient of 1 or of .1 (weak): some lowers the loss "
        "(helps); the same with their signs reversed are shown, not judged.",
        _regularizer,
    ),
    Claim(
        "A special optimizer is needed",
        _OVERVIEW,
        "Lion, Muon and Bop in AdamW's place, each at its own best rate, and AdamW with clipped "
        "latent weights: some gains (needed).",
        _optimizer,
    ),
    Claim(
        "A special activation function (squared ReLU) is needed",
        _OVERVIEW,
        _BOTH.format("it is"),
        _squared_relu,
    ),
    Claim(
        "Activations can be ternary",
        _OVERVIEW,
        "Ternary activations in place of int8 ones in `full`, and added to `minimal`: holds if "
        "some way of them is sure to cost less than the margin.",
        _ternary_activations,
    ),
    Claim(
        "Storage averages 1.58 bits",
        _OVERVIEW,
        "Stored bits of information over all parameters, embedding and head at 16 bits: within 5 % "
        "of log2(3) at the ladder's largest size; the trained trits' entropy is shown.",
        _storage,
    ),
    Claim(
        "An FP16 model cannot simply be quantized to trits",
        _OVERVIEW,
        "Trained float16 models with trits for weights: holds if even the best direct quantizer's "
        "95 % interval lies above the margin and above what training ternary costs.",
        _quantizing,
    ),
    Claim(
        "CPU inference is 2 to 6 times faster",
        f"{_OVERVIEW}; bitnet.cpp",
        "Tokens a second of the packed model over its 16-bit twin on one CPU: holds if at least "
        "twice in every comparison, does not hold if in none.",
        _decode,
    ),
    Claim(
        "Energy is 55 to 82 % lower",
        f"{_OVERVIEW}; bitnet.cpp",
        "Energy of a token's arithmetic at 7 nm, ternary against float16, at every size of the "
        "ladder: holds if at least 55 % lower at all, does not hold if at none.",
        _energy,
    ),
    Claim(
        "Ternary models are clearly worse than FP16",
        _BLOG,
        "Float16 in place of ternary in `full`, each at its own rate, paired by seed (clearly).",
        _worse,
    ),
    Claim(
        "At an equal rate BitNet's loss stays above LLaMA's",
        _BLOG,
        "The blog's two recipes at its rate, paired by seed: held-out and training loss (needed).",
        _blog,
    ),
    Claim(
        "Ternary models want a several times higher learning rate",
        "BitNet b1.58: Training Tips, Code and FAQ; TriLM (arXiv:2407.12327)",
        "The optimum of each arm between the rates tried, at each size: holds if at least twice at "
        "every size, does not hold if at none.",
        _higher_rate,
    ),
    Claim(
        "A weight quantizer's error foretells the loss",
        "this project",
        "Spearman's correlation of mean squared error on normal weights and loss, over variants of "
        "`full`: at least .7 and p < .05; does not hold if its 95 % interval stays below .7.",
        _prediction,
    ),
    Claim(
        "Warming quantization up helps",
        f"{_OVERVIEW}; Hugging Face's fine-tuning to 1.58 bits",
        "Linear, exponential and sigmoid warm-up in `full`, linear in `minimal`: some lowers the "
        "loss (helps).",
        _warmup,
    ),
    Claim(
        "Two stages of learning rate and weight decay help",
        "BitNet b1.58: Training Tips, Code and FAQ; 2B4T (arXiv:2504.12285)",
        "The two-stage schedule in place of warmup-stable-decay: it lowers the loss in some recipe "
        "(helps); other schedules, and weight decay alone, are shown, not judged.",
        _two_stage,
    ),
    Claim(
        "Sub-norms are needed",
        "BitNet (arXiv:2310.11453); 2B4T (arXiv:2504.12285)",
        _BOTH.format("they are") + " A norm in every linear layer is shown, not judged.",
        _sub_norms,
    ),
    Claim(
        "1.58-bit training follows the same scaling law",
        "BitNet (arXiv:2310.11453)",
        "The quickstart's pairs at each size's largest budget: given a hundredfold of sizes and "
        "three seeds, whether log(ternary loss / float16 loss) has a slope on log(parameters): "
        "holds if it is within .01, does not hold if its interval excludes 0.",
        _same_law,
    ),
)


def findings(results: Results) -> list[tuple[Claim, Finding]]:
    """Every claim with what was found.

    Raises:
      AnalysisError: the root is not there, or a file in it is damaged.
    """
    if not results.root.is_dir():
        raise AnalysisError(f"{results.root}: no such directory")
    return [(claim, _found(claim, results)) for claim in CLAIMS]


def _found(claim: Claim, results: Results) -> Finding:
    try:
        return claim.judge(results)
    except Missing as missing:
        return Finding(Verdict.MISSING, note=str(missing))


def markdown(found: Sequence[tuple[Claim, Finding]]) -> str:
    """The table as GitHub and Jupyter show it."""
    lines = [
        "| | claim | source | how measured | result | verdict |",
        "|--:|---|---|---|---|---|",
    ]
    for i, (claim, finding) in enumerate(found, 1):
        result = "<br>".join(filter(None, [*finding.number.split("; "), _emphasis(finding.note)]))
        # A star marks significance; two of them in a cell would make what is between italic.
        cells = [text.replace("*", "\\*") for text in (claim.text, claim.source, claim.how, result)]
        lines.append(f"| {i} | {' | '.join(cells)} | **{finding.verdict}** |")
    return "\n".join(lines)


def _emphasis(note: str) -> str:
    return f"({note})" if note else ""


def readable(found: Sequence[tuple[Claim, Finding]], width: int = 100) -> str:
    """The table for a terminal: a line a claim, then what each rests on."""
    verdicts = [finding.verdict for _, finding in found]
    longest = max(len(claim.text) for claim, _ in found)
    lines = [f"{i:2}  {c.text.ljust(longest)}  {f.verdict}" for i, (c, f) in enumerate(found, 1)]
    lines += ["", ", ".join(f"{verdicts.count(v)} {v}" for v in Verdict)]
    lines.append("±: 95 % interval; *: Holm-adjusted p < .05; nats a token, variant minus base")
    for i, (claim, finding) in enumerate(found, 1):
        lines += ["", f"{i:2}  {claim.text}: {finding.verdict}"]
        for word, text in (
            ("source", claim.source),
            ("how", claim.how),
            ("result", finding.number),
            ("note", finding.note),
        ):
            head = f"    {word:<7} "
            lines += textwrap.wrap(
                text, width, initial_indent=head, subsequent_indent=" " * len(head)
            )
    return "\n".join(lines)


def to_json(found: Sequence[tuple[Claim, Finding]]) -> list[dict[str, Any]]:
    """What `--json` prints; a value that is not finite is null."""
    return [
        {
            "number": i,
            "claim": claim.text,
            "source": claim.source,
            "how": claim.how,
            "verdict": str(finding.verdict),
            "result": finding.number,
            "note": finding.note,
            "values": {name: _finite(value) for name, value in finding.values.items()},
        }
        for i, (claim, finding) in enumerate(found, 1)
    ]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _run(argv: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m analysis.claims", description="Claims on BitNet, measured.")
    parser.add_argument("root", metavar="RESULTS", type=Path, help="a directory of results")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    found = findings(Results(options.root))
    print(json.dumps(to_json(found), indent=1) if options.json else readable(found))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(argv))


if __name__ == "__main__":
    sys.exit(main())
