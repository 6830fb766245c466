"""From config and sweep to runs, all checked and nothing written."""

import json
from pathlib import Path

import pytest
from run_files import endpoint_rows, write_summary

from bitnet_jax.errors import ConfigError
from experiments import display
from experiments.plan import first_line, load_config, load_points, make_plan
from sweeps.grid import axis, product


@pytest.fixture
def plan_of(tiny_config, tiny_corpus, tmp_path):
    def make(points, overrides=None, overridden=()):
        return make_plan(tiny_config(overrides), points, tiny_corpus, tmp_path / "w", overridden)

    return make


def test_points_become_runs(plan_of, tmp_path):
    points = product(axis("precision", ["ternary", "fp16"]), axis("seed", [0, 3]))
    plan = plan_of(points)
    assert (plan.name, plan.directory) == ("tiny", tmp_path / "w" / "tiny")
    found = [(run.spec.step.precision.name, run.spec.seed_init) for run in plan.runs]
    assert found == [("ternary", 0), ("ternary", 3), ("fp16", 0), ("fp16", 3)]
    for run in plan.runs:
        assert run.directory == plan.directory / "runs" / run.spec.run_id
        assert run.config.precision == run.spec.step.precision.name
        assert run.config.seed == run.spec.seed_init, "a point does not leak into the next"
    assert not (tmp_path / "w").exists()


def test_points_may_set_tuples_and_placeholders(plan_of):
    plan = plan_of([{"train.tokens": (1280, 2560, 3840), "model.layers": 2, "optim.peak_lr": 1.0}])
    spec = plan.runs[0].spec
    assert spec.ends == (10, 20, 30) and spec.step.model.layers == 2 and spec.peak_lr == 1.0


def test_states(plan_of):
    """A run is new until it has left its config, and done once it has left its summary whole."""
    (run,) = plan_of([{}]).runs
    assert (run.state, run.started, run.finished) == ("new", False, False)
    run.directory.mkdir(parents=True)
    assert run.state == "new"
    (run.directory / "config.json").write_text("{}")
    assert run.state == "resume"
    for damaged in ("", "{}", "{", "[]"):
        (run.directory / "summary.json").write_text(damaged)
        assert (run.state, run.finished) == ("damaged", False)
    write_summary(run.directory, run.spec)
    assert (run.state, run.finished) == ("done", True)
    write_summary(run.directory, run.spec, endpoints=[])
    assert run.state == "damaged", "whole, and no summary"
    (run.directory / "summary.json").write_text(
        json.dumps({"schema_version": 1, "endpoints": endpoint_rows(run.spec)})
    )
    assert run.state == "done", "from before there were digests"


def test_a_summary_of_another_run_is_refused(plan_of):
    one, two = plan_of([{}, {"seed": 1}]).runs
    write_summary(one.directory, two.spec)
    with pytest.raises(ConfigError) as caught:
        plan_of([{}, {"seed": 1}])
    message = str(caught.value)
    assert str(one.directory / "summary.json") in message and "\n" not in message
    assert f"it is the summary of {two.spec.run_id}" in message
    mixed = [*endpoint_rows(one.spec), *endpoint_rows(two.spec)]
    write_summary(one.directory, one.spec, endpoints=mixed)
    with pytest.raises(ConfigError, match="it is the summary of"):
        plan_of([{}])


def test_a_summary_of_a_newer_version_is_refused(plan_of):
    """Not trained over: whoever wrote it knows how to read it."""
    (run,) = plan_of([{}]).runs
    write_summary(run.directory, run.spec, schema_version=99)
    with pytest.raises(ConfigError, match=r"summary.json: schema_version=99: .* reads up to"):
        plan_of([{}])


