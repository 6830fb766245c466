"""Write what a sweep found: fits.json, figures/ and report.html, from its endpoints.parquet alone.

python -m experiments.report results/quickstart
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from analysis.arm_pairs import Comparisons, baseline_of, compare_arms
from analysis.arms import ArmFits, accepted, fit_arms
from analysis.comparing import Comparison
from analysis.curves import loss_against_compute
from analysis.fitting import Fit
from analysis.tables import (
    COLUMNS,
    AnalysisError,
    count_text,
    finished,
    paired_differences,
    read_table,
    require,
)
from bitnet_jax.errors import ConfigError
from bitnet_jax.files import SCHEMA_VERSION, DamagedFile, read_json, replacing, write_json
from bitnet_jax.tracking import JOINED
from experiments.report_page import page

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TABLE_HEADER = (
    "size", "arm", "seed", "tokens", "loss", "bits/byte", "FLOPs", "model bits", "status",
)  # fmt: skip
PROVENANCE = ("git_commit", "jax_version", "device")
_FEW_POINTS = 20
_REQUIRED = ("run_id", "size", "precision", "seed", "loss", "loss_stderr", "bits_per_byte",
             "model_bits", "status", *COLUMNS.values(), *PROVENANCE)  # fmt: skip

_NUMBERS = ("seed", "loss", "loss_stderr", "bits_per_byte", "model_bits", *COLUMNS.values())


def endpoint_table(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    """A row of text an endpoint, under TABLE_HEADER, from the smallest size to the largest."""
    ordered = frame.sort_values([COLUMNS["n"], COLUMNS["d"], "seed", "precision"])
    rows: list[tuple[str, ...]] = []
    for row in ordered.itertuples():
        ok = row.status == "ok"
        loss = f"{row.loss:.4f} ± {row.loss_stderr:.4f}" if ok else "-"
        bits = f"{row.bits_per_byte:.3f}" if ok else "-"
        rows.append(
            (
                str(row.size),
                str(row.precision),
                str(row.seed),
                count_text(row.tokens),
                loss,
                bits,
                f"{row.flops:.2e}",
                count_text(row.model_bits),
                str(row.status),
            )
        )
    return rows


def fit_lines(document: Mapping[str, Any]) -> list[str]:
    """What fits.json says of each arm's law, in plain lines for a terminal or a page."""
    lines = []
    for arm, laws in document["fits"].items():
        for law, found in laws.items():
            if "refused" in found:
                lines.append(f"{arm}: no {law} fit: {found['refused']}")
                continue
            lines.append(
                f"{arm}: {found['equation']}  ({law}, {found['n_points']} points, "
                f"{found['objective']} {found['objective_value']:.3g}, "
                f"rms log residual {found['rms_log_residual']:.2g})"
            )
            lines += [f"{arm}: warning: {warning}" for warning in found["warnings"]]
    return lines


def _paired_sentences(frame: pd.DataFrame, baseline: str, treatment: str) -> list[str]:
    pairs = paired_differences(frame, baseline, treatment)
    if pairs.empty:
        return [f"No {treatment} endpoint shares size, tokens and seed with a {baseline} one."]
    runs = pairs.groupby(["size", "seed"])[["difference", "relative"]].mean()
    mean, percent = runs["difference"].mean(), 100 * runs["relative"].mean()
    where = "above" if mean > 0 else "below"
    headline = (
        f"At equal size, tokens and seed, the {treatment} arm's held-out loss is "
        f"{abs(percent):.2f} % {where} that of {baseline} ({mean:+.4f} nats a token)."
    )
    if len(runs) == 1:
        return [headline, "That is one pair of runs: how much of it is chance is unknown."]
    low, high = pairs["difference"].min(), pairs["difference"].max()
    return [
        headline,
        f"That is the mean of {len(runs)} pairs of runs, with a standard error of "
        f"{runs['difference'].sem():.4f}; the {len(pairs)} pairs of endpoints differ by {low:+.4f} "
        f"to {high:+.4f}.",
    ]


