"""Verdicts on claims, from result directories invented so that each claim comes out both ways."""

import json
import shutil

import pandas as pd
import pytest
from claim_files import (
    SEEDS,
    found,
    write_decode,
    write_ingredients,
    write_ladder,
    write_others,
    write_presets,
    write_quantize,
    write_quickstart,
    write_rates,
    write_small,
)
from test_notebooks import ROOT, execute

from analysis import claims
from analysis.claims import CLAIMS
from analysis.verdicts import MARGIN, Verdict

HOLDS, FAILS, UNKNOWN, MISSING = Verdict

# Where each claim stands with these numbers, by its place in CLAIMS.
EXPECTED = {
    1: HOLDS, 2: HOLDS, 3: HOLDS, 4: FAILS, 5: FAILS, 6: HOLDS, 7: FAILS, 8: HOLDS, 9: HOLDS,
    10: HOLDS, 11: HOLDS, 12: HOLDS, 13: HOLDS, 14: FAILS, 15: HOLDS, 16: FAILS, 17: FAILS,
    18: HOLDS, 19: UNKNOWN,
}  # fmt: skip


@pytest.fixture(scope="module")
def intact_root(tmp_path_factory):
    """Every file, the verdicts as EXPECTED; to be read only."""
    path = tmp_path_factory.mktemp("intact")
    write_others(path)
    write_ingredients(path)
    return path


@pytest.fixture(scope="module")
def intact(intact_root):
    """The findings on `intact_root` by the claims' numbers."""
    return found(intact_root)


@pytest.fixture
def root(intact_root, tmp_path):
    """A copy of `intact_root` to change."""
    return shutil.copytree(intact_root, tmp_path / "results")


@pytest.fixture(scope="module")
def small_intact_root(tmp_path_factory):
    """Every file, but few ingredients; to be read only."""
    path = tmp_path_factory.mktemp("small")
    write_small(path)
    return path


@pytest.fixture
def small_root(small_intact_root, tmp_path):
    """A copy of `small_intact_root` to change."""
    return shutil.copytree(small_intact_root, tmp_path / "results")


def verdicts(root):
    return {i: finding.verdict for i, finding in found(root).items()}


def changed(root):
    """The verdicts that differ from EXPECTED."""
    return {i: v for i, v in verdicts(root).items() if v != EXPECTED[i]}


def test_verdicts_of_the_invented_results(intact):
    assert {i: finding.verdict for i, finding in intact.items()} == EXPECTED
    assert len(CLAIMS) == 19


def full(*keys, effect):
    return {("full", *key): effect for key in keys}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({("full", "instead", "bfloat16 latents, stochastic"): 0.0}, {1: FAILS}),
        ({("full", "without", "float32 latents"): 0.0}, {1: FAILS}),
        ({("full", "instead", "estimator trust"): -0.05}, {2: FAILS}),
        ({("minimal", "with", "trust estimator"): -0.05}, {2: FAILS}),
        ({("minimal", "with", f"{x} init"): 0.0 for x in ("residual", "SubLN", "quantizer")},
         {3: FAILS}),
        ({("full", "instead", "dampening"): -0.01}, {4: HOLDS}),
        ({("full", "instead", "dampening, weak"): -0.01}, {4: HOLDS}),
        ({("minimal", "with", "sin^2 toward levels"): -0.05}, {4: HOLDS}),
        ({("full", "instead", "Muon"): -0.05}, {5: HOLDS}),
        ({("full", "without", "squared ReLU"): 0.01}, {6: FAILS}),
        ({("minimal", "with", "squared ReLU"): 0.05}, {6: FAILS}),
        ({("full", "instead", "activations ternary_twn, rotated"): 0.01}, {7: HOLDS}),
        ({("full", "instead", "fp16"): -0.01}, {12: FAILS}),
        ({("full", "instead", "warm-up sigmoid"): -0.05}, {16: HOLDS}),
        ({("minimal", "with", "two-stage schedule"): -0.05}, {17: HOLDS}),
        ({("full", "without", "sub-norms"): -0.05}, {18: FAILS}),
        ({("full", "without", "sub-norms"): None}, {18: MISSING}),
        ({("minimal", "with", "sub-norms"): 0.0, ("full", "without", "sub-norms"): None},
         {18: FAILS}),
        ({("full", "without", "residual init"): None}, {3: MISSING}),
        ({("full", "instead", "estimator trust"): -0.01,  # better, by less than the margin
          ("full", "instead", "init SubLN"): -0.05, ("full", "without", "residual init"): 0.0,
          ("full", "instead", "sin^2 away from levels"): -0.05,
          **{("full", "instead", f"weights ternary_{i}"): -0.01 * i * (-1) ** i
             for i in range(1, 8)}}, {}),
    ],
)  # fmt: skip
def test_effects_decide(root, changes, expected):
    write_ingredients(root, changes)
    assert changed(root) == expected


