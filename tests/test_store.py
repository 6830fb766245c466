"""Objects of a folder, and of S3 as an emulator speaks it: whole, versioned, created by one."""

import json
import threading

import pandas as pd
import pytest
from test_mirror import SWEEP

from bitnet_jax.errors import ConfigError
from experiments.launch.lease_objects import LeaseObjects
from experiments.launch.leases import Held, LeaseLost, Leases
from experiments.launch.store import Store, Unreachable, open_store
from experiments.run import main

pytest.importorskip("obstore")
BUCKET = "bucket"


@pytest.fixture(scope="module")
def s3():
    """The URL of an empty bucket on this machine, and what makes obstore find it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            patch.setenv(key, value)
        import boto3

        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    server.stop()


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def url(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return f"file://{tmp_path}/store"


@pytest.fixture
def store(url):
    return open_store(url)


def test_what_is_written_is_read_and_listed(store):
    first = store.write("a/b", b"one")
    store.write("a/empty", b"")
    store.write("ab", b"beside")
    assert store.read("a/b") == b"one" and store.read("a/empty") == b""
    assert set(store.names()) == {"a/b", "a/empty", "ab"}
    assert set(store.names("a")) == {"a/b", "a/empty"} and store.names("a")["a/b"] == first
    assert store.write("a/b", b"two") != first
    store.delete(["a/b", "a/none"])
    assert set(store.names("a")) == {"a/empty"}
    with pytest.raises(FileNotFoundError):
        store.read("a/b")


def test_names_of_all_kinds(store):
    names = ["runs/a b/c%41", "x+y=z,.1", "ünï", "leases/27k-fp32%2Fs0.12"]
    for name in names:
        store.write(name, name.encode())
    assert set(store.names()) == set(names)
    assert [store.read(name).decode() for name in names] == names


def test_one_of_many_creates(store):
    """Of 16 threads, ten times; what the others wrote is nowhere."""
    for round_ in range(10):
        barrier, won = threading.Barrier(16), []

        def create(index, name=f"lease.{round_}", barrier=barrier, won=won):
            barrier.wait()
            try:
                store.create(name, str(index).encode())
            except FileExistsError:
                return
            won.append(index)

        threads = [threading.Thread(target=create, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and store.read(f"lease.{round_}") == str(won[0]).encode()


# Leases in it


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_leases(store):
    """One has it; a silent one is succeeded and finds out; a finished run leaves nothing."""
    clock = Clock()
    first, second = (Leases(LeaseObjects(store), heartbeat=3600, clock=clock) for _ in range(2))
    (lease,) = first.claim(["run"])
    with pytest.raises(Held, match="pid"):
        second.claim(["run"])
    clock.now += 59
    first.beat()
    with pytest.raises(Held):
        second.claim(["run"])
    clock.now += 59
    with pytest.raises(Held):
        second.claim(["run"])
    first.check([lease])
    clock.now += 2
    (taken,) = second.claim(["run"])
    assert (taken.generation, taken.orphaned) == (2, True)
    first.guard([lease])  # takes no request, so it does not know yet
    with pytest.raises(LeaseLost):
        first.check([lease])
    with pytest.raises(LeaseLost):
        first.guard([lease])
    second.release(taken, done=True)
    first.release(lease, done=True)
    assert store.names() == {}
    (again,) = first.claim(["run"])
    assert not again.orphaned
    first.release(again, done=False)
    (next_,) = second.claim(["run"])
    assert (next_.generation, next_.orphaned) == (2, False)


def test_a_claim_whose_answer_was_lost_is_ones_own(store, monkeypatch):
    """The request is sent again, and finds the object there."""
    create = Store.create

    def twice(self, name, content):
        create(self, name, content)
        create(self, name, content)

    monkeypatch.setattr(Store, "create", twice)
    leases = Leases(LeaseObjects(store), heartbeat=3600)
    (lease,) = leases.claim(["run"])
    leases.check([lease])
    with pytest.raises(Held):
        Leases(LeaseObjects(store), heartbeat=3600).claim(["run"])


@pytest.mark.parametrize("what", ["names", "read", "create"])
def test_a_store_that_is_away_is_no_lost_lease(store, monkeypatch, what):
    leases = Leases(LeaseObjects(store), heartbeat=3600)
    (lease,) = leases.claim(["one"])

    def away(self, *arguments):
        raise Unreachable("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(Store, what, away)
        with pytest.raises(Held, match="the store is away"):
            leases.claim(["one", "two"] if what == "read" else ["two"])
        if what != "create":
            with pytest.raises(Unreachable):
                leases.check([lease])
        leases.guard([lease])
    leases.check([lease])
    assert list(store.names()) == ["leases/one.1"]


# Stores that are not there


def test_a_bucket_that_is_not_there(s3, tmp_path, tiny_overrides, capsys):
    """Said in a line, before anything trains."""
    (tmp_path / "tiny.py").write_text(SWEEP.format(overrides=tiny_overrides))
    given = ["run", "--sweep", f"--config={tmp_path / 'tiny.py'}", "--workdir=s3://none/there",
             f"--scratch={tmp_path / 'scratch'}"]  # fmt: skip
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: s3://none/there/tiny") and error.count("\n") == 1
    assert "there is no such bucket" in error
    assert not list(tmp_path.glob("scratch/*/*/tiny/runs"))


def test_no_store_without_obstore(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(ConfigError, match="pip install"):
        open_store("gs://bucket/path")


@pytest.mark.slow
def test_a_sweep_on_s3(s3, tiny_overrides, tmp_path):
    """By a worker and then by a launcher, each on a disk of its own: as in a folder, to the bit."""
    overrides = {key: value for key, value in tiny_overrides.items() if key != "precision"}
    (tmp_path / "tiny.py").write_text(SWEEP.format(overrides=overrides))
    command = ["run", "--sweep", f"--config={tmp_path / 'tiny.py'}"]
    assert main([*command, f"--workdir={tmp_path / 'folder'}"]) == 0
    at = [f"--workdir={s3}/sweeps", f"--scratch={tmp_path}"]
    assert main([*command, "--worker", *at[:1], f"--scratch={tmp_path / 'one'}"]) == 0
    assert main([*command, *at[:1], f"--scratch={tmp_path / 'two'}"]) == 0
    store, folder = open_store(f"{s3}/sweeps/tiny"), tmp_path / "folder" / "tiny"
    (tmp_path / "there.parquet").write_bytes(store.read("endpoints.parquet"))
    tables = [
        pd.read_parquet(p) for p in (tmp_path / "there.parquet", folder / "endpoints.parquet")
    ]
    pd.testing.assert_frame_equal(*(table.drop(columns="wall_s") for table in tables))
    for path in folder.glob("runs/*/*"):
        name = path.relative_to(folder).as_posix()
        if path.name == "metrics.jsonl":
            assert store.read(name) == path.read_bytes()
        if path.name == "summary.json":
            model = json.loads(path.read_text())["model"]
            assert json.loads(store.read(name))["model"] == model
    assert not [name for name in store.names() if name.startswith("leases/")]
