"""Sweeps whose workdir is a URL: the same bits, whoever goes on, wherever it was cut off."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from bitnet_jax.errors import ConfigError
from experiments.launch import mirror as mirror_module
from experiments.launch.mirror import INDEX, Mirror, check_name
from experiments.launch.store import Store, Unreachable, open_store
from experiments.run import main

pytest.importorskip("obstore")
ROOT = Path(__file__).parent.parent
SWEEP = """
from bitnet_jax.configs import default
from sweeps.grid import axis


def get_config(arg=None):
    c = default.get_config()
    c.update_from_flattened_dict({overrides!r})
    return c


def sweep(c):
    return axis("precision", ("fp32", "ternary"))
"""


@pytest.fixture(scope="module")
def command(tiny_overrides, tmp_path_factory):
    """Two runs of 40 steps, in segments of 16, 4, 16 and 8, which save at every log line."""
    file = tmp_path_factory.mktemp("sweeps") / "tiny.py"
    overrides = {**tiny_overrides, "checkpoint.seconds": 0.0, "launch.parallel": 1}
    del overrides["precision"]
    file.write_text(SWEEP.format(overrides=overrides))
    return ["run", "--sweep", f"--config={file}"]


@pytest.fixture(scope="module")
def in_a_folder(command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("folder")
    assert main([*command, f"--workdir={workdir}"]) == 0
    return workdir / "tiny"


def at(place, scratch):
    return [f"--workdir=file://{place}", f"--scratch={scratch}"]


def assert_same(sweep, other):
    """Logs to the byte, tables but for time, and models to the bit."""
    tables = [pd.read_parquet(folder / "endpoints.parquet") for folder in (sweep, other)]
    pd.testing.assert_frame_equal(*(table.drop(columns="wall_s") for table in tables))
    logs = [{path.parent.name: path.read_bytes() for path in folder.glob("runs/*/metrics.jsonl")}
            for folder in (sweep, other)]  # fmt: skip
    assert logs[0] == logs[1] and len(logs[0]) == 2
    models = [{path.parent.name: json.loads(path.read_text())["model"]
               for path in folder.glob("runs/*/summary.json")}
              for folder in (sweep, other)]  # fmt: skip
    assert models[0] == models[1] and all(models[0].values())


class Counted:
    """A store that counts what it is asked, and fails the calls that `fails` names."""

    def __init__(self, store, fails=lambda number, what: False):
        self._store, self._fails, self.calls, self.url = store, fails, [], store.url

    def __getattr__(self, what):
        method = getattr(self._store, what)

        def asked(*arguments):
            self.calls.append((what, *arguments[:1]))
            if self._fails(len(self.calls), what):
                raise Unreachable("the store is away")
            return method(*arguments)

        return asked


@pytest.fixture
def store(tmp_path):
    return open_store(f"file://{tmp_path}/store/tiny")


def objects(place):
    """Files of a store by name."""
    return {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}


# Whole sweeps


def test_the_same_bits_as_in_a_folder(command, in_a_folder, tmp_path, capsys):
    """The store then has all that the folder has, and no lease: a copy of it is such a folder."""
    place = tmp_path / "store"
    assert main([*command, *at(place, tmp_path / "scratch")]) == 0
    assert f"kept at: file://{place}/tiny" in capsys.readouterr().out
    assert_same(place / "tiny", in_a_folder)
    # Orbax names the files of its arrays at random.
    there, ours = ({name for name in objects(folder) if "/d/" not in name}
                   for folder in (place / "tiny", in_a_folder))  # fmt: skip
    assert there == ours and not any(name.startswith("leases/") for name in there)


def test_a_second_launch_fetches_nothing(command, in_a_folder, tmp_path, monkeypatch, capsys):
    """One listing before it trains; a launcher without the folder gets what is small alone."""
    shutil.copytree(in_a_folder, tmp_path / "store" / "tiny")
    given = [*command, *at(tmp_path / "store", tmp_path / "scratch")]
    assert main([*given, "--dry_run"]) == 0
    fetched = objects(tmp_path / "scratch")
    assert any(name.endswith("summary.json") for name in fetched)
    assert not any("checkpoints/" in name or "/model/" in name for name in fetched)
    asked = []
    for what in ("names", "read", "write", "create", "delete"):
        method = getattr(Store, what)
        monkeypatch.setattr(
            Store, what, lambda s, *a, m=method, w=what: (asked.append((w, *a)), m(s, *a))[1]
        )
    assert main([*given, "--dry_run"]) == 0
    assert asked == [("names", "")]


@pytest.mark.slow
def test_a_killed_worker_is_succeeded_by_one_without_its_disk(
    command, in_a_folder, tmp_path, monkeypatch, capsys
):
    """It goes on from a checkpoint, to the same bits."""
    place = tmp_path / "store"
    slow = [*command, "--worker", *at(place, tmp_path / "first")]
    code = ("import sys, time; from bitnet_jax import train; from experiments.run import main\n"
            "tick = train._Loop._save\n"
            "train._Loop._save = lambda self: (tick(self), time.sleep(1))[0]\n"
            "sys.exit(main(sys.argv))")  # fmt: skip
    worker = subprocess.Popen([sys.executable, "-c", code, *slow[1:]], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(place.glob("tiny/runs/*/checkpoints/*/_CHECKPOINT_METADATA")):
        assert worker.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    shutil.rmtree(tmp_path / "first")
    assert len(list(place.glob("tiny/runs/*/summary.json"))) < 2
    (log,) = place.glob("tiny/runs/*/metrics.jsonl")
    known = log.read_bytes()
    monkeypatch.setattr("experiments.launch.lease_objects.TIMEOUT", 2.0)
    assert main([*command, *at(place, tmp_path / "second")]) == 0
    out = capsys.readouterr()
    assert "has ended without a word" in out.out and "again from step 0" not in out.err
    assert log.read_bytes().startswith(known[: known.rfind(b"\n") + 1])
    assert_same(place / "tiny", in_a_folder)


# Of a run's folder, without training


@pytest.fixture
def run_id(in_a_folder):
    return sorted(path.name for path in (in_a_folder / "runs").iterdir())[0]


@pytest.fixture
def trained(in_a_folder, tmp_path):
    folder = tmp_path / "here" / "tiny"
    shutil.copytree(in_a_folder, folder)
    shutil.rmtree(folder / "leases", ignore_errors=True)
    return folder


def nothing():
    """Nobody has taken the run over."""


def contents(folder, prefix):
    return {name: path.read_bytes() for name, path in objects(folder).items()
            if name.startswith(prefix) and name != INDEX}  # fmt: skip


def test_a_run_is_fetched_as_it_was_sent(store, trained, run_id, tmp_path):
    Mirror(store, trained).push_run(run_id, nothing)
    elsewhere = Mirror(store, tmp_path / "elsewhere" / "tiny")
    stray = elsewhere.folder / "runs" / run_id / "checkpoints" / "999" / "state"
    stray.mkdir(parents=True)
    (stray / "array").write_text("of a launcher that never sent it")
    elsewhere.pull_run(run_id)
    assert contents(elsewhere.folder, "runs") == contents(trained, f"runs/{run_id}")
    assert not stray.parent.exists(), "orbax would take it for a checkpoint"


def test_what_goes_here_goes_there_and_what_is_alike_is_not_sent(store, trained, run_id):
    counted = Counted(store)
    mirror = Mirror(counted, trained)
    mirror.push_run(run_id, nothing)
    first = len(counted.calls)
    mirror.push_run(run_id, nothing)
    assert [call[0] for call in counted.calls[first:]] == ["names"]
    oldest = min((trained / "runs" / run_id / "checkpoints").iterdir(), key=lambda p: int(p.name))
    shutil.rmtree(oldest)
    with open(trained / "runs" / run_id / "metrics.jsonl", "a") as log:
        log.write("more\n")
    Mirror(counted, trained).push_run(run_id, nothing)  # another process, which has the index
    assert [call for call in counted.calls if call[0] == "write"][-1][1].endswith("metrics.jsonl")
    assert sum(call[0] == "write" for call in counted.calls) == first - 1 + 1
    there = set(store.names())
    assert there == {name for name in objects(trained) if name.startswith(f"runs/{run_id}/")}


def test_the_order_in_which_a_run_is_sent(trained, run_id, tmp_path):
    """The log before the checkpoints that count its lines, the newest of these first and each with
    its marker last, the summary after all that it seals."""
    counted = Counted(open_store(f"file://{tmp_path}/whole/tiny"))
    Mirror(counted, trained).push_run(run_id, nothing)
    sent = [call[1] for call in counted.calls if call[0] == "write"]
    assert sent[-1].endswith("summary.json")
    markers = [i for i, name in enumerate(sent) if name.endswith("_CHECKPOINT_METADATA")
               and name.count("/") == 4]  # fmt: skip
    logs = [i for i, name in enumerate(sent) if name.endswith("metrics.jsonl")]
    ticks = [int(sent[i].split("/")[3]) for i in markers]
    assert ticks == sorted(ticks, reverse=True) and len(ticks) == 2 and max(logs) < min(markers)
    older = f"runs/{run_id}/checkpoints/{ticks[1]}/"
    assert not any(name.startswith(older) for name in sent[: markers[0]])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_push_that_is_cut_off(command, in_a_folder, trained, run_id, tmp_path, share):
    """Anywhere. The next launcher, elsewhere, comes to the same bits."""
    whole = Counted(open_store(f"file://{tmp_path}/whole/tiny"))
    Mirror(whole, trained).push_run(run_id, nothing)
    last = int(share * len(whole.calls))
    place = tmp_path / "store"
    cut = Counted(open_store(f"file://{place}/tiny"), lambda number, what: number > last)
    (trained / INDEX).unlink()
    with pytest.raises(Unreachable):
        Mirror(cut, trained).push_run(run_id, nothing)
    assert main([*command, *at(place, tmp_path / "scratch")]) == 0
    assert_same(place / "tiny", in_a_folder)


def test_a_lost_lease_sends_nothing_more(store, trained, run_id):
    class Lost(Exception):
        pass

    def lost():
        raise Lost

    with pytest.raises(Lost):
        Mirror(store, trained).push_run(run_id, lost)
    assert store.names() == {}


def test_torn_files_and_links_stay_here(store, trained, run_id, tmp_path):
    run = trained / "runs" / run_id
    before = contents(trained, f"runs/{run_id}")
    (run / f".summary.json.{'a' * 32}").write_text("{")
    torn = run / "checkpoints" / "7.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "array").write_text("half")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("not yours")
    (run / "link").symlink_to(tmp_path / "secret")
    (run / "file").symlink_to(tmp_path / "secret" / "key")
    Mirror(store, trained).push_run(run_id, nothing)
    assert set(store.names()) == set(before)


@pytest.mark.parametrize("name", [
    "../x", "a/../../x", "/etc/x", "a//x", "a\\..\\x", "a\0b", "a\nb", ".", "a/.", "x" * 300,
])  # fmt: skip
def test_names_that_lead_elsewhere(name, store, tmp_path):
    with pytest.raises(ConfigError, match="an object whose name"):
        check_name(name)
    listed = Counted(store)
    listed.names = lambda prefix="": {f"runs/r/{name}" if name[0] == "a" else name: "1"}
    with pytest.raises(ConfigError):
        Mirror(listed, tmp_path / "here").pull_small()
    assert [path for path in tmp_path.rglob("*") if path.name in ("x", "b")] == []


def test_a_changed_object_is_fetched_again(store, tmp_path):
    """By its version; and a file that was changed here, too."""
    store.write("fits.json", b"one")
    mirror = Mirror(store, tmp_path / "here")
    mirror.pull_small()
    store.write("fits.json", b"two")
    mirror.pull_small()
    assert (mirror.folder / "fits.json").read_bytes() == b"two"
    (mirror.folder / "fits.json").write_bytes(b"3")
    Mirror(store, mirror.folder).pull_small()
    assert (mirror.folder / "fits.json").read_bytes() == b"two"
    (mirror.folder / INDEX).write_text("{")
    Mirror(store, mirror.folder).pull_small()
    assert (mirror.folder / "fits.json").read_bytes() == b"two"


# Networks that fail


@pytest.mark.slow
def test_a_store_that_fails_now_and_then(command, in_a_folder, tmp_path, monkeypatch, capsys):
    """Every seventh request of a push. It is told, nothing is lost, the bits are the same."""
    monkeypatch.setattr("experiments.launch.sharing.AGAIN", 0.05)
    monkeypatch.setattr("experiments.launch.sharing.LOOK", 0.05)
    count, lock, begun = [0], threading.Lock(), threading.Event()

    def failing(method):
        def asked(self, *arguments):
            with lock:
                count[0] += begun.is_set()
                if begun.is_set() and count[0] % 7 == 0:
                    raise Unreachable("the store is away")
            return method(self, *arguments)

        return asked

    for what in ("names", "read", "write", "create"):
        monkeypatch.setattr(Store, what, failing(getattr(Store, what)))
    pushed = mirror_module.Mirror.push_run

    def push(self, *arguments):
        begun.set()
        try:
            return pushed(self, *arguments)
        finally:
            begun.clear()

    monkeypatch.setattr(mirror_module.Mirror, "push_run", push)
    place = tmp_path / "store"
    assert main([*command, *at(place, tmp_path / "scratch")]) == 0
    assert count[0] > 30 and "the store is away; training goes on" in capsys.readouterr().out
    assert_same(place / "tiny", in_a_folder)


# A user's mistakes


@pytest.mark.parametrize(("flags", "says"), [
    (["--workdir=ftp://x/y"], "workdir='ftp://x/y/tiny': unknown scheme"),
    (["--workdir=gs://"], "workdir='gs:/"),
    (["--scratch=s"], "--scratch: only with a URL"),
    (["--workdir=s3://b/x", "--scratch=s3://c"], "scratch='s3://c': it must be a folder"),
    (["--workdir=s3://b/x", "--launcher=slurm"], "workdir='s3://b/x': with --launcher=slurm"),
    (["--workdir=s3://b/x", "--distributed=auto"], "workdir='s3://b/x': with --distributed"),
])  # fmt: skip
def test_what_is_refused(command, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    assert main([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--reproduce=gs://b/runs/x"],
                                   ["--reproduce=results/x", "--workdir=gs://b"]])  # fmt: skip
def test_a_run_at_a_url_is_not_reproduced(flags, capsys):
    assert main(["run", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "gs://b" in error and error.count("\n") == 1
