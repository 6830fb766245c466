"""What a sweep's report says, escapes and refuses, from the files alone."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from synthetic_results import TRIGRAM, endpoints

from analysis.arms import fit_arms
from bitnet_jax.files import SCHEMA_VERSION, read_json, write_json
from experiments.report import (
    TABLE_HEADER,
    endpoint_table,
    fit_lines,
    main,
    verdict,
    write_report,
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep directory with one diverged endpoint of a hostile name, and its report's paths."""
    folder = tmp_path_factory.mktemp("results") / "quickstart"
    folder.mkdir()
    table = endpoints()
    lost = table.iloc[[3]].assign(
        run_id="<script>alert(1)</script>",
        seed=1,
        status="diverged",
        loss=np.nan,
        loss_stderr=np.nan,
        bits_per_byte=np.nan,
        git_commit="fedcba9",
    )
    pd.concat([table, lost], ignore_index=True).to_parquet(folder / "endpoints.parquet")
    paths = write_report(
        folder,
        title="a <b>title</b>",
        references=TRIGRAM,
        facts={"command": "python -m experiments.run --sweep"},
    )
    return folder, paths


def test_writes_everything(sweep):
    folder, paths = sweep
    assert set(paths) == {"fits", "report", "loss_vs_compute", "loss_vs_parameters"}
    for path in paths.values():
        assert path.is_file()
    assert paths["loss_vs_compute"] == folder / "figures" / "loss_vs_compute.png"
    assert paths["loss_vs_compute"].with_suffix(".svg").is_file()
    assert sorted(path.name for path in folder.iterdir()) == [
        "endpoints.parquet", "figures", "fits.json", "report.html",
    ]  # fmt: skip
    assert len(list((folder / "figures").iterdir())) == 4, "no temporary file is left"
    assert read_json(folder / "fits.json")["title"] == "a <b>title</b>"


def test_fits_are_described(sweep):
    document = json.loads(sweep[1]["fits"].read_text())
    assert document["schema_version"] == SCHEMA_VERSION
    assert set(document["fits"]) == {"ternary", "fp16"}
    for laws in document["fits"].values():
        assert laws["chinchilla"]["n_points"] == 8
        assert laws["chinchilla"]["objective"] == "huber"
        assert laws["chinchilla"]["rms_log_residual"] < 4e-3
        assert any("8 points for 5" in warning for warning in laws["chinchilla"]["warnings"])
    lines = fit_lines(document)
    assert lines[0].startswith("ternary: L = ") and "8 points, huber" in lines[0]


def test_page_is_escaped_and_loads_nothing(sweep):
    html = sweep[1]["report"].read_text()
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "a &lt;b&gt;title&lt;/b&gt;" in html
    assert not re.search(r"https?:|<link|@import|url\(|<iframe", html)
    sources = re.findall(r'src="([^"]{20})', html)
    assert len(sources) == 2 and all(s.startswith("data:image/svg+xml") for s in sources)


def test_page_tells_of_losses_and_mixtures(sweep):
    html = sweep[1]["report"].read_text()
    assert "Diverged or failed" in html and "diverged" in html
    assert "1 of 17 endpoints did not finish" in html
    assert "mix 2 values of git_commit" in html and "abcdef1, fedcba9" in html
    assert "byte trigram (Witten-Bell)" in html and "2.970 bits" in html


def test_verdict_states_the_paired_difference():
    table = endpoints()
    wide = table.pivot_table(index=["size", "tokens"], columns="precision", values="loss")
    percent = 100 * ((wide["ternary"] - wide["fp16"]) / wide["fp16"]).mean()
    sentences = verdict(table, fit_arms(table, bootstrap=0), {})
    assert f"{percent:.2f} % above that of fp16" in sentences[0]
    assert "4 pairs of runs" in sentences[1] and "8 pairs of endpoints" in sentences[1]
    assert sentences[2].startswith("At equal training compute")
    assert sentences[-1] == "8 fitted points an arm: a demonstration, not an answer."


def test_regenerates_from_the_files_alone(sweep, capsys):
    folder, paths = sweep
    before = paths["report"].read_text()
    assert main([str(folder)]) == 0
    assert paths["report"].read_text() == before
    assert "report.html" in capsys.readouterr().out


def test_refused_law_falls_back_with_its_reason(tmp_path):
    table = endpoints()
    table["tokens"] = 20 * table["params_non_embedding"]
    table["run_id"] += np.arange(len(table)).astype(str)
    table.to_parquet(tmp_path / "endpoints.parquet")
    document = json.loads(write_report(tmp_path)["fits"].read_text())
    assert "d rises with n" in document["fits"]["fp16"]["chinchilla"]["refused"]
    assert document["fits"]["fp16"]["power"]["n_points"] == 8
    assert "fp16: no chinchilla fit: d rises" in "\n".join(fit_lines(document))