def test_noise_leaves_the_effects_undecided(root):
    write_ingredients(root, noise=0.2)
    own = verdicts(root)
    undecided = {1, 2, 3, 4, 5, 6, 7, 12, 16, 17, 18}
    assert {i for i in undecided if own[i] == UNKNOWN} == undecided


def test_divergence_is_a_cost_and_no_gain(root):
    diverged = {"float32 latents": SEEDS, "sub-norms": (0, 1), "Muon": SEEDS}
    write_ingredients(root, {("full", "instead", "Muon"): -0.05}, diverged=diverged)
    results = found(root)
    assert results[1].verdict == HOLDS and "diverged 3 of 3" in results[1].number
    assert results[5].verdict == FAILS
    assert results[18].verdict == FAILS  # they diverge where they are added to `minimal`
    write_ingredients(root, diverged={"sub-norms": (0,)})
    assert verdicts(root)[18] == UNKNOWN


def test_initialisation_is_held_against_the_plain_one(root):
    """Alternatives to `full`'s own that cost as much as the plain one gain nothing over it."""
    alternatives = [("without", "residual init")]
    alternatives += [("instead", f"init {x}") for x in ("nanotron", "SubLN", "quantizer")]
    write_ingredients(root, full(*alternatives, effect=0.0))
    finding = found(root)[3]
    assert finding.verdict == FAILS
    write_ingredients(root, {**full(*alternatives, effect=0.0), ("full", *alternatives[3]): -0.05})
    finding = found(root)[3]
    assert finding.verdict == HOLDS
    assert finding.values["full, init quantizer"] == pytest.approx(-0.05, abs=1e-3)


def test_prediction(root):
    """Losses that fall as errors grow; seven points that say nothing either way."""
    path = root / "ingredients/endpoints.csv"
    frame = pd.read_csv(path)
    chosen = frame["tag_change"].fillna("").str.startswith("weights")
    frame.loc[chosen, "weight_mse"] = 0.5 - frame.loc[chosen, "weight_mse"]
    frame.to_csv(path, index=False)
    assert changed(root) == {15: FAILS}
    order = {f"weights ternary_{i}": 0.1 * m for i, m in enumerate((4, 1, 7, 2, 6, 3, 5), 1)}
    frame.loc[chosen, "weight_mse"] = frame.loc[chosen, "tag_change"].map(order)
    frame.to_csv(path, index=False)
    assert changed(root) == {15: UNKNOWN}


def test_gap_is_given_in_nats_and_relative(intact):
    finding = intact[12]
    assert finding.values["full, fp16"] == pytest.approx(-0.06)
    assert finding.values["relative"] == pytest.approx(0.06 / 1.94)
    assert finding.values["quickstart, relative"] == pytest.approx(0.03, abs=1e-3)


