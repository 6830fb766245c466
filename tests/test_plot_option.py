"""--plot: one convention for all commands."""

import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from analysis.plot_option import plot_path, write_figures
from analysis.tables import AnalysisError


def test_a_path_may_end_in_png(tmp_path):
    assert plot_path(None) is None
    for given in ("law", "law.png"):
        assert plot_path(str(tmp_path / given)) == tmp_path / "law"
    assert plot_path("law") == Path("law")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("law.pdf", "law.pdf: expected PATH or PATH.png"),
        ("absent/law", "there is no directory"),
        ("there", "there is a directory: name the figures in it"),
        ("new/", "new/ is a directory"),
        ("file/law", "there is no directory"),
    ],
)
def test_refuses_what_cannot_be_written(tmp_path, given, message):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AnalysisError, match=message):
        plot_path(f"{tmp_path}/{given}")
    assert sorted(tmp_path.rglob("*")) == before


def test_refuses_a_directory_that_is_not_ours(tmp_path, monkeypatch):
    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(AnalysisError, match=r"cannot be written to \(Permission denied\)"):
        plot_path(str(tmp_path / "law"))


def test_writes_what_can_be_drawn_and_says_so(tmp_path, capsys):
    def refuse():
        raise AnalysisError("two budgets")

    write_figures(tmp_path / "a.b", {"": Figure, "one": Figure, "two": refuse})
    names = [f"a.b{name}.{kind}" for name in ("-one", "") for kind in ("png", "svg")]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    captured = capsys.readouterr()
    assert captured.out == ""
    path = tmp_path / "a.b"
    assert captured.err.splitlines() == [
        f"wrote {path}.png and {path}.svg",
        f"wrote {path}-one.png and {path}-one.svg",
        f"{path}-two: not drawn: two budgets",
    ]
