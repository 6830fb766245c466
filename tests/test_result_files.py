"""Result files that are missing, damaged or not of their form, seen through the claims on them."""

import shutil

import pandas as pd
import pytest
from claim_files import found, runs, write_small

from analysis import claims
from analysis.ingredients import compare
from analysis.result_files import against
from analysis.verdicts import Verdict

MISSING = Verdict.MISSING


@pytest.fixture(scope="module")
def intact_root(tmp_path_factory):
    """Every file, few ingredients; to be read only."""
    path = tmp_path_factory.mktemp("intact")
    write_small(path)
    return path


@pytest.fixture(scope="module")
def intact(intact_root):
    """The findings on `intact_root` by the claims' numbers."""
    return found(intact_root)


@pytest.fixture
def root(intact_root, tmp_path):
    """A copy of `intact_root` to change."""
    return shutil.copytree(intact_root, tmp_path / "results")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("ingredients/endpoints.csv", {1, 2, 3, 4, 5, 6, 7, 9, 12, 15, 16, 17, 18}),
        ("ingredients/latents.csv", set()),
        ("presets/endpoints.csv", {13}),
        ("optimizers/endpoints.csv", set()),
        ("learning_rate/endpoints.csv", {14}),
        ("quickstart/endpoints.csv", {19}),
        ("ladder.csv", {8, 11}),
        ("decode.json", {10}),
    ],
)
def test_missing_files(root, intact, name, missing):
    """Claims without their file name it and its command; the others are as with every file."""
    (root / name).unlink()
    results = found(root)
    text = f"{name} is not there: see python -m experiments."
    assert {i for i, f in results.items() if f.verdict == MISSING and text in f.note} == missing
    assert all(results[i].verdict == intact[i].verdict for i in set(intact) - missing)


def test_a_sweep_s_own_parquet_will_do(root, intact):
    path = root / "ingredients/endpoints.csv"
    pd.read_csv(path).to_parquet(path.with_suffix(".parquet"))
    path.unlink()
    assert found(root) == intact


@pytest.mark.parametrize(
    "name",
    [
        "ingredients/endpoints.csv", "ingredients/latents.csv", "presets/endpoints.csv",
        "optimizers/endpoints.csv", "learning_rate/endpoints.csv", "quickstart/endpoints.csv",
        "ladder.csv", "decode.json", "quantize/1.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe\x00garbage\n\x81", b"[1, 2]"])
def test_damaged_files(root, name, content, capsys):
    (root / name).write_bytes(content)
    refused(root, name, capsys)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("ingredients/endpoints.csv", "loss"),
        ("ingredients/endpoints.csv", "weight_mse"),
        ("ingredients/latents.csv", "latent_entropy"),
        ("gradients/latents.csv", "gradient_cosine"),
        ("presets/endpoints.csv", "train_loss"),
        ("presets/endpoints.csv", "peak_lr"),
        ("optimizers/endpoints.csv", "peak_lr"),
        ("learning_rate/endpoints.csv", "loss"),
        ("quickstart/endpoints.csv", "loss"),
        ("ladder.csv", "model_bits"),
    ],
)
def test_words_for_numbers(root, name, column, capsys):
    frame = pd.read_csv(root / name).astype({column: object})
    frame.loc[:, column] = "many"
    frame.to_csv(root / name, index=False)
    refused(root, name, capsys)


def refused(root, name, capsys):
    assert claims.main([str(root)]) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith(f"error: {root / name}: ") and error.count("\n") == 1


def test_measured_from_a_variant():
    frame = runs("full", {("without", "a"): 0.05, ("instead", "b"): 0.08, ("instead", "c"): 0.0})
    effects = against(frame, "full", "a").set_index("change")
    assert effects["difference"].to_dict() == pytest.approx(
        {"the base": -0.05, "b": 0.03, "c": -0.05}, abs=3e-3
    )
    direct = compare(frame).effects.set_index("change")
    assert effects.loc["the base", "difference"] == -direct.loc["a", "difference"]
    assert against(frame, "full", "absent") is None
