"""Every kind of source gives the same documents; every malformed one says what and where."""

import gzip
import json
import lzma
import sys

import pytest

from bitnet_jax.data import DataError
from bitnet_jax.data.readers import open_sources

TEXTS = ["first ü\nline\n", "second\n", "third €"]


def as_txt():
    return "<|endoftext|>\n".join(TEXTS).encode()


def as_jsonl():
    return "\n".join(json.dumps({"text": text, "id": 1}) for text in TEXTS).encode()


def zstd(data):
    zstandard = pytest.importorskip("zstandard")
    # Two frames, as parallel compressors write them.
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


PACKINGS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def read(*names, text_field="text"):
    return [
        document.text.decode()
        for source in open_sources([str(name) for name in names], text_field)
        for document in source.documents()
    ]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("kind", "make"), [(".txt", as_txt), (".jsonl", as_jsonl)])
def test_text_and_jsonl(tmp_path, kind, make, packing):
    path = tmp_path / f"a{kind}{packing}"
    path.write_bytes(PACKINGS[packing](make()))
    assert read(path) == TEXTS


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "body": TEXTS}), path)
    assert read(path, text_field="body") == TEXTS
    with pytest.raises(DataError, match="no column 'text'; it has id, body"):
        read(path)
    with pytest.raises(DataError, match="row 1: field 'id' is int"):
        read(path, text_field="id")
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(path)


def test_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"<|endoftext|>\none\r\n<|endoftext|>\r\n\n<|endoftext|>\nan <|endoftext|>\n")
    assert read(path) == ["one\r\n", "an <|endoftext|>\n"]


def test_directories_and_globs_in_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "README.md").write_text("not text to train on")
    assert read(tmp_path) == ["a", "b", "c"]
    assert read(tmp_path / "[bc].txt") == ["b", "c"]
    with pytest.raises(DataError, match="given twice"):
        read(tmp_path, tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b"\n \n<|endoftext|>\n", "a.txt: the file is empty"),
        ("a.txt", b"one\n<|endoftext|>\ntwo\nthr\xe9e\n", "a.txt, line 4: not UTF-8 .*0xe9"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "\xe9"}\n', "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'["a"]\n', "line 1: a JSON list, not an object"),
        ("a.jsonl", b'\n{"body": "a"}\n', "line 2: no field 'text'; it has 'body'"),
        ("a.jsonl", b'{"text": null}\n', "line 1: field 'text' is NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: field 'text' is not Unicode"),
        ("a.txt.gz", b"not gzip", "a.txt.gz: cannot be decompressed"),
        ("a.txt.gz", gzip.compress(b"text " * 9, mtime=0)[:-9], "a.txt.gz: cannot be decompressed"),
        ("a.txt.xz", lzma.compress(b"text " * 9)[:-9], "a.txt.xz: cannot be decompressed"),
        ("a.md", b"text", "a.md: unknown kind of file"),
    ],
)
def test_malformed(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_zstd_that_ends_early_or_is_none(tmp_path):
    pytest.importorskip("zstandard")
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd(as_txt())[:-4])
    with pytest.raises(DataError, match="ends inside a zstd frame"):
        read(path)
    path.write_bytes(b"not zstd at all")
    with pytest.raises(DataError, match="cannot be decompressed"):
        read(path)


def test_missing(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "*.txt")
    with pytest.raises(DataError, match="directory has no file"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("module", "name"), [("zstandard", "a.txt.zst"), ("pyarrow.parquet", "a.parquet")]
)
def test_missing_package_names_the_extra(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"pip install 'bitnet_jax\[data\]'"):
        read(tmp_path / name)


class FakeHub:
    """Stands in for the package `datasets`."""

    def __init__(self, rows):
        self.rows = rows

    def load_dataset(self, *arguments, **options):
        self.asked = (arguments, options)
        if self.rows is None:
            raise ConnectionError("Couldn't reach the hub\nwith more lines")
        return iter(self.rows)


def test_hub(monkeypatch):
    hub = FakeHub([{"text": "one"}, {"text": ""}, {"text": "two"}])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read("hf:someone/set:config") == ["one", "two"]
    assert hub.asked == (("someone/set", "config"), {"split": "train", "streaming": True})
    assert read("hf:someone/set::validation") == ["one", "two"]
    assert hub.asked == (("someone/set", None), {"split": "validation", "streaming": True})
    with pytest.raises(DataError, match="row 1: no field 'body'"):
        read("hf:someone/set", text_field="body")


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(None))
    with pytest.raises(DataError, match="cannot be read: Couldn't reach the hub$"):
        read("hf:someone/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'bitnet_jax\[data\]'"):
        read("hf:someone/set")
