"""Notebooks are committed without outputs and run from top to bottom."""

from pathlib import Path

import nbformat
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


def test_loss_vs_compute(tmp_path, monkeypatch):
    table = tmp_path / "endpoints.parquet"
    endpoints().to_parquet(table)
    monkeypatch.setenv("ANALYSIS_RESULTS", str(table))
    outputs = execute(ROOT / "analysis" / "loss_vs_compute.ipynb")
    printed = "".join(output.get("text", "") for output in outputs)
    assert "ternary: L = " in printed and "8 points, huber" in printed
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert "image/png" in kinds and kinds.count("text/html") == 2


def test_missing_results_say_how_to_make_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ANALYSIS_RESULTS", str(tmp_path / "absent.parquet"))
    with pytest.raises(CellExecutionError, match="python -m experiments.run --sweep writes it"):
        execute(ROOT / "analysis" / "loss_vs_compute.ipynb")
