"""Writes that wait for room, alone and in whole runs on a disk that is really full."""

# ruff: noqa: F811

import contextlib
import errno
import json
import subprocess
import threading

import pytest
from test_train import assert_same_results, launch, undisturbed  # noqa: F401, F811

from bitnet_jax import disk
from bitnet_jax.disk import GaveUp, Patience, is_full
from bitnet_jax.tracking import MetricsLog


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(disk, "POLL", 0.01)


def full(text="No space left on device"):
    return OSError(errno.ENOSPC, text)


def test_what_says_that_there_is_no_room():
    tensorstore = ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [28]")
    try:
        try:
            raise full()
        except OSError as error:
            raise RuntimeError("a checkpoint") from error
    except RuntimeError as error:
        chained = error
    assert is_full(full()) and is_full(tensorstore) and is_full(chained)
    assert is_full(OSError(errno.EDQUOT, "quota"))
    assert not is_full(OSError(errno.EACCES, "denied")) and not is_full(ValueError("RESOURCE"))


def test_a_write_is_made_once_there_is_room(capsys):
    outcomes = iter([full(), full(), "written"])

    def write():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert Patience(lambda: False)(write) == "written"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "waiting for room" in lines[0] and "going on" in lines[1]


def test_who_stops_does_not_wait():
    def write():
        raise full()

    with pytest.raises(GaveUp):
        Patience(lambda: True)(write)


def test_another_failure_is_not_waited_for():
    def write():
        raise PermissionError("denied")

    with pytest.raises(PermissionError):
        Patience(lambda: False)(write)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a size, which `grow` changes; skipped where nobody may mount one."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(option):
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            pytest.skip("mounting a file system takes root")

    mount("size=64k")
    yield place, lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_line_is_whole_or_not_there(small_disk):
    """On a full disk a part of a line can be written: it is taken back."""
    place, grow = small_disk
    log = MetricsLog(place / "metrics.jsonl", "run")
    log.write({"step": 1})
    record = {"text": "x" * 50_000}
    log.write(record)
    with pytest.raises(OSError, match="No space"):
        log.write(record)
    assert (place / "metrics.jsonl").read_bytes().endswith(b'"}\n')
    grow("1m")
    log.write({"step": 2})
    lines = (place / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines] == [None, 1, None, 2]


def test_a_run_on_a_full_disk_waits_and_loses_nothing(
    launch,
    undisturbed,
    small_disk,
    monkeypatch,
    capsys,
):
    """Room for some checkpoints, then for none, while something else takes it; then it leaves."""
    place, grow = small_disk
    grow("6m")
    filler = place / "filler"
    waiting = threading.Event()
    monkeypatch.setattr(disk, "_tell", lambda text: (print(text), waiting.set()))

    def fill(report):
        if report.tick == 20:
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))

    def make_room():
        waiting.wait(60)
        filler.unlink()

    helper = threading.Thread(target=make_room)
    helper.start()
    launch(place / "run", {"checkpoint.seconds": 0.0}, watch=fill)
    helper.join()
    assert_same_results(place / "run", undisturbed())
    assert "waiting for room" in capsys.readouterr().out


def test_a_run_that_is_stopped_on_a_full_disk_goes_on_later(
    launch,
    undisturbed,
    small_disk,
):
    """From the last checkpoint that there was room for, or from its start."""
    place, grow = small_disk
    grow("900k")  # not for one checkpoint
    assert launch(place / "run", {"checkpoint.seconds": 0.0}, stop=7) is None
    grow("20m")
    launch(place / "run")
    assert_same_results(place / "run", undisturbed())
