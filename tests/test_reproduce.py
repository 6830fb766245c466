"""A finished run, made again: the same to the bit, or what differs first, or why it cannot be."""

import json
import shutil

import jax
import pytest
from run_files import DAMAGES, cut, flipped
from test_train import out_of_memory_above

from bitnet_jax import tracking
from bitnet_jax.checkpoint import load_model, save_model
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.disk import Patience
from bitnet_jax.files import SCHEMA_VERSION, read_json, write_json
from bitnet_jax.fingerprint import fingerprint
from bitnet_jax.member import Job, Member
from bitnet_jax.train import Interrupted, train_and_evaluate, train_group
from bitnet_jax.train_step import compiled_init
from experiments import reproduce
from experiments.differences import ABSENT, described, differences
from experiments.launch import local
from experiments.run import main

EQUAL, DIFFERENT, REFUSED = 0, 1, 2


@pytest.fixture(scope="module", autouse=True)
def commit():
    """Whatever is being edited while the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "git_commit", lambda: "abc123")
        yield


@pytest.fixture(scope="module")
def trained(tiny_config, tiny_corpus, tmp_path_factory):
    """The directory of a finished run, by its overrides; stop: a tick at which it is interrupted,
    and goes on."""

    def make(overrides=None, stop=None):
        config, path = tiny_config(overrides), tmp_path_factory.mktemp("run")
        arguments = resolve(config, tiny_corpus), tiny_corpus, path, loop_options(config)
        if stop is not None:
            with pytest.raises(Interrupted):
                should_stop = lambda tick: tick >= stop  # noqa: E731
                train_and_evaluate(*arguments, config.to_dict(), should_stop=should_stop)
        train_and_evaluate(*arguments, config.to_dict())
        return path

    return make


@pytest.fixture(scope="module")
def original(trained):
    return trained()


@pytest.fixture
def copied(original, tmp_path):
    """A copy of the finished run, to alter."""
    return shutil.copytree(original, tmp_path / "copy")


@pytest.fixture
def again(tmp_path):
    """Reproduce a run: the exit status."""

    def run(directory, *flags):
        return main(["run", f"--reproduce={directory}", f"--workdir={tmp_path / 'w'}", *flags])

    return run


def files(directory):
    """All that a directory holds."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in directory.rglob("*") if p.is_file()}


def comparison(workdir, name="reproduced"):
    """reproduction.json, with what was compared by its first word."""
    (path,) = workdir.glob(f"{name}/runs/*/reproduction.json")
    document = read_json(path)
    return document, {row["what"].split(",")[0]: row for row in document["compared"]}


def alter(directory, name, **changes):
    path = directory / name
    write_json(path, {**read_json(path), **changes})


def alter_log(directory, change):
    """Other lines, which the summary believes in."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))
    content = path.read_bytes()
    digest = tracking.hashlib.sha256(content).hexdigest()
    alter(directory, "summary.json", metrics={"bytes": len(content), "sha256": digest})


# The same


def test_the_same_to_the_bit(original, again, tmp_path, capsys):
    """Nothing is written where the original lies, and of nothing that differs by its nature."""
    before = files(original)
    assert again(original) == EQUAL
    assert files(original) == before
    document, compared = comparison(tmp_path / "w")
    assert set(compared) == {"2 endpoints", "metrics.jsonl", "model", "summary"}
    assert document["equal"] and all(row["equal"] for row in document["compared"])
    assert compared["2 endpoints"]["largest_loss_difference"] == 0.0
    assert compared["metrics.jsonl"]["largest_loss_difference"] == 0.0
    assert {p["comparison"] for p in document["provenance"].values()} == {"same"}
    (new,) = tmp_path.glob("w/reproduced/runs/*")
    assert (new / "metrics.jsonl").read_bytes() == (original / "metrics.jsonl").read_bytes()
    assert (
        read_json(new / "summary.json")["wall_s"] != read_json(original / "summary.json")["wall_s"]
    )
    out = capsys.readouterr().out
    for text in (str(original), str(new), "equal to the bit", "bits a byte", "reproduction.json"):
        assert text in out
    assert "DIFFERENT" not in out and "differs" not in out


def test_it_is_trained_afresh_each_time(original, again, tmp_path, monkeypatch):
    """Alone, without Weights & Biases, which would write to the original's run there."""
    jobs_of = []
    train = local.train_group

    def spy(jobs, corpus, options, *rest, **named):
        jobs_of.append((jobs, options.wandb_mode))
        return train(jobs, corpus, options, *rest, **named)

    monkeypatch.setattr(local, "train_group", spy)
    assert again(original) == again(original) == EQUAL
    assert [(len(jobs), mode) for jobs, mode in jobs_of] == [(1, "disabled")] * 2
    names = [jobs[0].run_dir.parts[-3] for jobs, _ in jobs_of]
    assert names == ["reproduced", "reproduced-2"]
    reproduction = jobs_of[0][0][0].run_dir
    assert again(reproduction) == EQUAL, "a reproduction is a run as any other"
    assert jobs_of[-1][0][0].run_dir.parts[-3] == "reproduced-3"


