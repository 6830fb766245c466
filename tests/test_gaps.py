"""Differences of arms, pair by pair: known answers, and what is refused."""

import importlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.gaps import gaps, main
from analysis.tables import AnalysisError

ROOT = Path(__file__).parent.parent
# By arm, size, budget: losses of the seeds.
LOSSES = {
    ("fp16", "95k", 1e6): [2.0],
    ("fp16", "27k", 2.7e6): [1.6, 1.62],
    ("fp16", "27k", 2.7e5): [2.0, 2.1],
    ("ternary", "27k", 2.7e5): [2.1, 2.3],
    ("ternary", "27k", 2.7e6): [1.8, 1.81, 9.0],  # the third has no partner
    ("ternary", "95k", 1e6): [2.05],
    ("binary", "27k", 2.7e5): [2.5],
    ("binary", "330k", 1e6): [2.5],
}


def table(losses=LOSSES, **columns):
    rows = [
        {"precision": arm, "size": size, "params_non_embedding": 1e3 * float(size[:-1]),
         "tokens": tokens, "seed": seed, "loss": loss, "loss_stderr": 0.01, "status": "ok",
         "variant": None}
        for (arm, size, tokens), cell in losses.items()
        for seed, loss in enumerate(cell)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def test_by_hand():
    found = gaps(table(), "fp16")
    places = list(zip(found["precision"], found["size"], found["tokens"], strict=True))
    assert places == [("binary", "27k", 2.7e5), ("ternary", "27k", 2.7e5),
                      ("ternary", "27k", 2.7e6), ("ternary", "95k", 1e6)]  # fmt: skip
    assert list(found["seeds"]) == [1, 2, 2, 1]
    np.testing.assert_allclose(found["ratio"], [10, 10, 100, 1e6 / 95e3])
    np.testing.assert_allclose(found["baseline"], [2.0, 2.05, 1.61, 2.0])
    np.testing.assert_allclose(found["difference"], [0.5, 0.15, 0.195, 0.05])
    spreads = [np.nan, np.std([0.1, 0.2], ddof=1), np.std([0.2, 0.19], ddof=1), np.nan]
    np.testing.assert_allclose(found["spread"], spreads)
    np.testing.assert_allclose(found["percent"], [25, 15 / 2.05, 19.5 / 1.61, 2.5])


def test_another_baseline_turns_the_sign():
    forth, back = gaps(table(), "fp16"), gaps(table(), "ternary")
    forth, back = forth[forth["precision"] == "ternary"], back[back["precision"] == "fp16"]
    np.testing.assert_allclose(back["difference"], -forth["difference"])
    np.testing.assert_allclose(back["spread"], forth["spread"])


def test_a_diverged_run_is_no_partner():
    losses = table()
    losses.loc[(losses["precision"] == "fp16") & (losses["size"] == "95k"), "status"] = "diverged"
    assert "95k" not in set(gaps(losses, "fp16")["size"])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda t: t[t["precision"] == "fp16"], "shares size"),
        (lambda t: t[t["precision"] != "fp16"], "no arm .fp16.: the table has ternary, binary"),
        (lambda t: t.drop(columns="seed"), "seed"),
        (lambda t: t.assign(variant=np.where(t["tokens"] < 1e6, "a", "b")), "variant"),
    ],
)
def test_what_cannot_be_told(changed, says):
    with pytest.raises(AnalysisError, match=says):
        gaps(changed(table()), "fp16")


def test_command(tmp_path, capsys):
    """The 16-bit arm is found; a row is chosen; JSON has the numbers of the table."""
    path = tmp_path / "endpoints.csv"
    table().to_csv(path, index=False)
    assert main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1].split()[-2:] == ["-", "+2.50"]
    assert main([str(path), "--where", 'size == "95k"', "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["difference"] == pytest.approx(0.05) and row["spread"] is None
    assert main([str(path), "--where", 'precision == "ternary"']) == 2
    assert capsys.readouterr().err.startswith("error: no 16-bit arm")
    assert main([str(path), "--baseline=int9"]) == 2
    assert "'int9'" in capsys.readouterr().err


def test_arms_of_several_tables(tmp_path, capsys):
    """As where the baseline is in another part of a study."""
    frame = table()
    frame["run_id"] = frame["precision"] + frame["size"] + frame["seed"].astype(str)
    paths = [tmp_path / "grid.csv", tmp_path / "arms.csv"]
    frame[frame["precision"] == "fp16"].to_csv(paths[0], index=False)
    frame[frame["precision"] != "fp16"].to_csv(paths[1], index=False)
    assert main([*map(str, paths), "--json"]) == 0
    found = pd.DataFrame(json.loads(capsys.readouterr().out))
    expected = gaps(table(), "fp16")
    np.testing.assert_allclose(found["percent"], expected["percent"])
    assert main([str(paths[0])]) == 2


@pytest.mark.parametrize(
    "command", ["gaps", "gap_law", "equal_loss", "seed_noise", "settings --column=peak_lr"]
)
@pytest.mark.parametrize("loss", ["nan", "x", "-1.0", "inf"])
def test_a_loss_that_is_none_is_refused(tmp_path, capsys, command, loss):
    """In a line that names it, by every command on pairs; of a run that diverged no matter."""
    name, *more = command.split()
    lines = (ROOT / "results/study-cpu/grid/endpoints.csv").read_text().splitlines()
    at = lines[0].split(",").index("loss")
    row = lines[5].split(",")
    row[at] = loss
    file = tmp_path / "endpoints.csv"
    file.write_text("\n".join([*lines[:5], ",".join(row), *lines[6:]]))
    main = importlib.import_module(f"analysis.{name}").main
    assert main([str(file), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: column 'loss', row 4: ") and error.count("\n") == 1
    row[lines[0].split(",").index("status")] = "diverged"
    file.write_text("\n".join([*lines[:5], ",".join(row), *lines[6:]]))
    assert main([str(file), *more]) in (0, 2)
    assert "column 'loss'" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", ["gaps --baseline=nope", "gap_law --treatment=nope", "equal_loss --baseline=nope"]
)
def test_an_unknown_arm_is_named(capsys, arguments):
    name, flag = arguments.split()
    main = importlib.import_module(f"analysis.{name}").main
    assert main([str(ROOT / "results/study-cpu/grid/endpoints.csv"), flag]) == 2
    assert capsys.readouterr().err == "error: no arm 'nope': the table has bf16, fp16, ternary\n"
