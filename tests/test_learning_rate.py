"""The optimum of a learning-rate sweep."""

import numpy as np
import pandas as pd
import pytest

from analysis import learning_rate


def sweep(optimum, rates, arm="ternary"):
    """Losses that are a parabola in log rate with a known optimum."""
    return pd.DataFrame(
        {
            "params_non_embedding": 1000,
            "size": "1k",
            "precision": arm,
            "tokens": 5000,
            "peak_lr": rates,
            "loss": [2 + 0.1 * np.log(rate / optimum) ** 2 for rate in rates],
            "status": "ok",
        }
    )


def test_finds_each_arms_optimum_between_the_rates():
    rates = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    frame = pd.concat([sweep(5e-3, rates), sweep(2.2e-3, rates, "fp16")])
    found = learning_rate.optima(frame).set_index("precision")
    assert found.loc["ternary", "best_rate"] == 4e-3 and found.loc["fp16", "best_rate"] == 2e-3
    assert found.loc["ternary", "optimum"] == pytest.approx(5e-3, rel=1e-9)
    assert found.loc["fp16", "optimum"] == pytest.approx(2.2e-3, rel=1e-9)


def test_an_optimum_at_the_edge_is_not_claimed():
    found = learning_rate.optima(sweep(1e-2, [1e-3, 2e-3, 4e-3]))
    assert found["best_rate"].item() == 4e-3 and np.isnan(found["optimum"].item())


def test_diverged_runs_do_not_count():
    frame = sweep(4e-3, [1e-3, 2e-3, 4e-3, 8e-3])
    frame.loc[frame["peak_lr"] == 8e-3, ["status", "loss"]] = ["diverged", np.nan]
    assert np.isnan(learning_rate.optima(frame)["optimum"].item())


def test_command_prints_the_table_and_refuses_a_file_without_rates(tmp_path, capsys):
    path = tmp_path / "endpoints.csv"
    sweep(4e-3, [1e-3, 4e-3, 8e-3]).to_csv(path, index=False)
    assert learning_rate.main([str(path)]) == 0
    assert "0.004" in capsys.readouterr().out
    pd.read_csv(path).drop(columns="peak_lr").to_csv(path, index=False)
    assert learning_rate.main([str(path)]) == 2
    assert "peak_lr" in capsys.readouterr().err