def test_wandb_is_never_asked_for(copied, again, monkeypatch):
    """Its run would have the original's id."""
    asked = []
    monkeypatch.setattr(tracking, "_start_wandb", lambda *rest: asked.append(rest))
    config = read_json(copied / "config.json")["config"]
    config["tracking"]["wandb"] = "online"
    alter(copied, "config.json", config=config)
    assert again(copied) == EQUAL
    assert asked == []


def test_a_run_that_was_interrupted(trained, again):
    assert again(trained(stop=25)) == EQUAL


def test_a_run_of_a_group(tiny_config, tiny_corpus, tmp_path, again, capsys):
    """The second of two, each with its own seed and rate: near, and not promised to be the same."""
    configs = [tiny_config(), tiny_config({"seed": 1, "optim.peak_lr": 0.004})]
    jobs = [
        Job(resolve(config, tiny_corpus), tmp_path / str(i), config.to_dict())
        for i, config in enumerate(configs)
    ]
    train_group(jobs, tiny_corpus, loop_options(configs[0]))
    status = again(tmp_path / "1")
    document, compared = comparison(tmp_path / "w")
    assert status == (EQUAL if document["equal"] else DIFFERENT)
    assert compared["2 endpoints"]["largest_loss_difference"] < 1e-5
    group = {"original": "2", "reproduction": "1", "comparison": "differs"}
    assert document["provenance"]["group"] == group
    assert "not known to be: group)" in capsys.readouterr().out
    summary = tmp_path / "1" / "summary.json"
    rest = {key: value for key, value in read_json(summary).items() if key != "groups"}
    write_json(summary, rest)
    again(tmp_path / "1")
    document, _ = comparison(tmp_path / "w", "reproduced-2")
    assert document["provenance"]["group"]["comparison"] == "not known"


def test_a_run_whose_batch_was_cut(trained, again, tmp_path, monkeypatch):
    """It went out of memory; its sums are those of 4 microbatches, now on a larger machine, too."""
    with monkeypatch.context() as patch:
        out_of_memory_above(patch, rows=2)
        directory = trained()
    assert read_json(directory / "summary.json")["microbatches"] == 4
    assert again(directory) == EQUAL
    (new,) = tmp_path.glob("w/reproduced/runs/*/summary.json")
    assert read_json(new)["microbatches"] == 4
    alter(directory, "summary.json", microbatches=1)
    assert again(directory) == DIFFERENT, "or else the test would show nothing"


@pytest.mark.parametrize(
    "overrides", [{"checkpoint.keep_model": False}, {"optim.peak_lr": 1e30}], ids=str
)
def test_a_run_without_a_model(trained, again, overrides, tmp_path):
    """One that kept none, and one that diverged: its losses are null, which is the same, too."""
    directory = trained(overrides)
    assert not (directory / "model").exists()
    assert again(directory) == EQUAL
    losses = comparison(tmp_path / "w")[1]["2 endpoints"]["largest_loss_difference"]
    assert losses == (0.0 if "checkpoint.keep_model" in overrides else None)


def test_dry_run_writes_nothing(original, again, tmp_path, capsys):
    assert again(original, "--dry_run") == 0
    out = capsys.readouterr().out
    assert "reproduced: 1 runs" in out and " new " in out
    assert not (tmp_path / "w").exists()