def test_nothing_finished_still_gives_a_report(tmp_path):
    table = endpoints().assign(status="failed", loss=None, loss_stderr=None, bits_per_byte=None)
    table.to_parquet(tmp_path / "endpoints.parquet")
    paths = write_report(tmp_path)
    assert set(paths) == {"fits", "report"}
    assert "16 of 16 endpoints did not finish" in paths["report"].read_text()


def test_one_arm_is_not_compared(tmp_path):
    table = endpoints()
    table[table["precision"] == "ternary"].to_parquet(tmp_path / "endpoints.parquet")
    document = json.loads(write_report(tmp_path)["fits"].read_text())
    assert document["verdict"] == ["8 fitted points an arm: a demonstration, not an answer."]


def test_table_rows_are_text_in_order():
    rows = endpoint_table(endpoints())
    assert len(rows) == 16 and all(len(row) == len(TABLE_HEADER) for row in rows)
    assert rows[0][:4] == ("0.2m", "fp16", "0", "2.59M")
    assert re.fullmatch(r"\d\.\d{4} ± 0\.0040", rows[0][4])


def test_user_mistakes(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "endpoints.parquet: no such file" in capsys.readouterr().err
    endpoints().drop(columns="flops").to_parquet(tmp_path / "endpoints.parquet")
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no column 'flops'") and error.count("\n") == 1
    assert main([]) == 2
    (tmp_path / "fits.json").write_text("{")
    endpoints().to_parquet(tmp_path / "endpoints.parquet")
    assert main([str(tmp_path)]) == 2
    assert "is not JSON" in capsys.readouterr().err
    write_report(tmp_path, title="told", references={}, facts={})
    assert read_json(tmp_path / "fits.json")["title"] == "told", "nothing of the old was wanted"


def test_a_report_is_not_made_of_what_a_damaged_one_was_told(tmp_path, capsys):
    endpoints().to_parquet(tmp_path / "endpoints.parquet")
    write_report(tmp_path, title="told")
    text = (tmp_path / "fits.json").read_text()
    (tmp_path / "fits.json").write_text(text.replace("told", "tole"))
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "fits.json: damaged, its digest" in error and error.count("\n") == 1
    write_json(tmp_path / "fits.json", {"schema_version": SCHEMA_VERSION + 1})
    assert main([str(tmp_path)]) == 2
    assert f"schema_version={SCHEMA_VERSION + 1}" in capsys.readouterr().err


def test_versions_of_files_are_not_mixed_silently():
    table = endpoints().assign(schema_version=2)
    table.loc[0, "schema_version"] = 1
    sentences = verdict(table, fit_arms(table, bootstrap=0), {})
    assert "The endpoints mix 2 values of schema_version." in sentences


@pytest.mark.parametrize("column", ["git_commit", "jax_version", "device"])
def test_runs_that_went_on_under_another_value_are_a_mixture(column):
    """Also where every one of them did, so that the column has a single value."""
    table = endpoints().assign(**{column: "one + two"})
    sentence = f"The endpoints mix 2 values of {column}."
    assert sentence in verdict(table, fit_arms(table, bootstrap=0), {})
    table.loc[0, column] = "three"
    sentences = verdict(table, fit_arms(table, bootstrap=0), {})
    assert f"The endpoints mix 3 values of {column}." in sentences
    alone = endpoints()
    assert not any("mix" in each for each in verdict(alone, fit_arms(alone, bootstrap=0), {}))


def test_a_table_of_a_newer_version_is_refused(tmp_path, capsys):
    for version, status in ((SCHEMA_VERSION, 0), (SCHEMA_VERSION + 1, 2)):
        table = endpoints().assign(schema_version=1)
        table.loc[3, "schema_version"] = version
        table.to_parquet(tmp_path / "endpoints.parquet")
        assert main([str(tmp_path)]) == status
    error = capsys.readouterr().err
    assert f"endpoints.parquet: schema_version={SCHEMA_VERSION + 1}: " in error


# Hostile words


HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)",
    "</style><script>", "&lt;b&gt;", "<!--", "]]>", "javascript:alert(1)", "$\\frac{$", "$x$ $y",
    "$$", "[/x]", "a\nb", "a\0b", "", "_hidden", "{0}", "%s", "../../x", "x" * 300, "\u202e",
]  # fmt: skip
TEXT_COLUMNS = ["run_id", "sweep", "size", "precision", "device", "jax_version", "git_commit",
                "schedule", "tag_<b>"]  # fmt: skip


