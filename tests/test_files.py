"""Files written whole or not at all, and JSON that is not believed once it is damaged."""

import contextlib
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from run_files import flipped

from analysis import tables
from bitnet_jax.errors import ConfigError
from bitnet_jax.files import (
    SCHEMA_VERSION,
    DamagedFile,
    NewerFile,
    creating_directory,
    digest,
    read_json,
    remove_torn,
    replacing,
    within,
    write_json,
)

VALUE = {"schema_version": SCHEMA_VERSION, "loss": 0.1 + 0.2, "small": 1e-300, "none": None,
         "rows": [{"b": 1, "a": "é"}, {}], "tuple": (1, 2), 3: True}  # fmt: skip
AS_READ = json.loads(json.dumps(VALUE))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# Whole or not at all


def test_what_killed_writers_have_left_goes_and_nothing_else(tmp_path):
    """Files and orbax's folders of temporary names; a link goes, not what it leads to."""
    kept = ("a.json", ".a.json", ".hidden.0123", "model", "12", ".lockfile", f"a.json.{'0' * 32}")
    for name in kept:
        (tmp_path / name).write_text("kept")
    with contextlib.suppress(ZeroDivisionError), replacing(tmp_path / "b.json") as torn:
        torn.write_text("torn")
        left = torn.name
        raise ZeroDivisionError
    (tmp_path / left).write_text("as SIGKILL leaves it")
    (tmp_path / "14.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "model.orbax-checkpoint-tmp-17").mkdir()
    (tmp_path / "16.orbax-checkpoint-tmp").symlink_to(tmp_path / "model")
    remove_torn(tmp_path)
    assert names(tmp_path) == sorted(kept)
    remove_torn(tmp_path / "none")


@pytest.mark.parametrize(
    "bad", [{"loss": float("nan")}, {"a": [1, float("inf")]}, {"a": 1, "b": object()}]
)
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, bad):
    path = tmp_path / "summary.json"
    write_json(path, {"old": True})
    with pytest.raises((TypeError, ValueError)):
        write_json(path, bad)
    assert read_json(path) == {"old": True} and names(tmp_path) == ["summary.json"]


def test_a_directory_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "made"
    with creating_directory(path) as temporary:
        (temporary / "a").write_text("whole")
        assert not path.exists() and temporary.parent == tmp_path
    assert names(tmp_path) == ["made"] and (path / "a").read_text() == "whole"
    with pytest.raises(KeyboardInterrupt), creating_directory(tmp_path / "other") as temporary:
        (temporary / "a").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["made"]
    with creating_directory(tmp_path / "killed") as temporary:
        assert names(tmp_path)[0] == temporary.name
        remove_torn(tmp_path)  # what a process that was killed would have left
        assert names(tmp_path) == ["made"]
        temporary.mkdir()


def test_nothing_is_seen_before_the_file_is_whole(tmp_path, monkeypatch):
    """A crash at the latest moment, just before the rename."""
    path = tmp_path / "summary.json"

    def crash(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"a": 1})
        assert names(tmp_path) == []
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2} and path.read_text().endswith("\n")
    assert names(tmp_path) == ["summary.json"]


def test_the_old_file_stands_until_the_new_one_is_done(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path and temporary != path
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["report.html"]
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "new" and names(tmp_path) == ["report.html"]


def test_it_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    original = Path.replace
    monkeypatch.setattr("os.fsync", lambda number: order.append("fsync"))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append("replace"), original(self, to))
    )
    write_json(tmp_path / "a", {})
    assert order == ["fsync", "replace"]


def test_writers_at_once_do_not_meet(tmp_path):
    """All of them hold their temporary file at the same time, and one of them is what remains."""
    path, count = tmp_path / "endpoints.parquet", 4
    together = threading.Barrier(count)

    def write(number):
        with replacing(path) as temporary:
            temporary.write_text(str(number) * 1000)
            together.wait(timeout=20)
        return temporary

    with ThreadPoolExecutor(count) as threads:
        temporaries = list(threads.map(write, range(count)))
    assert len(set(temporaries)) == count
    assert path.read_text() in {str(number) * 1000 for number in range(count)}
    assert names(tmp_path) == [path.name]


# The digest


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"long": "x" * 1000})
    write_json(path, VALUE)
    assert read_json(path) == AS_READ
    assert list(json.loads(path.read_text()))[-1] == "sha256"
    write_json(path, {**json.loads(path.read_text()), "loss": 1.0})
    assert read_json(path)["loss"] == 1.0, "the digest of an earlier one is not kept"


