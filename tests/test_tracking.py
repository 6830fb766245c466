"""The log of a run, cut back on resumption; Weights & Biases; and where results come from."""

import hashlib
import json
import re
import subprocess
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from bitnet_jax import tracking
from bitnet_jax.files import SCHEMA_VERSION
from bitnet_jax.tracking import MetricsLog, Wandb, git_commit, log_begins, provenance

HEADER = {"kind": "header", "schema_version": SCHEMA_VERSION, "run_id": "a-run"}


def test_metrics_log_is_cut_back_to_what_was_known(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, "a-run")
    assert log.bytes == 0 == path.stat().st_size, "no line before there is one to tell"
    log.write({"step": 1, "loss": 0.1})
    known, digest = log.bytes, log.digest
    assert known == path.stat().st_size, "a line is in the file as soon as it is written"
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    log.write({"step": 2, "loss": None})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    log = MetricsLog(path, "a-run", keep=known)
    assert (log.bytes, log.digest) == (known, digest)
    log.write({"step": 2, "loss": 0.3})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [HEADER, {"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.3}]
    content = path.read_bytes()
    assert (log.bytes, log.digest) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_log_without_a_header_is_gone_on_with_as_it_is(tmp_path):
    """From before there were any."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    log = MetricsLog(path, "a-run", keep=12)
    log.write({"step": 2})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_metrics_log_takes_only_json(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", "a-run")
    with pytest.raises(ValueError):
        log.write({"loss": float("nan")})
    assert log.bytes == 0
    log.close()


def test_how_a_log_begins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"one\ntwo\n")
    one = hashlib.sha256(b"one\n").hexdigest()
    assert log_begins(path, 4, one) and log_begins(path, 8, None)
    assert not log_begins(path, 4, hashlib.sha256(b"one").hexdigest())
    assert not log_begins(path, 9, None), "shorter"
    path.write_bytes(b"onf\ntwo\n")
    assert not log_begins(path, 4, one)
    path.unlink()
    assert log_begins(path, 0, hashlib.sha256().hexdigest()) and not log_begins(path, 4, one)


def test_provenance():
    origin = provenance()
    assert origin.keys() == {"git_commit", "jax_version", "python_version", "device"}
    assert origin["jax_version"] == jax.__version__
    assert origin["device"].startswith(f"{jax.device_count()}x ")
    assert all(isinstance(value, str) and value for value in origin.values())


def test_git_commit_says_when_files_differ(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "tracking.py"))
    assert git_commit() == "unknown"
    (tmp_path / "tracking.py").write_text("1")
    git("init", "--quiet")
    git("add", "tracking.py")
    git("commit", "--quiet", "--message=first")
    clean = git_commit()
    assert len(clean) == 12 and int(clean, 16) >= 0
    (tmp_path / "new.txt").write_text("a result, not a change of the code")
    assert git_commit() == clean
    (tmp_path / "tracking.py").write_text("2")
    assert git_commit() == f"{clean}-dirty"


def test_wandb_mode_comes_from_the_config_then_the_environment(tmp_path, monkeypatch):
    import wandb

    asked = []

    def init(**settings):
        asked.append(settings["mode"])
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "online")
    for mode in ("offline", None, "disabled"):
        Wandb(mode, "project", "id", tmp_path, {}).close()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Wandb(None, "project", "id", tmp_path, {}).close()
    monkeypatch.delenv("WANDB_MODE")
    Wandb(None, "project", "id", tmp_path, {}).close()
    assert asked == ["offline", "online", "offline"]


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_broken_wandb_warns_once_and_is_left_alone(tmp_path, monkeypatch, capsys, broken):
    import wandb

    class Run:
        def log(self, metrics, step):
            fail("log")

        def finish(self):
            fail("finish")

    def fail(where):
        if where == broken:
            raise RuntimeError("no disk\nlong story")

    def init(**settings):
        fail("init")
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    tracker = Wandb("offline", "project", "id", tmp_path, {})
    tracker.log({"loss": 1.0}, 1)
    tracker.log({"loss": 1.0}, 2)
    tracker.close()
    error = capsys.readouterr().err
    assert error == "warning: Weights & Biases is off for this run: no disk\n"


@pytest.mark.parametrize("silent", ["init", "log", "finish"])
def test_wandb_that_does_not_answer_stops_nothing(tmp_path, monkeypatch, capsys, silent):
    """Neither a step nor the end waits for it, and the next run does not try it again."""
    import wandb

    answer, started = threading.Event(), []

    def wait(where):
        if where == silent:
            answer.wait(30)

    def init(**settings):
        started.append(settings["id"])
        wait("init")
        return SimpleNamespace(log=lambda *_, **__: wait("log"), finish=lambda: wait("finish"))

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(tracking, "WANDB_SECONDS", 0.3)
    monkeypatch.setattr(tracking, "WANDB_LINES", 10)
    monkeypatch.setattr(Wandb, "_unreachable", threading.Event())
    began = time.monotonic()
    tracker = Wandb("online", "project", "one", tmp_path, {})
    for tick in range(1000):
        tracker.log({"loss": 1.0}, tick)
    tracker.close()
    assert time.monotonic() - began < 5
    Wandb("online", "project", "two", tmp_path, {}).close()
    assert started == ["one"]
    assert "does not answer" in capsys.readouterr().err
    answer.set()


def test_two_wandb_runs_are_open_at_once(tmp_path, capsys):
    """Each writes its own file, also after the other is closed."""
    directories = [tmp_path / name for name in ("one", "two")]
    for directory in directories:
        directory.mkdir()
    one, two = (Wandb("offline", "project", path.name, path, {}) for path in directories)
    one.log({"early_of_one": 1.0}, 1)
    two.log({"early_of_two": 1.0}, 1)
    one.close()
    two.log({"late_of_two": 1.0}, 2)
    two.close()
    assert capsys.readouterr().err == ""
    for directory, expected in zip(directories, ({"early"}, {"early", "late"}), strict=True):
        (file,) = directory.glob("wandb/offline-run-*/run-*.wandb")
        assert file.name == f"run-{directory.name}.wandb"
        assert file.parent.name.endswith(f"-{directory.name}")
        expected = {(when.encode(), directory.name.encode()) for when in expected}
        deadline = time.monotonic() + 20  # another process writes it, a moment after the closing
        while logged(file) != expected and time.monotonic() < deadline:
            time.sleep(0.05)
        assert logged(file) == expected


def logged(file):
    return set(re.findall(rb"(early|late)_of_(one|two)", file.read_bytes()))
