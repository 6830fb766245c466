"""A report is made again when anything of it has changed, and only then."""

import pytest

from experiments import report_kept
from experiments.report_kept import keep, kept

TOLD = {"title": "tiny", "references": {"bigram": 1.5}, "facts": {"command": "run"}}


@pytest.fixture
def made(tmp_path):
    """A sweep's folder with a report that has been kept."""
    (tmp_path / "figures").mkdir()
    paths = {"fits": tmp_path / "fits.json", "figure": tmp_path / "figures" / "a.png"}
    for path in (*paths.values(), tmp_path / report_kept.TABLE):
        path.write_bytes(path.name.encode())
    keep(tmp_path, TOLD, paths)
    return tmp_path, paths


def test_what_has_not_changed_is_kept(made):
    folder, paths = made
    assert kept(folder, TOLD) == paths


@pytest.mark.parametrize("name", ["fits.json", "figures/a.png", "endpoints.parquet", "report.json"])
@pytest.mark.parametrize("lost", [True, False])
def test_a_file_that_is_another_or_gone(made, name, lost):
    folder, _ = made
    path = folder / name
    content = path.read_bytes()
    path.unlink() if lost else path.write_bytes(content[::-1])
    assert kept(folder, TOLD) is None
    path.write_bytes(content)
    assert kept(folder, TOLD) is not None


@pytest.mark.parametrize("key", TOLD)
def test_what_was_told_is_another(made, key):
    folder, _ = made
    assert kept(folder, {**TOLD, key: "another"}) is None


def test_code_that_is_another(made, monkeypatch):
    folder, _ = made
    monkeypatch.setattr(report_kept, "_CODE", ("analysis/laws.py",))
    assert kept(folder, TOLD) is None


@pytest.mark.slow
def test_a_launch_makes_no_report_twice(tiny_overrides, tmp_path, monkeypatch):
    """But again where a run has come to the table."""
    from test_launch_local import write_sweep

    from experiments import report
    from experiments.run import main

    write_sweep(tmp_path / "tiny.py", tiny_overrides, ("optim.peak_lr", (0.01,)))
    flags = ["run", "--sweep", f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path}"]
    made, original = [], report.write_report

    def write_report(*arguments, **named):
        made.append(arguments)
        return original(*arguments, **named)

    monkeypatch.setattr(report, "write_report", write_report)
    assert main(flags) == 0 and len(made) == 1
    page = (tmp_path / "tiny" / "report.html").read_bytes()
    assert main(flags) == 0 and len(made) == 1
    (tmp_path / "tiny" / "report.html").unlink()
    assert main(flags) == 0 and len(made) == 2
    assert (tmp_path / "tiny" / "report.html").read_bytes() == page
    write_sweep(tmp_path / "tiny.py", tiny_overrides, ("optim.peak_lr", (0.01, 0.003)))
    assert main(flags) == 0 and len(made) == 3
