"""Notebooks are committed without outputs and run from top to bottom."""

from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from synthetic_results import endpoints

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "analysis").glob("*.ipynb"))


def execute(path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def run(name, table, monkeypatch):
    """Printed text, and the kinds of data that the notebook `name` shows of a table's path."""
    monkeypatch.setenv("ANALYSIS_RESULTS", str(table))
    outputs = execute(ROOT / "analysis" / f"{name}.ipynb")
    printed = "".join(output.get("text", "") for output in outputs)
    return printed, [kind for output in outputs for kind in output.get("data", {})]


def test_loss_vs_compute(tmp_path, monkeypatch):
    table = tmp_path / "endpoints.parquet"
    endpoints().to_parquet(table)
    printed, kinds = run("loss_vs_compute", table, monkeypatch)
    assert "ternary: L = " in printed and "8 points, huber" in printed
    assert "image/png" in kinds and kinds.count("text/html") == 2


def test_learning_rate(tmp_path, monkeypatch):
    one = endpoints().drop_duplicates(["size", "precision"])
    rates = [one.assign(peak_lr=rate, loss=one["loss"] + 0.1 * np.log(rate / 4e-3) ** 2)
             for rate in (1e-3, 2e-3, 4e-3, 8e-3)]  # fmt: skip
    table = tmp_path / "endpoints.csv"
    pd.concat(rates).to_csv(table, index=False)
    _, kinds = run("learning_rate", table, monkeypatch)
    assert kinds.count("image/png") == 1 and kinds.count("text/html") == 1


def test_learning_rate_of_the_committed_sweep(monkeypatch):
    _, kinds = run("learning_rate", ROOT / "results/cpu-2core/learning_rate/endpoints.csv",
                   monkeypatch)  # fmt: skip
    assert kinds.count("image/png") == 1


def test_ternary_vs_16bit(tmp_path, monkeypatch):
    table = tmp_path / "endpoints.parquet"
    endpoints(seeds=2).to_parquet(table)
    monkeypatch.setenv("ANALYSIS_BOOTSTRAP", "100")
    printed, kinds = run("ternary_vs_16bit", table, monkeypatch)
    assert "ternary against fp16: same law up to a multiplier of N" in printed
    assert "fp16\nno budget has the 3 sizes that akima takes" in printed
    assert kinds.count("image/png") == 5 and kinds.count("text/html") == 2


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("loss_vs_compute", "python -m experiments.run --sweep writes it"),
        ("learning_rate", "--config=sweeps/learning_rate.py writes it"),
        ("ternary_vs_16bit", "--config=sweeps/isoflop.py writes it"),
    ],
)
def test_missing_results_say_how_to_make_them(name, command, tmp_path, monkeypatch):
    with pytest.raises(CellExecutionError, match=command):
        run(name, tmp_path / "absent.parquet", monkeypatch)