def _compute_sentence(
    frame: pd.DataFrame, fits: Mapping[str, Fit], baseline: str, treatment: str
) -> str:
    pair = (baseline, treatment)
    missing = [arm for arm in pair if arm not in fits]
    if missing or fits[baseline].law != fits[treatment].law:
        return "The arms cannot be compared at equal compute: no law was fitted to both."
    kept = finished(frame)
    rows = {arm: kept[kept["precision"] == arm] for arm in pair}
    low = max(own["flops"].min() for own in rows.values())
    high = min(own["flops"].max() for own in rows.values())
    if low >= high:
        return "The arms cannot be compared at equal compute: their ranges do not overlap."
    compute = np.geomspace(low, high, 100)
    base, treated = (loss_against_compute(fits[arm], rows[arm], compute) for arm in pair)
    percent = 100 * (treated.loss / base.loss - 1)
    return (
        f"At equal training compute, the {treatment} arm's fitted loss differs from that of "
        f"{baseline} by {percent.min():+.2f} to {percent.max():+.2f} % over {low:.1e} to "
        f"{high:.1e} FLOPs ({fits[baseline].law.name} fits)."
    )


def _caution(fits: Mapping[str, Fit]) -> str | None:
    """How little the fits rest on, if it is little."""
    fewest = min((found.n_points for found in fits.values()), default=0)
    if fits and fewest >= _FEW_POINTS:
        return None
    return f"{fewest} fitted points an arm: a demonstration, not an answer."


def verdict(frame: pd.DataFrame, fits: ArmFits, comparisons: Comparisons) -> list[str]:
    """What the endpoints say, in sentences: whether the arms follow one law, where that was tested;
    the paired evidence; then the fits."""
    usable = accepted(fits)
    arms = list(dict.fromkeys(frame["precision"]))
    baseline = baseline_of(frame)
    told = [found.sentence for found in comparisons.values() if isinstance(found, Comparison)]
    sentences = [sentence[0].upper() + sentence[1:] for sentence in told]
    for treatment in arms:
        if baseline is not None and treatment != baseline:
            sentences += _paired_sentences(frame, baseline, treatment)
            sentences.append(_compute_sentence(frame, usable, baseline, treatment))
            refused = comparisons.get(treatment)
            if isinstance(refused, str):
                sentences.append(f"Whether {treatment} follows {baseline}'s law: {refused}.")
    caution = _caution(usable)
    if caution is not None:
        sentences.append(caution)
    left_out = len(frame) - len(finished(frame))
    if left_out:
        sentences.append(f"{left_out} of {len(frame)} endpoints did not finish and enter no fit.")
    for column in (*PROVENANCE, "schema_version"):
        values = _values(frame, column) if column in frame else []
        if len(values) > 1:
            sentences.append(f"The endpoints mix {len(values)} values of {column}.")
    return sentences


def _require_numbers(frame: pd.DataFrame) -> None:
    """AnalysisError names the first column that should hold numbers and has something else."""
    import pandas as pd

    for column in _NUMBERS:
        if not (pd.api.types.is_numeric_dtype(frame[column]) or frame[column].isna().all()):
            raise AnalysisError(f"column {column!r}: it must hold numbers")


def _values(frame: pd.DataFrame, column: str) -> list[str]:
    """The distinct values of a column of provenance; a run that went on under another has both."""
    return sorted({part for cell in frame[column].unique() for part in str(cell).split(JOINED)})


def _provenance(frame: pd.DataFrame) -> dict[str, str]:
    """All values of each column that says how endpoints were made, and this Python's version."""
    made = {column: ", ".join(_values(frame, column)) for column in PROVENANCE}
    return {**made, "python of the report": platform.python_version()}


def _save_figure(figure: Figure, folder: Path, name: str) -> Path:
    """Write a figure's PNG and SVG, each whole or not at all; the SVG."""
    from analysis import plots

    with tempfile.TemporaryDirectory() as scratch:
        for drawn in plots.save(figure, Path(scratch) / name):
            with replacing(folder / drawn.name) as temporary:
                temporary.write_bytes(drawn.read_bytes())
    return folder / f"{name}.svg"