@pytest.mark.parametrize(
    ("step", "arguments", "expected"),
    [
        (write_presets, {"held_out": 0.0}, {13: FAILS}),
        (write_presets, {"trained": -0.05}, {13: FAILS}),
        (write_presets, {"held_out": MARGIN, "trained": 0.05}, {}),
        (write_rates, {"ratios": (3.0, 4.0)}, {14: HOLDS}),
        (write_rates, {"ratios": (1.2, 4.0)}, {14: UNKNOWN}),
        (write_rates, {"ratios": (1.2, 100.0)}, {14: UNKNOWN}),  # one optimum lies outside
        (write_quantize, {"best": 0.01}, {9: FAILS}),
        (write_quantize, {"absmean": 0.06, "best": 0.06}, {9: UNKNOWN}),
        (write_ladder, {"bits": (5.0, 2.0)}, {8: FAILS}),
        (write_ladder, {"energy": (4.0, 8.0)}, {11: UNKNOWN}),
        (write_ladder, {"energy": (8.0, 8.0)}, {11: FAILS}),
        (write_decode, {"ratios": (1.0, 1.5)}, {10: FAILS}),
        (write_decode, {"ratios": (1.0, 2.5)}, {10: UNKNOWN}),
        (write_quickstart, {"sizes": (1e4, 1e5, 1e6), "seeds": SEEDS}, {19: HOLDS}),
        (write_quickstart, {"sizes": (1e4, 1e5, 1e6), "seeds": SEEDS, "slope": 0.1}, {19: FAILS}),
        (write_quickstart, {"sizes": (1e4, 1e5, 1e6)}, {}),
    ],
)
def test_other_files_decide(small_root, step, arguments, expected):
    step(small_root, **arguments)
    found = changed(small_root)
    assert {i: found[i] for i in (8, 9, 10, 11, 13, 14, 19) if i in found} == expected


def test_one_quantized_run_decides_nothing(small_root):
    for seed in (1, 2):
        (small_root / f"quantize/{seed}.json").unlink()
    assert changed(small_root)[9] == UNKNOWN


def test_numbers_shown_beside(intact):
    assert "identity 0.850, clipped 0.700" in intact[2].number
    assert "lion 0.002 of 3, muon 0.002 of 2, at an end" in intact[5].note
    assert "1.500 bits" in intact[8].number
    assert intact[8].values["bits a parameter, 30k"] == 5
    assert "arithmetic model only" in intact[11].note
    assert intact[9].values["direct absmean"] == pytest.approx(1.001)


def test_an_empty_directory(tmp_path, capsys):
    assert set(verdicts(tmp_path).values()) == {MISSING}
    assert claims.main([str(tmp_path)]) == 0
    assert "0 holds, 0 does not hold" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["absent"], [], ["--what"]])
def test_bad_usage(arguments, capsys):
    assert claims.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_json_and_text(intact_root, intact, capsys):
    assert claims.main([str(intact_root), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["verdict"] for row in document] == list(EXPECTED.values())
    assert document[17]["values"]["full, without sub-norms"] == pytest.approx(0.05, abs=1e-3)
    text = claims.readable(list(zip(CLAIMS, intact.values(), strict=True)))
    assert all(claim.text in text for claim in CLAIMS)
    assert max(map(len, text.splitlines())) <= 100


def test_json_has_no_infinite_number(root, capsys):
    write_ingredients(root, diverged={"float32 latents": SEEDS})
    assert claims.main([str(root), "--json"]) == 0
    values = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[0]["values"]
    assert values["full, without float32 latents"] is None


def test_markdown_table(intact):
    lines = claims.markdown(list(zip(CLAIMS, intact.values(), strict=True))).splitlines()
    assert len(lines) == 2 + len(CLAIMS) and {line.count("|") for line in lines} == {7}
    assert "0.0500 ± " in lines[2] and "\\*" in lines[2] and lines[2].endswith("| **holds** |")


def test_notebook_on_the_repository_s_results(monkeypatch):
    monkeypatch.delenv("ANALYSIS_RESULTS", raising=False)
    outputs = execute(ROOT / "analysis/claims.ipynb")
    tables = [output["data"].get("text/markdown", "") for output in outputs if "data" in output]
    assert all(claim.text in tables[0] for claim in CLAIMS)


def test_notebook_with_every_file(intact_root, monkeypatch):
    monkeypatch.setenv("ANALYSIS_RESULTS", str(intact_root))
    outputs = execute(ROOT / "analysis/claims.ipynb")
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("text/markdown") == 1 and kinds.count("image/png") == 2
