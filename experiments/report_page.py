"""The HTML of a sweep's report: one file that loads nothing else, for screens and paper."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5d5d5d; --line: #dcdcdc; --paper: #fff;
  --card: #f6f6f4; --warn: #9a5b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e3; --soft: #a5a29d; --line: #3a3a3c;
  --paper: #18191b; --card: #222427; --warn: #e2a64a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 54rem; padding: 1.2rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .4rem 0 1rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.verdict { background: var(--card); border-left: 4px solid #0072B2; border-radius: 4px;
  padding: .7rem 1rem; } .verdict p { margin: .35rem 0; }
.verdict p:first-child { font-size: 1.06rem; font-weight: 600; }
figure { margin: 1.2rem 0; } figcaption, .note { color: var(--soft); font-size: .88rem; }
figure img { display: block; width: 100%; background: #fff; border: 1px solid var(--line);
  border-radius: 4px; padding: .5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; } th { color: var(--soft); font-weight: 600; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; } .lost td { color: var(--warn); }
ul { padding-left: 1.1rem; } li { margin: .3rem 0; overflow-wrap: anywhere; }
.warning { color: var(--warn); } dl { display: grid; grid-template-columns: max-content 1fr;
  gap: .2rem 1rem; font-size: .9rem; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 11px; --paper: #fff; --ink: #000;
  --card: #f3f3f3; --soft: #444; --line: #ccc; } figure, tr { break-inside: avoid; } }
"""

_CAPTIONS = {
    "loss_vs_compute": "Held-out loss against training compute. Bars are standard errors of the "
    "evaluation; endpoints of one run are joined. Lines are the fitted laws, dashed where the best "
    "split of the compute would leave the observed sizes or tokens; bands, where drawn, are 95 % "
    "bootstrap intervals over runs. Dotted lines are the n-gram models explained below.",
    "loss_vs_parameters": "Held-out loss against parameters; points and fitted curves are coloured "
    "by their number of training tokens.",
    "relative_difference": "Relative difference of the arms' losses at each size and budget, by "
    "laws that share nothing, with 95 % intervals; dashed lines bound what is not relevant.",
    "multiplier": "What a parameter is worth: the line with its 95 % band lets the multiplier move "
    "with N and D, the points come of laws that share nothing, at equal loss.",
    "cost_ratios": "What equal loss costs, each arm with its best split of that cost; hollow where "
    "a best model lies outside the trained sizes or tokens. Bars are 95 % intervals.",
}

_REFERENCES = (
    "Losses of simple models for comparison, such as n-gram models counted on the same training "
    "text and scored on the same held-out text. A network above a line has not yet learned what "
    "counting that many neighbours gives."
)


def _element(tag: str, text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{escape(text)}</{tag}>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header; rows that did not end 'ok' are marked."""
    head = "".join(_element("th", cell) for cell in rows[0])
    body = []
    for row in rows[1:]:
        kind = "" if row[-1] == "ok" else ' class="lost"'
        body.append(f"<tr{kind}>{''.join(_element('td', cell) for cell in row)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _figure(name: str, svg: Path) -> str:
    """An image that carries its own data."""
    data = base64.b64encode(svg.read_bytes()).decode()
    caption = _CAPTIONS[name]
    return (
        f'<figure><img alt="{escape(name.replace("_", " "))}" '
        f'src="data:image/svg+xml;base64,{data}">{_element("figcaption", caption)}</figure>'
    )


def _section(heading: str, *parts: str) -> str:
    return "\n".join([_element("h2", heading), *parts])


def _list(lines: Sequence[str]) -> str:
    kinds = ["warning" if ": warning: " in line else "" for line in lines]
    items = (_element("li", line, kind) for line, kind in zip(lines, kinds, strict=True))
    return f"<ul>{''.join(items)}</ul>"


def _definitions(facts: Mapping[str, Any]) -> str:
    pairs = (_element("dt", str(k)) + _element("dd", str(v)) for k, v in facts.items())
    return f"<dl>{''.join(pairs)}</dl>"


def page(
    document: Mapping[str, Any],
    rows: Sequence[Sequence[str]],
    lost: Sequence[Sequence[str]],
    fits: Sequence[str],
    figures: Mapping[str, Path],
) -> str:
    """The whole page. `document` is fits.json; `rows` the endpoints with their header; `lost` the
    run, tokens and status of unfinished ones; `fits` the lines on each law; `figures` SVG files."""
    sentences = "".join(_element("p", sentence) for sentence in document["verdict"])
    parts = [f'<div class="verdict">{sentences}</div>']
    parts += [_figure(name, svg) for name, svg in figures.items()]
    parts.append(_section("Endpoints", _table(rows)))
    if lost:
        listed = _list([f"{run} at {tokens} tokens: {status}" for run, tokens, status in lost])
        parts.append(_section("Diverged or failed: in no fit", listed))
    parts.append(_section("Fitted laws", _list(fits)))
    parts.append(
        _element(
            "p",
            "Loss in nats a token; N counts all parameters, D training tokens, "
            "C training FLOPs with attention. The objective is the sum of Huber "
            "losses (delta 0.001) of log residuals.",
            "note",
        )
    )
    if document["references"]:
        references = {
            label: f"{loss:.4f} nats, {loss / math.log(2):.3f} bits a token"
            for label, loss in document["references"].items()
        }
        explained = _element("p", _REFERENCES, "note")
        parts.append(_section("Reference lines", explained, _definitions(references)))
    made = {
        **document["facts"],
        **document["provenance"],
        "redraw": "python -m experiments.report SWEEP_DIRECTORY",
    }
    parts.append(_section("How it was made", _definitions(made)))
    title = escape(document["title"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