# Interruption


def stop_at(monkeypatch, tick):
    """A signal once a run has come so far."""
    train = local.train_group

    def stopped(jobs, corpus, options, watch, should_stop, guard):
        return train(jobs, corpus, options, watch, lambda now: now >= tick, guard)

    monkeypatch.setattr(local, "train_group", stopped)


def test_the_same_command_goes_on(original, again, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 25)
        assert again(original) == 130
    assert f"--reproduce={original}" in capsys.readouterr().out
    (new,) = tmp_path.glob("w/reproduced/runs/*")
    assert list((new / "checkpoints").iterdir())
    assert again(original, "--dry_run") == 0
    assert " resume " in capsys.readouterr().out
    assert again(original) == EQUAL and (new / "summary.json").exists()


def test_what_other_code_began_is_left_alone(original, again, tmp_path, monkeypatch):
    """Half of it would not show what this code makes; nor what another config logs."""
    with monkeypatch.context() as patch:
        stop_at(patch, 25)
        patch.setattr(tracking, "git_commit", lambda: "another")
        assert again(original) == 130
    begun = files(tmp_path / "w" / "reproduced" / "runs")
    assert again(original) == EQUAL
    assert files(tmp_path / "w" / "reproduced" / "runs") == begun
    document, _ = comparison(tmp_path / "w", "reproduced-2")
    assert document["provenance"]["git_commit"]["comparison"] == "same"


def test_a_failure(original, again, monkeypatch, capsys):
    def broken(*rest, **named):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(local, "train_group", broken)
    assert again(original) == DIFFERENT
    assert "no kernel" in (out := capsys.readouterr().out) and "nothing to compare" in out


def test_a_run_that_goes_back_remembers_where_it_has_been(tiny_config, tiny_corpus, tmp_path):
    """All that it was trained under: the launch since the anchor, too, by other code or in another
    group."""
    config = tiny_config()
    spec, options = resolve(config, tiny_corpus), loop_options(config)
    member = Member(Job(spec, tmp_path, {}), tiny_corpus, options, Patience(lambda: True))
    member.progress.origins, member.progress.groups = {"git_commit": ["a"]}, [1]
    member.open([member.spec.run_id])
    member.anchor()
    member.progress.origins["git_commit"].append("b")
    member.progress.groups = [1, 2]
    member.roll_back(blamed=True, segment=spec.segments[0], done=0)
    assert member.progress.origins["git_commit"] == ["a", "abc123", "b"]
    assert member.progress.groups == [1, 2] and member.progress.rollbacks == 1
    member.close()


# Different


def test_an_endpoint_of_another_loss(copied, again, tmp_path, capsys):
    rows = read_json(copied / "summary.json")["endpoints"]
    loss = rows[1]["loss"]
    alter(copied, "summary.json", endpoints=[rows[0], {**rows[1], "loss": loss + 0.25}])
    assert again(copied) == DIFFERENT
    document, compared = comparison(tmp_path / "w")
    row = compared["2 endpoints"]
    assert not document["equal"] and not row["equal"]
    assert row["first_difference"] == f"endpoint of 5120 tokens: loss={loss + 0.25!r}, now {loss!r}"
    assert row["largest_loss_difference"] == pytest.approx(0.25)
    assert [r["equal"] for r in document["compared"]] == [False, True, True, True]
    out = capsys.readouterr().out
    assert row["first_difference"] in out and out.count("DIFFERENT") == 1
    assert "different, though code, versions and device are the same" in out


def test_an_endpoint_too_many(copied, again, tmp_path):
    rows = read_json(copied / "summary.json")["endpoints"]
    alter(copied, "summary.json", endpoints=[*rows, {**rows[1], "tokens": 9999}])
    assert again(copied) == DIFFERENT
    assert (
        "endpoint of 9999 tokens"
        in comparison(tmp_path / "w")[1]["3 endpoints"]["first_difference"]
    )


def change_loss(lines):
    record = json.loads(lines[2])
    return [*lines[:2], json.dumps({**record, "loss": record["loss"] + 0.5}) + "\n", *lines[3:]]


