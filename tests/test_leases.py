"""Leases on runs: one winner a race, succession of holders that are gone, damaged files."""

import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bitnet_jax.errors import ConfigError
from experiments.launch import lease_files
from experiments.launch.leases import TIMEOUT, Held, LeaseLost, Leases

ROOT = Path(__file__).parent.parent


class Clock:
    """Monotonic seconds that stand still until they are moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def launcher(tmp_path):
    """A function that gives a launcher's leases in this folder; they end with the test."""
    made = []

    def make(**options):
        made.append(Leases(tmp_path / "leases", **{"heartbeat": 3600.0, **options}))
        return made[-1]

    yield make
    for each in made:
        each.__exit__()


def files(folder):
    return sorted(os.listdir(folder / "leases"))


def wins(launchers, names, claims):
    """Who of the launchers, a thread each, won each round of claims. claims: of names by round."""
    barrier, won = threading.Barrier(len(launchers), timeout=60), [[] for _ in names]

    def race(index):
        for round_, name in enumerate(names):
            barrier.wait()
            try:
                launchers[index].claim(claims(index, name))
            except Held:
                continue
            won[round_].append(index)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(len(launchers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


# Claims


def test_of_threads_that_race_one_wins(launcher, tmp_path):
    """Two hundred times for a run that nobody has had, and again for one that was let go."""
    names = [f"run{i}" for i in range(200)]
    fresh = [launcher(), launcher()]
    assert [len(w) for w in wins(fresh, names, lambda _, name: [name])] == [1] * 200
    for each in fresh:
        each.__exit__()
    assert files(tmp_path) == sorted(f"{name}.1" for name in names)
    again = [launcher(), launcher(), launcher()]
    assert [len(w) for w in wins(again, names, lambda _, name: [name])] == [1] * 200
    assert {f for f in files(tmp_path) if f.endswith(".3")} == set()


def test_a_group_is_had_in_whole_by_one(launcher, tmp_path):
    """Asked for in opposite orders: never half, never both, and never neither."""
    names = [f"run{i}" for i in range(100)]
    racers = [launcher(), launcher()]
    pairs = wins(racers, names, lambda i, name: [f"{name}a", f"{name}b"][:: 1 - 2 * i])
    assert [len(winners) for winners in pairs] == [1] * 100
    assert files(tmp_path) == sorted(f"{name}{half}.1" for name in names for half in "ab")


def test_a_group_of_which_one_run_is_held_is_left_alone(launcher, tmp_path):
    launcher().claim(["b"])
    with pytest.raises(Held):
        launcher().claim(["a", "b", "c"])
    assert files(tmp_path) == ["b.1"]


RACER = """
import mmap, os, sys, time
from pathlib import Path
from experiments.launch.leases import Held, Leases
folder, me, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with open(folder / "gate", "r+b") as file:
    gate = mmap.mmap(file.fileno(), 2)
leases, won = Leases(folder / "leases"), []
for i in range(rounds):
    gate[me] = i + 1
    while gate[1 - me] < i + 1:
        time.sleep(0)
    try:
        leases.claim([f"run{i}"])
        won.append(i)
    except Held:
        pass
gate[me] = 255
while gate[1 - me] < 255:
    time.sleep(0.001)
print(*won)
"""


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_of_processes_that_race_one_wins(tmp_path):
    (tmp_path / "gate").write_bytes(bytes(2))
    racers = [start(RACER, tmp_path, i, 200) for i in range(2)]
    won = [[int(word) for word in racer.communicate(timeout=120)[0].split()] for racer in racers]
    assert sorted(won[0] + won[1]) == list(range(200))


# Holders that are gone

HOLDER = """
import sys
from pathlib import Path
from experiments.launch.leases import LeaseLost, Leases
leases = Leases(Path(sys.argv[1]), heartbeat=float(sys.argv[2]))
held = leases.claim(["run"])
print("held", flush=True)
for line in sys.stdin:
    try:
        leases.check(held)
        print("ours", flush=True)
    except LeaseLost:
        leases.beat()
        leases.release(held[0], done=line.strip() == "done")
        print("lost", flush=True)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds `run`, and says at each line it is given whether it still does."""
    made = []

    def make(heartbeat=0.02):
        made.append(start(HOLDER, tmp_path / "leases", heartbeat))
        assert made[-1].stdout.readline() == "held\n"
        return made[-1]

    yield make
    for process in made:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def ask(process, line="check"):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_killed_holder_is_succeeded_at_once_on_its_machine(holder, launcher):
    process, clock = holder(), Clock()
    successor = launcher(clock=clock)
    for _ in range(3):
        with pytest.raises(Held, match=f"pid {process.pid}$"):
            successor.claim(["run"])
    process.kill()
    process.wait()
    (lease,) = successor.claim(["run"])
    assert lease.generation == 2 and clock.now == 1000


def test_from_another_machine_a_killed_holder_lapses(holder, launcher):
    """By the watcher's clock, from its first look on, to the second."""
    process, clock = holder(), Clock()
    successor = launcher(clock=clock, machine="elsewhere")
    process.kill()
    process.wait()
    for now in (0, 1, TIMEOUT / 2, TIMEOUT - 0.001):
        clock.now = 1000 + now
        with pytest.raises(Held):
            successor.claim(["run"])
    clock.now = 1000 + TIMEOUT
    (lease,) = successor.claim(["run"])
    assert lease.generation == 2


def test_a_lock_of_another_mount_says_nothing(holder, launcher, monkeypatch):
    """Locks of the same files through another device may not be seen here."""
    process, original = holder(), os.fstat
    process.kill()
    process.wait()

    def fstat(descriptor):
        return os.stat_result((*original(descriptor)[:2], 1, *original(descriptor)[3:]))

    monkeypatch.setattr(lease_files.os, "fstat", fstat)
    with pytest.raises(Held):
        launcher().claim(["run"])


def test_a_living_holder_is_never_succeeded(launcher):
    """Whatever the watcher's clock says, as long as the counter moves between two of its looks."""
    clock = Clock()
    holding, watching = launcher(), launcher(clock=clock, machine="elsewhere")
    held = holding.claim(["run"])
    for _ in range(5):
        with pytest.raises(Held):
            watching.claim(["run"])
        clock.now += 10 * TIMEOUT
        holding.beat()
    with pytest.raises(Held):
        watching.claim(["run"])
    holding.check(held)


def test_a_watcher_that_sleeps_after_its_look_takes_nothing(launcher, monkeypatch):
    """What it read is old then, so the seconds until it asks its clock do not count. (Its holder
    may have slept beside it.)"""
    clock, read = Clock(), lease_files._read
    holding, watching = launcher(), launcher(clock=clock, machine="elsewhere")
    holding.claim(["run"])

    def read_and_sleep(path):
        content = read(path)
        clock.now += 2 * TIMEOUT
        return content

    with pytest.raises(Held):
        watching.claim(["run"])
    clock.now += 1
    monkeypatch.setattr(lease_files, "_read", read_and_sleep)
    with pytest.raises(Held):
        watching.claim(["run"])


def test_every_run_of_a_group_is_watched_from_the_first_look_on(launcher):
    clock = Clock()
    watching = launcher(clock=clock, machine="elsewhere")
    launcher().claim(["a", "b", "c"])
    with pytest.raises(Held):
        watching.claim(["a", "b", "c"])
    clock.now += TIMEOUT
    assert [lease.name for lease in watching.claim(["c", "b", "a"])] == ["a", "b", "c"]


@pytest.mark.parametrize("hours", [-1, 1])
def test_wall_clocks_do_not_matter(launcher, tmp_path, monkeypatch, hours):
    """Of the holder, of the watcher, or of the file server, an hour off."""
    assert inspect.signature(Leases).parameters["clock"].default is time.monotonic
    clock, shift = Clock(), 3600 * hours
    holding, watching = launcher(), launcher(clock=clock, machine="elsewhere")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + shift)
    monkeypatch.setattr(time, "time_ns", lambda: int((now + shift) * 1e9))
    holding.claim(["run"])
    file = tmp_path / "leases" / "run.1"
    for since in (0, TIMEOUT - 1):
        clock.now = 1000 + since
        os.utime(file, (now + shift, now + shift))
        with pytest.raises(Held):
            watching.claim(["run"])
    clock.now = 1000 + TIMEOUT
    assert watching.claim(["run"])[0].generation == 2


def test_a_suspended_holder_finds_that_it_was_succeeded(holder, launcher, tmp_path):
    """Stopped, not dead: only its silence counts. Going on, it writes and deletes nothing."""
    process, clock = holder(), Clock()
    assert ask(process) == "ours"
    successor = launcher(clock=clock)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    with pytest.raises(Held):
        successor.claim(["run"])
    clock.now += TIMEOUT
    (lease,) = successor.claim(["run"])
    content = (tmp_path / "leases" / "run.2").read_bytes()
    process.send_signal(signal.SIGCONT)
    assert ask(process, "done") == "lost"
    assert (tmp_path / "leases" / "run.2").read_bytes() == content
    successor.check([lease])


@pytest.mark.parametrize("done", [False, True])
def test_a_suspended_holder_finds_that_its_run_is_over(launcher, tmp_path, done):
    """Its successor let the run go, or finished it, so that no generation is left; or it was begun
    anew, so that there is another of the same number."""
    clock = Clock()
    suspended, successor = launcher(), launcher(clock=clock, machine="elsewhere")
    held = suspended.claim(["run"])
    with pytest.raises(Held):
        successor.claim(["run"])
    clock.now += TIMEOUT
    successor.release(successor.claim(["run"])[0], done)
    assert files(tmp_path) == ([] if done else ["run.1", "run.2"])
    with pytest.raises(LeaseLost):
        suspended.check(held)
    (new,) = successor.claim(["run"])
    suspended.beat()
    suspended.release(held[0], done=True)
    successor.check([new])
    with pytest.raises(LeaseLost):
        suspended.check(held)


def test_the_heartbeat_moves_every_counter(launcher, tmp_path):
    launcher(heartbeat=0.01).claim(["a", "b"])
    for name in ("a.1", "b.1"):
        file = tmp_path / "leases" / name
        before, deadline = file.read_bytes(), time.monotonic() + 20
        while file.read_bytes() == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# What is left behind


def test_files_of_the_past_are_cleared_away(launcher, tmp_path):
    for generation in range(1, 6):
        holding = launcher()
        (lease,) = holding.claim(["run"])
        assert lease.generation == generation
        holding.release(lease, done=False)
    assert files(tmp_path) == ["run.4", "run.5"]
    last = launcher()
    (other,), (lease,) = last.claim(["run.other"]), last.claim(["run"])
    last.release(lease, done=True)
    assert files(tmp_path) == ["run.other.1"]
    last.check([other])


def test_what_the_dead_have_left_of_finished_runs_is_cleared_away(holder, launcher, tmp_path):
    """What one that lives holds stays, and what is not finished; without a folder none is made."""
    finisher = launcher()
    finisher.clear(["run"])
    assert not (tmp_path / "leases").exists()
    process = holder()
    process.kill()
    process.wait()
    living = launcher()
    living.claim(["b"])
    (unfinished,) = living.claim(["c"])
    living.release(unfinished, done=False)
    finisher.clear(["run", "b", "none"])
    assert files(tmp_path) == ["b.1", "c.1"]


def test_a_claimant_that_read_the_folder_long_ago_finds_out(launcher, tmp_path, monkeypatch):
    """Generations have come and gone since, so that its own is free, but not the highest."""
    late, others = launcher(), [launcher() for _ in range(4)]
    others[0].release(others[0].claim(["run"])[0], done=False)
    free = late._free

    def free_then_wait(name):
        generation = free(name)
        for other in others[1:3]:
            other.release(other.claim(["run"])[0], done=False)
        others[3].claim(["run"])
        (tmp_path / "leases" / "run.2").unlink(missing_ok=True)
        return generation

    monkeypatch.setattr(late, "_all_free", lambda names: None)
    monkeypatch.setattr(late, "_free", free_then_wait)
    with pytest.raises(Held):
        late.claim(["run"])
    assert files(tmp_path) == ["run.3", "run.4"]


# Damage

DAMAGED = [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 4000, b"\0" * 10_000,
           b'{"host": 3, "pid": "x"}', b'{"host": "a\\u001b[2Jb", "pid": 1}', b'{"locks": {}}',
           b'{"released": "no"}', b"1" * 4096]  # fmt: skip


def damage(path, how):
    """Put something in a lease's place."""
    path.unlink(missing_ok=True)
    if isinstance(how, bytes):
        path.write_bytes(how)
    elif how == "folder":
        (path / "with").mkdir(parents=True)
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/nowhere/at/all" if how == "dangling" else "/dev/zero")


@pytest.mark.parametrize("how", [*DAMAGED, "folder", "pipe", "dangling", "endless"], ids=repr)
def test_what_is_no_lease_lapses_like_one(launcher, tmp_path, how):
    clock = Clock()
    (tmp_path / "leases").mkdir()
    damage(tmp_path / "leases" / "run.3", how)
    successor = launcher(clock=clock)
    with pytest.raises(Held) as held:
        successor.claim(["run"])
    assert str(held.value).isprintable() and "run.3" in str(held.value)
    clock.now += TIMEOUT
    (lease,) = successor.claim(["run"])
    assert lease.generation == 4
    successor.check([lease])
    successor.release(lease, done=True)
    assert files(tmp_path) == (["run.3"] if how == "folder" else [])


def test_files_of_other_names_are_not_leases(launcher, tmp_path):
    foreign = ["notes.txt", "run", "run.", "run.007", "run.0", "run.1.bak", "run.-1", "run.1e3",
               "run.9" + "9" * 30, "run.\u0661", "other.5"]  # fmt: skip
    (tmp_path / "leases").mkdir()
    for name in foreign:
        (tmp_path / "leases" / name).write_text("mine")
    holding = launcher()
    (lease,) = holding.claim(["run"])
    assert lease.generation == 1
    holding.release(lease, done=True)
    assert files(tmp_path) == sorted(foreign)
    assert all((tmp_path / "leases" / name).read_text() == "mine" for name in foreign)


@pytest.mark.parametrize("how", [*DAMAGED, "gone"], ids=repr)
def test_a_holder_whose_lease_is_damaged_writes_no_more(launcher, tmp_path, how):
    holding = launcher()
    held = holding.claim(["run"])
    (tmp_path / "leases" / "run.1").unlink()
    if how != "gone":
        (tmp_path / "leases" / "run.1").write_bytes(how)
    with pytest.raises(LeaseLost):
        holding.check(held)
    holding.release(held[0], done=False)


def test_a_folder_that_is_deleted_is_made_again(launcher, tmp_path):
    holding = launcher()
    held = holding.claim(["run"])
    (tmp_path / "leases" / "run.1").unlink()
    (tmp_path / "leases").rmdir()
    with pytest.raises(LeaseLost):
        holding.check(held)
    holding.release(held[0], done=True)
    holding.check(holding.claim(["run"]))


def test_names_do_not_lead_out_of_the_folder(launcher, tmp_path):
    """And no two are one."""
    names = ["../out", "/out", "..", ".", "", "a/b", "a%2Fb", "a\0b", "a\nb", "ä" * 300, "ä" * 301,
             "b" * 300, "b" * 301, "x.1", "x"]  # fmt: skip
    holding = launcher()
    for name in names:
        held = holding.claim([name])
        holding.check(held)
        with pytest.raises(Held):
            launcher().claim([name])
    assert len(files(tmp_path)) == len(names)
    assert os.listdir(tmp_path) == ["leases"]
    assert all((tmp_path / "leases" / file).is_file() for file in files(tmp_path))


def test_a_folder_that_cannot_be_is_said_in_one_line(launcher, tmp_path):
    (tmp_path / "leases").touch()
    with pytest.raises(ConfigError) as error:
        launcher().claim(["run"])
    text = str(error.value)
    assert str(tmp_path / "leases") in text and "folder" in text and "\n" not in text


def test_a_record_that_cannot_be_written_leaves_nothing(launcher, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    holding = launcher()
    monkeypatch.setattr(lease_files.os, "pwrite", full)
    with pytest.raises(ConfigError, match="No space left"):
        holding.claim(["a", "b"])
    monkeypatch.undo()
    assert files(tmp_path) == []
    holding.check(holding.claim(["a", "b"]))