class Page(HTMLParser):
    """Elements and attributes of a page, and its text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.attributes, self.text = set(), set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def hostile_table():
    """Every word in every column of text somewhere, and most rows still good for a fit."""
    table = endpoints(seeds=2).assign(**{"tag_<b>": "x"})
    for i, column in enumerate(TEXT_COLUMNS):
        words = [HOSTILE[(i + row) % len(HOSTILE)] for row in range(len(table))]
        table[column] = words if column != "precision" else table["precision"]
    table["run_id"] += table.index.astype(str)
    lost = table.iloc[: len(HOSTILE)].assign(
        status=HOSTILE, loss=np.nan, loss_stderr=np.nan, bits_per_byte=np.nan
    )
    lost["run_id"] += "lost"
    return pd.concat([table, lost], ignore_index=True)


def check_page(html, words):
    page = Page(html)
    assert page.elements <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "tr",
        "th", "td", "figure", "figcaption", "img", "ul", "li", "dl", "dt", "dd",
    }  # fmt: skip
    assert page.attributes <= {"lang", "charset", "name", "content", "class", "alt", "src"}
    for word in words:
        assert word in page.text
    assert not re.search(r"<link|@import|url\(|<iframe", html)
    assert all(s.startswith("data:image/svg+xml") for s in re.findall(r'src="([^"]*)"', html))


def test_words_of_the_table_are_text(tmp_path):
    """No word makes an element or an attribute; all of them can be read on the page."""
    hostile_table().to_parquet(tmp_path / "endpoints.parquet")
    paths = write_report(
        tmp_path,
        title=HOSTILE[0],
        references={word: 2.0 + i / 100 for i, word in enumerate(HOSTILE)},
        facts={"corpus": "<b>name</b>", **{word: word for word in HOSTILE}},
    )
    html = paths["report"].read_text()
    check_page(html, [w for w in HOSTILE if w not in ("a\nb", "")])
    for figure in (tmp_path / "figures").glob("*.svg"):
        assert "<script" not in figure.read_text() and "onerror=" not in figure.read_text()
    assert {p.name for p in tmp_path.iterdir()} == {
        "endpoints.parquet", "fits.json", "report.html", "figures",
    }  # fmt: skip
    assert main([str(tmp_path)]) == 0, "and again, from its own fits.json"
    assert paths["report"].read_text() == html


@pytest.mark.parametrize("word", ["$\\frac{$", "$x$ $y", "<script>", "_a", "\\", "a\0b"])
def test_an_arm_of_any_name_is_drawn(tmp_path, word):
    """Dollars were mathematics to matplotlib, and what is none was an error."""
    table = endpoints()
    table["precision"] = table["precision"].replace("ternary", word)
    table.to_parquet(tmp_path / "endpoints.parquet")
    paths = write_report(tmp_path)
    check_page(paths["report"].read_text(), [word])
    assert paths["loss_vs_compute"].stat().st_size > 1000


def test_dollars_are_drawn_as_dollars():
    from matplotlib.figure import Figure
    from matplotlib.textpath import TextPath

    from analysis.style import as_written

    text = Figure().text(0, 0, as_written("$\\frac{$"))
    assert text._preprocess_math(text.get_text()) == ("$\\frac{$", False)
    assert len(TextPath((0, 0), as_written("$")).vertices) > 0


@pytest.mark.parametrize(
    "told",
    [{"title": 3}, {"facts": "x"}, {"references": {"a": "b"}}, {"references": [1]}],
)
def test_fits_of_another_kind(tmp_path, capsys, told):
    endpoints().to_parquet(tmp_path / "endpoints.parquet")
    write_json(tmp_path / "fits.json", {"schema_version": SCHEMA_VERSION, **told})
    before = (tmp_path / "fits.json").read_bytes()
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "not a report's" in error and error.count("\n") == 1
    assert (tmp_path / "fits.json").read_bytes() == before


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"a": NaN}', "[" * 100_000, "\ufeff{}", ""])
def test_fits_that_are_none(tmp_path, capsys, text):
    endpoints().to_parquet(tmp_path / "endpoints.parquet")
    (tmp_path / "fits.json").write_text(text, encoding="utf-8")
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "damaged" in error and error.count("\n") == 1
    assert (tmp_path / "fits.json").read_text(encoding="utf-8") == text


def test_half_a_character_among_the_facts(tmp_path):
    """JSON can spell it, UTF-8 cannot."""
    endpoints().to_parquet(tmp_path / "endpoints.parquet")
    told = {"title": "a\ud800", "facts": {"b": "\udfff"}}
    write_json(tmp_path / "fits.json", {"schema_version": SCHEMA_VERSION, **told})
    assert main([str(tmp_path)]) == 0
    assert "a\\ud800" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("column", ["loss", "tokens", "seed", "flops", "model_bits"])
def test_words_among_the_numbers(tmp_path, capsys, column):
    table = endpoints()
    table[column] = table[column].astype(str)
    table.to_parquet(tmp_path / "endpoints.parquet")
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: column '{column}': it must hold numbers\n"
