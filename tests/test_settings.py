"""What a setting costs: known answers, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.settings import main, settings
from analysis.tables import AnalysisError

# By arm, size, budget and seed: the loss at each decay.
LOSSES = {
    ("fp16", "27k", 1e6, 0): {0.0: 2.03, 0.1: 2.00, 1.0: 2.10},
    ("fp16", "27k", 1e6, 1): {0.0: 2.05, 0.1: 2.01, 1.0: 2.21},
    ("fp16", "95k", 2e6, 0): {0.0: 1.50, 0.1: 1.51, 1.0: 1.60},
    ("ternary", "27k", 1e6, 0): {0.0: 2.2, 0.1: 2.3},
    ("ternary", "27k", 2e6, 0): {0.1: 9.0},  # no partner: it does not count
}


def table(losses=LOSSES, **columns):
    rows = [
        {"precision": arm, "size": size, "tokens": tokens, "seed": seed, "weight_decay": decay,
         "loss": loss, "status": "ok"}
        for (arm, size, tokens, seed), cell in losses.items()
        for decay, loss in cell.items()
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def of(found, precision, size):
    rows = found[(found["precision"] == precision) & (found["size"] == size)]
    return rows["weight_decay"].tolist(), rows["cells"].tolist(), rows["cost"].to_numpy()


def test_by_hand():
    found = settings(table(), "weight_decay")
    decays, cells, costs = of(found, "fp16", "27k")
    assert decays == [0, 0.1, 1] and cells == [2, 2, 2]
    np.testing.assert_allclose(costs, [0.035, 0, 0.15], atol=1e-12)
    decays, cells, costs = of(found, "fp16", "all")
    assert cells == [3, 3, 3]
    np.testing.assert_allclose(costs, [0.06 / 3, 0, 0.39 / 3], atol=1e-12)
    decays, cells, costs = of(found, "ternary", "27k")
    assert decays == [0, 0.1] and cells == [1, 1]
    np.testing.assert_allclose(costs, [0, 0.1])
    assert len(found) == 3 + 3 + 3 + 2, "the ternary arm has one size"
    spread = found["spread"][0]
    np.testing.assert_allclose(spread, np.std([0.03, 0.04], ddof=1))


def test_sizes_with_values_of_their_own_are_not_put_together():
    losses = {("fp16", "27k", 1e6, 0): {0.1: 2.0, 0.2: 2.1}, ("fp16", "95k", 1e6, 0): {0.1: 1.0}}
    assert set(settings(table(losses), "weight_decay")["size"]) == {"27k", "95k"}


@pytest.mark.parametrize(
    ("frame", "says"),
    [(table(weight_decay=0.1), "differ in more than"),
     (table({("fp16", "27k", 1e6, 0): {0.1: 2.0}}), "has one value in each arm and size"),
     (table({("fp16", "27k", 1e6, 0): {0.1: 2.0}, ("fp16", "27k", 2e6, 0): {0.2: 2.0}}),
      "no size, budget and seed has all values"),
     (table().drop(columns="seed"), "no column 'seed'")],
)  # fmt: skip
def test_refuses(frame, says):
    with pytest.raises(AnalysisError, match=says):
        settings(frame, "weight_decay")


def test_command(tmp_path, capsys):
    path = tmp_path / "endpoints.csv"
    table().to_csv(path, index=False)
    assert main([str(path), "--column=weight_decay"]) == 0
    assert "all" in capsys.readouterr().out
    assert main([str(path), "--column=weight_decay", "--where=size == '95k'", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["cost"] for row in found] == pytest.approx([0, 0.01, 0.1])
    assert main([str(path), "--column=peak_lr"]) == 2
    assert capsys.readouterr().err.startswith("error: no column 'peak_lr'")


@pytest.mark.parametrize("column", ["seed", "size", "tokens", "precision", "loss"])
def test_what_runs_are_compared_at_is_not_varied(capsys, column):
    table = Path(__file__).parent.parent / "results/study-cpu/weight_decay/endpoints.csv"
    assert main([str(table), f"--column={column}"]) == 2
    assert f"column '{column}': runs are compared at equal" in capsys.readouterr().err
