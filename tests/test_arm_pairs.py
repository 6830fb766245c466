"""Arms of a results table compared, what is refused before anything is computed, and the report."""

import json
import time

import numpy as np
import pandas as pd
import pytest
from synthetic_results import endpoints

from analysis.arm_pairs import baseline_of, compare_arms
from analysis.comparing import Comparison, Verdict
from experiments.report import write_report


def study(worth=0.7, seeds=3):
    """Four sizes, three budgets and some seeds of both arms; a pair shares its luck."""
    table = endpoints(seeds=seeds)
    table = pd.concat([table, table.drop_duplicates("run_id").assign(tokens=0)])
    rng = np.random.default_rng(1)
    luck = {
        pair: rng.normal(0, 2e-3)
        for pair in sorted(set(zip(table["size"], table["seed"], strict=True)))
    }
    rank = table.groupby("run_id").cumcount()
    table["tokens"] = (table["params_total"] * 8 * 2.5**rank).astype(int)
    n = table["params_non_embedding"] * np.where(table["precision"] == "ternary", worth, 1.0)
    table["loss"] = 0.95 + 12 / n**0.28 + 55 / table["tokens"] ** 0.33
    table["loss"] *= np.exp([luck[p] for p in zip(table["size"], table["seed"], strict=True)])
    table["loss"] *= np.exp(5e-4 * rng.normal(size=len(table)))
    table["bits_per_byte"] = table["loss"] / np.log(2)
    table["flops"] = 6.5 * table["params_total"] * table["tokens"]
    return table.reset_index(drop=True)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study().to_parquet(folder / "endpoints.parquet")
    return folder, write_report(folder)


def test_the_report_opens_with_the_verdict(reported):
    """A multiplier was planted: the test finds it, and its interval holds it."""
    folder, paths = reported
    document = json.loads(paths["fits"].read_text())
    found = document["comparison"]["ternary"]
    assert found["verdict"] == Verdict.MULTIPLIER and found["paired"]
    assert found["estimates"]["rho"]["low"] < 0.7 < found["estimates"]["rho"]["high"]
    assert document["verdict"][0] == "T" + found["sentence"][1:]
    html = paths["report"].read_text()
    assert html.index(found["verdict"]) < html.index("At equal size, tokens and seed")
    for name in ("relative_difference", "multiplier", "cost_ratios"):
        assert paths[name].is_file() and paths[name].with_suffix(".svg").is_file()
    assert html.count("data:image/svg+xml") == 5


def test_what_few_runs_cannot_tell_is_refused_at_once():
    began = time.monotonic()
    (reason,) = compare_arms(endpoints()).values()
    assert "independent pairs: 8 or more are needed" in reason
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.assign(variant=np.where(t["seed"] == 1, "norms=pre", "")), "column variant"),
        (lambda t: t.assign(seed=0), "differ in something else"),
        (
            lambda t: t.assign(tokens=(20 * t["params_non_embedding"]).astype(int)),
            "one ratio of tokens to parameters",
        ),
    ],
)
def test_tables_that_are_no_pair_of_arms(change, why):
    (reason,) = compare_arms(change(study())).values()
    assert isinstance(reason, str) and why in reason, reason


def test_the_baseline_is_the_first_of_the_16_bit_arms():
    table = study(seeds=1)
    assert baseline_of(table) == "fp16"
    assert baseline_of(table[table["precision"] == "ternary"]) is None
    assert compare_arms(table[table["precision"] == "ternary"]) == {}
    both = pd.concat([table, table[table["precision"] == "fp16"].assign(precision="bf16")])
    assert set(compare_arms(both)) == {"ternary", "bf16"}
    assert not any(isinstance(found, Comparison) for found in compare_arms(both).values())
