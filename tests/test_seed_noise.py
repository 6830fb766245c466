"""The noise floor: standard deviations by hand, pairs of arms, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis.seed_noise import main, seed_noise
from analysis.tables import AnalysisError

# Losses by arm, size, budget and seed.
LOSSES = {
    ("fp16", "27k", 1e6): [2.0, 2.1, 2.2],
    ("fp16", "27k", 4e6): [1.5, 1.5, 1.5],
    ("fp16", "95k", 1e6): [1.9, 1.94],
    ("fp16", "330k", 1e6): [1.8],
    ("ternary", "27k", 1e6): [2.1, 2.2, 2.3],
    ("ternary", "27k", 4e6): [1.6, 1.61, 1.62],
    ("ternary", "95k", 1e6): [2.0, 2.02],
}


def table(losses=LOSSES, **columns):
    rows = [
        {"precision": arm, "size": size, "params_non_embedding": 1e3 * float(size[:-1]),
         "tokens": tokens, "seed": seed, "loss": loss, "status": "ok",
         "peak_lr": 0.01 if arm == "fp16" else 0.02, "weight_decay": 0.1, "variant": None}
        for (arm, size, tokens), cell in losses.items()
        for seed, loss in enumerate(cell)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def noise_of(found, arm, size):
    row = found[(found["precision"] == arm) & (found["size"] == size)]
    assert len(row) == 1
    return row.iloc[0]


def test_root_mean_square_over_cells():
    """.1 at one budget and 0 at the other, two degrees of freedom each."""
    found = seed_noise(table())
    row = noise_of(found, "fp16", "27k")
    assert row["noise"] == pytest.approx(0.1 / np.sqrt(2))
    assert (row["cells"], row["endpoints"]) == (2, 6)
    assert noise_of(found, "fp16", "95k")["noise"] == pytest.approx(0.04 / np.sqrt(2))
    assert "330k" not in set(found["size"]), "a single seed shows no noise"


def test_cells_count_by_their_degrees_of_freedom():
    found = seed_noise(table({("fp16", "27k", 1e6): [1.0, 1.2], ("fp16", "27k", 2e6): [1.0] * 4}))
    assert noise_of(found, "fp16", "27k")["noise"] == pytest.approx(np.sqrt(0.02 / 4))


def test_differences_are_taken_seed_by_seed():
    """What moves both arms alike is no noise of their difference."""
    found = seed_noise(table())
    at_1, at_4 = 0.0, np.var([0.1, 0.11, 0.12], ddof=1)
    row = noise_of(found, "ternary - fp16", "27k")
    assert row["noise"] == pytest.approx(np.sqrt((at_1 + at_4) / 2))
    assert noise_of(found, "ternary - fp16", "95k")["noise"] == pytest.approx(0.02 / np.sqrt(2))


def test_other_rates_are_other_cells_and_leave_no_pairs():
    both = pd.concat([table(), table(peak_lr=0.3).assign(loss=lambda t: t["loss"] + 1)])
    found = seed_noise(both)
    assert noise_of(found, "fp16", "27k")["noise"] == pytest.approx(0.1 / np.sqrt(2))
    assert noise_of(found, "fp16", "27k")["cells"] == 4
    assert set(found["precision"]) == {"fp16", "ternary"}


def test_diverged_endpoints_are_left_out():
    rows = table()
    rows.loc[0, ["loss", "status"]] = [9.0, "diverged"]
    row = noise_of(seed_noise(rows), "fp16", "27k")
    assert row["noise"] == pytest.approx(np.sqrt((0.1**2 / 2 + 0.0) / 3))
    assert row["endpoints"] == 5


def test_what_is_refused():
    twice = pd.concat([table(), table()])
    with pytest.raises(AnalysisError, match="differ in something else"):
        seed_noise(twice)
    with pytest.raises(AnalysisError, match="no noise to see"):
        seed_noise(table({("fp16", "27k", 1e6): [2.0]}))
    with pytest.raises(AnalysisError, match="seed"):
        seed_noise(table().drop(columns="seed"))


def test_command(tmp_path, capsys):
    path = tmp_path / "endpoints.csv"
    table().to_csv(path, index=False)
    assert main([str(path), "--json", "--where=size == '95k'"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["precision"] for r in rows] == ["fp16", "ternary", "ternary - fp16"]
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == "noise"
    assert main([str(tmp_path / "none.csv")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