CHANGES = {
    "value": (change_loss, "line 3 (train, step 14): loss=", 0.5),
    "space": (lambda lines: [lines[0], " " + lines[1], *lines[2:]], "line 2: ' {", 0.0),
    "lost": (lambda lines: lines[:-1], "line 12: absent, now ", 0.0),
    "more": (lambda lines: [*lines, "{}\n"], "line 13: '{}\\n', now absent", 0.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_log(copied, again, tmp_path, capsys, change):
    changed, first, largest = CHANGES[change]
    alter_log(copied, changed)
    assert again(copied) == DIFFERENT
    document, compared = comparison(tmp_path / "w")
    row = compared["metrics.jsonl"]
    assert row["first_difference"].startswith(first)
    assert row["largest_loss_difference"] == pytest.approx(largest)
    assert [r["equal"] for r in document["compared"]] == [True, False, True, True]
    assert row["first_difference"] in capsys.readouterr().out


def test_another_model(copied, again, tmp_path, tiny_config, tiny_corpus):
    """Of one weight's lowest bit, or so."""
    like = compiled_init(resolve(tiny_config(), tiny_corpus).step)(0).params
    params = load_model(copied, like)
    old = fingerprint(params)
    new = save_model(copied, jax.tree.map(lambda x: x + 1, params))
    alter(copied, "summary.json", model=new)
    assert again(copied) == DIFFERENT
    document, compared = comparison(tmp_path / "w")
    row = compared["model"]
    assert repr(new) in row["first_difference"] and row["first_difference"].endswith(repr(old))
    assert [r["equal"] for r in document["compared"]] == [True, True, False, True]


def test_other_counts(copied, again, tmp_path):
    alter(copied, "summary.json", rollbacks=1)
    assert again(copied) == DIFFERENT
    assert comparison(tmp_path / "w")[1]["summary"]["first_difference"] == "rollbacks=1, now 0"


@pytest.mark.parametrize("key", reproduce.PROVENANCE)
def test_other_provenance_is_shown_and_is_no_difference(copied, again, tmp_path, capsys, key):
    """Neither in the header nor in the rows that repeat it."""
    summary = read_json(copied / "summary.json")
    rows = [{**row, key: "another", "wall_s": 5.0} for row in summary["endpoints"]]
    alter(copied, "summary.json", **{key: "another"}, endpoints=rows)
    assert again(copied) == EQUAL
    document, _ = comparison(tmp_path / "w")
    marks = {name: value["comparison"] for name, value in document["provenance"].items()}
    assert marks == {name: "differs" if name == key else "same" for name in reproduce.ORIGINS}
    assert document["provenance"][key]["original"] == "another"
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "another" in line]
    assert key in line and "differs" in line
    assert f"equal to the bit (not the same, or not known to be: {key})" in out


def test_a_difference_that_was_to_be_expected(copied, again, capsys):
    alter(copied, "summary.json", rollbacks=1, jax_version="0.0")
    assert again(copied) == DIFFERENT
    assert "equality was not promised" in capsys.readouterr().out


def test_of_a_dirty_commit_nothing_is_known(trained, again, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "git_commit", lambda: "abc-dirty")
    assert again(trained()) == EQUAL
    known = comparison(tmp_path / "w")[0]["provenance"]["git_commit"]
    assert known["comparison"] == "not known"


# What cannot be reproduced


@pytest.fixture
def refused(again, tmp_path, capsys):
    """One line on stderr, nothing written; gives the line."""

    def check(directory, *flags):
        capsys.readouterr()
        assert again(directory, *flags) == REFUSED
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert not (tmp_path / "w").exists()
        return error

    return check


@pytest.mark.parametrize(
    "flag", ["--sweep", "--config.seed=3", "--config=sweeps/quickstart.py", "-config.seed=3"]
)
def test_flags_that_do_not_go_together(original, refused, flag):
    error = refused(original, flag)
    assert flag in error and "does not go with --reproduce" in error


def test_not_a_run(refused, tmp_path):
    assert "not a run directory" in refused(tmp_path)
    assert "not a run directory" in refused(tmp_path / "nowhere")
    assert "not a run directory" in refused("")


def test_an_unfinished_run(copied, refused):
    (copied / "summary.json").unlink()
    assert "no summary.json; train the run to its end" in refused(copied)


@pytest.mark.parametrize("damage", [cut, flipped])
@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl"])
def test_damaged_files(copied, refused, damage, name):
    damage(copied / name)
    assert str(copied / name) in refused(copied)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model(copied, refused, damage):
    found = [file for file in (copied / "model").rglob("*") if file.is_file()]
    DAMAGES[damage](max(found, key=lambda file: file.stat().st_size))
    assert "model: damaged" in refused(copied)


def test_a_lost_model(copied, refused):
    shutil.rmtree(copied / "model")
    assert "holds no model" in refused(copied)


@pytest.mark.parametrize("version", [1, SCHEMA_VERSION + 1])
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_another_schema_version(copied, refused, name, version):
    alter(copied, name, schema_version=version)
    assert f"{name}: schema_version={version}: " in refused(copied)


def test_other_code_is_named_by_its_keys(copied, refused):
    """Keys with other values, and such as only one of the two has."""
    document = read_json(copied / "config.json")
    identity = document["identity"]
    identity["step"]["optimizer"]["b1"] = 0.5
    identity["step"]["optimizer"]["old"] = True
    del identity["rollbacks"]
    alter(copied, "config.json", identity=identity, run_id="another")
    error = refused(copied)
    assert "other code" in error and "step.optimizer.b1=0.5, now 0.9" in error
    assert "step.optimizer.old=True, now absent" in error
    assert "rollbacks=absent, now 2" in error


def test_another_corpus_is_named_by_both_digests(copied, refused, tiny_corpus):
    document = read_json(copied / "config.json")
    new = document["identity"]["data"]["sha256"]
    document["identity"]["data"]["sha256"] = old = "0" * 64
    alter(copied, "config.json", identity=document["identity"], run_id="another")
    assert f"data.sha256='{old}', now '{new}'" in refused(copied)


def test_a_corpus_that_has_gone_is_named_by_its_digest(copied, refused, tmp_path):
    document = read_json(copied / "config.json")
    document["config"]["data"]["source"] = str(tmp_path / "gone")
    alter(copied, "config.json", config=document["config"])
    error = refused(copied)
    assert f"sha256 {document['identity']['data']['sha256']}" in error and "gone" in error


def test_nothing_is_written_within_the_original(copied, capsys):
    before = files(copied)
    for workdir in (copied, copied / "model" / ".."):
        assert main(["run", f"--reproduce={copied}", f"--workdir={workdir}"]) == REFUSED
        assert "workdir=" in capsys.readouterr().err
    assert files(copied) == before


# Differences


@pytest.mark.parametrize(
    "old, new, found",
    [
        ({"a": 1, "b": [1, {"c": 2}]}, {"b": [1, {"c": 3}], "a": 1}, [("b.1.c", 2, 3)]),
        ({"a": 0.0}, {"a": -0.0}, [("a", 0.0, -0.0)]),
        ({"a": 1}, {"a": 1.0}, [("a", 1, 1.0)]),
        ({"a": 1}, {"a": True}, [("a", 1, True)]),
        ({"a": None}, {}, [("a", None, ABSENT)]),
        ({}, {"a": None}, [("a", ABSENT, None)]),
        ({"a": []}, {"a": {}}, [("a", [], {})]),
        ([1, 2], [1], [("1", 2, ABSENT)]),
        (0.1 + 0.2, 0.3, [("", 0.1 + 0.2, 0.3)]),
        ({"a": [None, "x"]}, {"a": (None, "x")}, []),
    ],
)
def test_differences(old, new, found):
    assert repr(list(differences(old, new))) == repr(found)


def test_differences_in_words():
    found = [("a", 1, 2), ("b", "x", ABSENT), ("c", 3, 4), ("d", 5, 6)]
    assert described(iter(found), most=2) == "a=1, now 2; b='x', now absent; 2 more"
    assert described(iter(found[:1]), most=2) == "a=1, now 2" and described(iter([]), 2) == ""
