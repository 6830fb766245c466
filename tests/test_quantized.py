"""The table of runs quantized after training."""

import json

import pytest

from analysis.quantized import main


def write(folder, run, differences):
    rows = [
        {"weights": w, "granularity": g, "calibrated": c, "difference": d, "loss": 2 + d}
        for (w, g, c), d in differences.items()
    ]
    folder.mkdir(exist_ok=True)
    (folder / f"{run}.json").write_text(json.dumps({"run_id": run, "results": rows}))


def test_a_column_a_run(tmp_path, capsys):
    first = {("as trained", None, False): 0, ("ternary_absmean", "tensor", False): 1.5,
             ("ternary", "tensor", True): 1.25}  # fmt: skip
    write(tmp_path / "quantize", "27k-fp16-s0-abc", first)
    write(tmp_path / "quantize", "95k-fp16-s1-def", {**first, ("ternary", "tensor", True): 0.75})
    assert main([str(tmp_path)]) == 0
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["weights", "granularity", "scales", "27k-fp16-s0", "95k-fp16-s1"]
    assert [line[-2:] for line in lines] == [
        ["+0.0000"] * 2,
        ["+1.5000"] * 2,
        ["+1.2500", "+0.7500"],
    ]
    assert "calibrated" in lines[2] and "calibrated" not in lines[1]


@pytest.mark.parametrize("text", [None, "{}", "no"])
def test_files_that_are_missing_or_something_else(tmp_path, capsys, text):
    if text is not None:
        (tmp_path / "quantize").mkdir()
        (tmp_path / "quantize" / "a.json").write_text(text)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "quantize" in error and error.count("\n") == 1


def test_runs_of_one_name_are_two_columns(tmp_path, capsys):
    for digest, difference in (("abc", 1.0), ("def", 2.0)):
        rows = {("as trained", None, False): 0.0, ("ternary_absmean", "tensor", False): difference}
        write(tmp_path / "quantize", f"27k-fp16-s0-{digest}", rows)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "27k-fp16-s0-abc" in out and "27k-fp16-s0-def" in out
    assert "+1.0000" in out and "+2.0000" in out and "+1.5000" not in out