def test_the_digest_is_of_canonical_json():
    """SHA-256 of the text that anybody would write down by hand."""
    import hashlib

    text = '{"a":[1,0.5,null],"b":"\\u00e9"}'
    assert digest({"b": "é", "a": (1, 0.5, None)}) == hashlib.sha256(text.encode()).hexdigest()


def test_no_flipped_bit_is_believed(tmp_path):
    """Of the whole file, but for those that do not change the value: e of an exponent to E, or a
    last digit that rounds to the same number."""
    path = tmp_path / "summary.json"
    write_json(path, VALUE)
    content, believed = path.read_bytes(), []
    for bit in range(0, 8 * len(content), 3):
        path.write_bytes(content)
        flipped(path, bit)
        try:
            assert read_json(path) == AS_READ
            believed.append(bit)
        except DamagedFile:
            pass
    assert len(believed) <= 4


def test_no_shortened_file_is_believed(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, VALUE)
    content = path.read_bytes()
    for length in range(len(content) - 1):  # without its last newline it is the same
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFile):
            read_json(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"{", "it is not JSON"),
        (b"\xff\xfe{}", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[]", "it is not an object"),
        (b"null", "it is not an object"),
        (b"{}", "it has no digest"),
        (b'{"schema_version": 2}', "it has no digest"),
        (b'{"a": NaN, "sha256": ""}', "Out of range float"),
        (b'{"a": 1, "sha256": 3}', "its digest is not that of its content"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, content, reason):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFile) as caught:
        read_json(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: damaged, ") and reason in message and "\n" not in message
    assert isinstance(caught.value, ConfigError)


def test_a_file_from_before_there_were_digests(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text('{"schema_version": 1, "a": 2}')
    assert read_json(path) == {"schema_version": 1, "a": 2}


def test_a_file_of_a_newer_version_is_refused(tmp_path):
    """Whole as it is, and said so; one that only looks newer is damaged."""
    path = tmp_path / "summary.json"
    write_json(path, {"schema_version": SCHEMA_VERSION + 1})
    with pytest.raises(NewerFile, match=rf"schema_version={SCHEMA_VERSION + 1}: .*reads up to"):
        read_json(path)
    text = path.read_text()
    write_json(path, {"schema_version": SCHEMA_VERSION})
    write = path.read_text().replace(str(SCHEMA_VERSION), str(SCHEMA_VERSION + 1), 1)
    assert write != text
    path.write_text(write)
    with pytest.raises(DamagedFile):
        read_json(path)


def test_a_file_that_is_not_there_is_not_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "summary.json")


def test_tables_have_the_same_version():
    """The analysis imports nothing from here."""
    assert tables.SCHEMA_VERSION == SCHEMA_VERSION


# Links


def test_links_may_lead_around_within_but_not_out(tmp_path):
    sweep, out = tmp_path / "sweep", tmp_path / "out"
    for folder in (sweep / "runs" / "a", out):
        folder.mkdir(parents=True)
    (sweep / "runs" / "b").symlink_to(sweep / "runs" / "a")
    (tmp_path / "link").symlink_to(sweep)
    within(sweep, sweep / "runs" / "a", sweep / "runs" / "b", sweep / "not" / "there")
    within(tmp_path / "link", tmp_path / "link" / "runs" / "a")
    (sweep / "runs" / "c").symlink_to(out)
    (sweep / "runs" / "d").symlink_to(tmp_path / "nowhere")
    (sweep / "runs" / "e").symlink_to(sweep / "runs" / "e")
    for name in "cde":
        path = sweep / "runs" / name
        for each in (path, path / "checkpoints"):
            with pytest.raises(ConfigError) as caught:
                within(sweep, sweep / "runs" / "a", each)
            message = str(caught.value)
            assert message.startswith(f"{each}: ") and "\n" not in message


def test_bits_drawn_at_random_of_a_long_file(tmp_path):
    path, draw = tmp_path / "summary.json", random.Random(0)
    rows = [{f"key{i}": draw.random() for i in range(30)} for _ in range(30)]
    write_json(path, {"schema_version": SCHEMA_VERSION, "endpoints": rows})
    content, whole = path.read_bytes(), read_json(path)
    for bit in draw.sample(range(8 * len(content)), 300):
        path.write_bytes(content)
        flipped(path, bit)
        with contextlib.suppress(DamagedFile):
            assert read_json(path) == whole