def _write_figures(
    frame: pd.DataFrame,
    fits: Mapping[str, Fit],
    comparisons: Comparisons,
    references: Mapping[str, float],
    folder: Path,
) -> dict[str, Path]:
    """The SVG of each figure by name, with its PNG beside it; none without a finished endpoint.

    Where several arms were compared with the baseline, the first is drawn.
    """
    from analysis import figures as drawings
    from analysis import plots

    if finished(frame).empty:
        return {}
    folder.mkdir(exist_ok=True)
    figures = {"loss_vs_compute": plots.loss_vs_compute(frame, fits, references)}
    surfaces = {arm: found for arm, found in fits.items() if found.law.name == "chinchilla"}
    if surfaces:
        figures["loss_vs_parameters"] = plots.loss_vs_parameters(frame, surfaces)
    for found in comparisons.values():
        if isinstance(found, Comparison) and found.estimates is not None:
            for draw in (drawings.relative_difference, drawings.multiplier, drawings.cost_ratios):
                figures.setdefault(draw.__name__, draw(found))
    return {name: _save_figure(figure, folder, name) for name, figure in figures.items()}


def _remembered(path: Path) -> dict[str, Any]:
    """What an earlier report of this sweep was told: title, references and facts."""
    if not path.is_file():
        return {}
    try:
        document = read_json(path)
    except DamagedFile as error:
        raise AnalysisError(f"{error}; delete it to write a new one") from error
    told: dict[str, Any] = {
        key: document[key] for key in ("title", "references", "facts") if key in document
    }
    references, facts = told.get("references", {}), told.get("facts", {})
    if not (
        isinstance(told.get("title", ""), str)
        and isinstance(facts, dict)
        and isinstance(references, dict)
        and all(isinstance(x, float | int) and math.isfinite(x) for x in references.values())
    ):
        raise AnalysisError(f"{path}: is not a report's; delete it to write a new one")
    return told


def _finite(value: Any) -> Any:
    """JSON has no words for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _document(
    frame: pd.DataFrame, fits: ArmFits, comparisons: Comparisons, told: Mapping[str, Any]
) -> dict[str, Any]:
    """What fits.json holds."""
    described = {
        arm: {
            law: found.to_json() if isinstance(found, Fit) else {"refused": found}
            for law, found in laws.items()
        }
        for arm, laws in fits.items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        **told,
        "columns": COLUMNS,
        "verdict": verdict(frame, fits, comparisons),
        "provenance": _provenance(frame),
        "fits": described,
        "comparison": {
            arm: found.to_json() if isinstance(found, Comparison) else {"refused": found}
            for arm, found in comparisons.items()
        },
    }


def write_report(
    sweep_dir: str | Path,
    *,
    title: str | None = None,
    references: Mapping[str, float] | None = None,
    facts: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Fit, draw and describe the sweep in `sweep_dir`; returns the paths written, by name.

    `references` are losses (nats a token) to draw as lines, by label; `facts` say how the sweep was
    made. What is not given is taken from the sweep's last report. AnalysisError if the table cannot
    be read or lacks a column.
    """
    sweep_dir = Path(sweep_dir)
    frame = read_table(sweep_dir / "endpoints.parquet")
    require(frame, *_REQUIRED)
    _require_numbers(frame)
    told: dict[str, Any] = {"title": sweep_dir.name, "references": {}, "facts": {}}
    given = {"title": title, "references": references, "facts": facts}
    if None in given.values():
        told |= _remembered(sweep_dir / "fits.json")
    told |= {key: value for key, value in given.items() if value is not None}
    fits = fit_arms(frame)
    comparisons = compare_arms(frame)
    document = _document(frame, fits, comparisons, told)
    figures = _write_figures(
        frame, accepted(fits), comparisons, told["references"], sweep_dir / "figures"
    )
    paths = {"fits": sweep_dir / "fits.json", "report": sweep_dir / "report.html"}
    write_json(paths["fits"], _finite(document))
    unfinished = frame[frame["status"] != "ok"][["run_id", "tokens", "status"]]
    rows = [TABLE_HEADER, *endpoint_table(frame)]
    lost = [(str(run), count_text(tokens), str(why)) for run, tokens, why in unfinished.to_numpy()]
    html = page(document, rows, lost, fit_lines(document), figures)
    with replacing(paths["report"]) as temporary:
        # Half of a surrogate pair, which JSON can spell, is no character.
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")
    return paths | {name: svg.with_suffix(".png") for name, svg in figures.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AnalysisError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    parser = _Parser(prog="python -m experiments.report", description=__doc__.splitlines()[0])
    parser.add_argument("sweep_dir", metavar="SWEEP_DIR", help="holds endpoints.parquet")
    try:
        paths = write_report(parser.parse_args(argv).sweep_dir)
    except (AnalysisError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, path in paths.items():
        print(f"{name}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