@pytest.mark.parametrize("part", ["", "checkpoints", "model", "metrics.jsonl", "wandb"])
def test_links_out_of_the_sweep_are_refused(plan_of, tmp_path, part):
    (run,) = plan_of([{}]).runs
    link, out = run.directory / part, tmp_path / "out"
    out.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(out)
    with pytest.raises(ConfigError) as caught:
        plan_of([{}])
    assert str(caught.value).startswith(f"{link}: ") and "leads out of" in str(caught.value)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("points", "key", "right"),
    [
        ([], "sweep='tiny'", "no points"),
        ([{"seed": 1}, {"seed": 1}], "sweep='tiny'", "occurs twice"),
        ([{"seed": 0}, {"log.every": 3}], "sweep='tiny'", "occurs twice"),
        ([{"seed": 1, "optim.peak_lr": 1.0}], "optim.peak_lr=0.01", "change the axis"),
        ([{"optim.rate": 1.0}], "optim.rate=1.0", "unknown key"),
        ([{"rate": 1.0}], "rate=1.0", "unknown key"),
        ([{"optm.b1": 1.0}], "optm.b1=1.0", "unknown key"),
        ([{"model.layers": "two"}], "model.layers='two'", "int"),
        ([{"precision": "fp17"}], "precision='fp17'", "choose from"),
        ([{}, {"model.width": 15}], "model.width=15", "divide by"),
        ([{"log.every": 0}], "log.every=0", "at least 1"),
    ],
    ids=str,
)
def test_mistakes(plan_of, tmp_path, points, key, right):
    with pytest.raises(ConfigError) as error:
        plan_of(points, overridden=["optim.peak_lr"])
    message = str(error.value)
    assert message.startswith(key) and right in message and "\n" not in message
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "/tmp", ".hidden"])
def test_name_stays_within_the_workdir(plan_of, name):
    with pytest.raises(ConfigError, match="plain folder name") as error:
        plan_of([{}], {"name": name})
    assert str(error.value).startswith(f"name={name!r}")


def test_a_key_set_by_the_command_line_alone_is_kept(plan_of):
    points = axis("precision", ["ternary", "fp16"])
    plan = plan_of(points, {"optim.peak_lr": 0.5}, overridden=["optim.peak_lr"])
    assert [run.spec.peak_lr for run in plan.runs] == [0.5, 0.5]


def test_load_config(tmp_path):
    file = tmp_path / "mine.py"
    text = "from ml_collections import ConfigDict\n"
    file.write_text(text + "def get_config(arg='none'):\n    return ConfigDict({'arg': arg})\n")
    assert load_config(str(file)).arg == "none"
    assert load_config(f"{file}:size=3").arg == "size=3"
    with pytest.raises(ConfigError, match="declares no sweep"):
        load_points(str(file), None)
    file.write_text("def sweep(config):\n    return [config]\n")
    assert load_points(str(file), 7) == [7]
    with pytest.raises(ConfigError, match=r"no get_config\(\)"):
        load_config(str(file))


@pytest.mark.parametrize("name", ["missing.py", ".", "notes.txt", ""])
def test_load_config_of_no_config_file(tmp_path, name):
    (tmp_path / "notes.txt").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(str(tmp_path / name))


def test_first_line():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(KeyError("key")) == "key"
    assert first_line(RuntimeError("\n  inner\nmore")) == "inner"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = (\n", "SyntaxError"),
        ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        ("def get_config():\n    return None\n", "must return a ConfigDict"),
    ],
)
def test_a_config_file_that_fails_is_named_in_one_line(tmp_path, text, expected):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=expected) as error:
        load_config(str(file))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_points_of_a_config_file_with_an_argument():
    """As in `--sweep --config=sweeps/isoflop.py:size=800k`: the argument is get_config's alone."""
    path = str(Path(__file__).parents[1] / "sweeps" / "isoflop.py") + ":size=800k"
    config = load_config(path)
    assert {point["model.size"] for point in load_points(path, config)} == set(config.sweep.sizes)
    assert "800k" in config.sweep.sizes


def test_the_plan_tells_what_branches_save(plan_of, capsys):
    """Only where some run has several endpoints; tiny runs of 44 and 40 steps for 60 and 40."""
    one, two = {"train.tokens": (5120,), "seed": 1}, {"seed": 2}

    def shown(*points):
        display.show_plan(display.console(), plan_of(list(points)), 1e9, "a guess")
        lines = capsys.readouterr().out.splitlines()
        found = [line for line in lines if line.startswith("branches share")]
        return [line for line in lines if line.startswith("total")], found

    total, branches = shown(one)
    assert branches == [] and total[0].startswith("total 212M FLOPs, still to do 212M: ")
    _, branches = shown(two)
    right = "0.73 of the 319M FLOPs that a run for each endpoint would cost"
    assert branches == [f"branches share their trunks: {right}"]
    total, (branches,) = shown(one, two)
    assert total[0].startswith("total 446M FLOPs, still to do 446M: ")
    assert "0.84 of the 531M FLOPs" in branches
    (run,) = plan_of([one]).runs
    write_summary(run.directory, run.spec)
    total, (again,) = shown(one, two)
    assert "still to do 234M: " in total[0] and again == branches, "of the whole plan, done or not"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(17, "File exists", "x"), "[Errno 17] File exists: 'x'"),
        (KeyError("absent"), "absent"),
        (ValueError("one\ntwo"), "one"),
        (ValueError(), "ValueError"),
    ],
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line
