"""A plan as a table: the rows that training it will leave, but for what only training tells."""

import pandas as pd
import pytest

from experiments.planned import _UNKNOWN
from experiments.run import main

SWEEP = """
from bitnet_jax.configs import default
from sweeps.grid import axis


def get_config(arg=None):
    c = default.get_config()
    c.update_from_flattened_dict({overrides!r})
    return c


def sweep(c):
    return axis("precision", ("ternary", "fp16"))
"""


@pytest.fixture
def command(tiny_overrides, tmp_path):
    overrides = {key: value for key, value in tiny_overrides.items() if key != "precision"}
    (tmp_path / "tiny.py").write_text(SWEEP.format(overrides=overrides))
    return ["run", "--sweep", f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'w'}"]


def test_they_are_the_rows_of_the_trained_sweep(command, tmp_path, capsys):
    path = tmp_path / "planned.csv"
    assert main([*command, "--dry_run", f"--planned={path}"]) == 0
    assert f"4 planned endpoints: {path}" in capsys.readouterr().out
    assert not (tmp_path / "w").exists()
    planned = pd.read_csv(path, keep_default_na=False)
    assert main(command) == 0
    trained = pd.read_parquet(tmp_path / "w" / "tiny" / "endpoints.parquet")
    known = [column for column in trained if column in planned and column != "status"]
    assert set(trained) - set(known) == {*_UNKNOWN, "status", "sweep"}
    assert set(planned["status"]) == {"planned"}
    order = ["run_id", "tokens"]
    expected = trained[known].sort_values(order, ignore_index=True)
    found = planned[known].sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--planned=planned.csv"], "--planned: only with --dry_run"),
        (["--planned=p.csv", "--dry_run", "--launcher=slurm"], "--planned: only with --dry_run"),
        (["--planned=none/there/p.csv", "--dry_run"], "--planned=none/there/p.csv: cannot be"),
    ],
)
def test_what_is_refused(command, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    assert main([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says}") and error.count("\n") == 1
