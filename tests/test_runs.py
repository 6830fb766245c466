"""A finished run, read back: the config's round trip, the parameters, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from run_files import DAMAGES, cut, emptied, flipped, lost

from bitnet_jax.checkpoint import load_model, save_model
from bitnet_jax.configs import default
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.data import DataError, validation_rows
from bitnet_jax.errors import ConfigError
from bitnet_jax.evaluate import held_out_loss
from bitnet_jax.files import SCHEMA_VERSION, read_json, write_json
from bitnet_jax.train import train_and_evaluate
from bitnet_jax.train_step import compiled_init
from experiments.runs import config_of, load_run


@pytest.fixture(scope="module")
def config(tiny_config):
    """With all that JSON could change: tuples, keys without a value, tags."""
    return tiny_config({"tags.base": "full", "tags.change": "sub-norms", "seeds.data": 3})


@pytest.fixture(scope="module")
def directory(config, tiny_corpus, tmp_path_factory):
    """A trained run."""
    path = tmp_path_factory.mktemp("run")
    spec = resolve(config, tiny_corpus)
    train_and_evaluate(spec, tiny_corpus, path, loop_options(config), config.to_dict())
    return path


@pytest.fixture
def copied(directory, tmp_path):
    """A function that copies the run with a changed config.json, the model left out or not."""

    def make(change=lambda document: document, model=False):
        write_json(tmp_path / "config.json", change(read_json(directory / "config.json")))
        if model:
            shutil.copytree(directory / "model", tmp_path / "model")
            for name in ("summary.json", "metrics.jsonl"):
                shutil.copy(directory / name, tmp_path)
        return tmp_path

    return make


def changed(key, value):
    """A change of config.json: one key of its config."""

    def change(document):
        *groups, last = key.split(".")
        section = document["config"]
        for group in groups:
            section = section[group]
        section[last] = value
        return document

    return change


def refusal(path):
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


# The round trip


def test_config_survives_json(config):
    back = config_of(json.loads(json.dumps(config.to_dict())))
    assert back.to_dict() == config.to_dict()
    assert back.train.tokens == (20 * 128, 40 * 128), "a tuple again"
    assert back.model.activation == "relu2" and back.quantization.weights is None
    assert back.tags.to_dict() == {"base": "full", "change": "sub-norms"}
    back.quantization.weights = "binary"  # still a placeholder of its type
    with pytest.raises(TypeError):
        back.quantization.weights = 3


def test_nothing_but_defaults():
    """Of a config that an older version wrote, with fewer keys, the rest are today's defaults."""
    assert config_of({}).to_dict() == default.get_config().to_dict()
    assert config_of({"seed": 4}).model.to_dict() == default.get_config().model.to_dict()


def test_the_run_that_was_trained(directory, config, tiny_corpus):
    run = load_run(directory)
    spec = resolve(config, tiny_corpus)
    assert run.directory == directory and run.spec == spec
    assert run.spec.run_id == json.loads((directory / "summary.json").read_text())["run_id"]
    assert (run.spec.seed_init, run.spec.seed_data) == (0, 3)
    assert run.spec.tags == (("base", "full"), ("change", "sub-norms"))
    assert run.corpus.name == tiny_corpus.name
    np.testing.assert_array_equal(run.corpus.valid, tiny_corpus.valid)


def test_the_parameters_of_the_last_endpoint(directory):
    """Not the initial ones, and those whose loss the summary has."""
    run = load_run(directory)
    initial = compiled_init(run.spec.step)(0).params
    assert jax.tree.structure(run.params) == jax.tree.structure(initial)
    saved = load_model(directory, initial)
    for new, kept, old in zip(*map(jax.tree.leaves, (run.params, saved, initial)), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new, kept)
        assert not np.array_equal(new, old)
    data = run.spec.data
    rows = validation_rows(run.corpus.valid, data.sequence_length, data.eval_tokens)
    last = json.loads((directory / "summary.json").read_text())["endpoints"][-1]
    assert held_out_loss(run.spec.deployed, run.params, rows, 8)[0] == last["loss"]


def test_tags_are_no_part_of_the_identity(copied):
    """A sweep may rename its groups without losing its runs."""
    run = load_run(copied(changed("tags", {"base": "other"}), model=True))
    assert run.spec.tags == (("base", "other"),)


# Refusals


def test_not_a_run_directory(tmp_path, directory):
    for path in (tmp_path, tmp_path / "nowhere", directory / "config.json"):
        assert "not a run directory" in refusal(path)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "3", "[]", "{}", '"config"', '{"config": []}', '{"config": "tiny"}',
        '{"config": {"model": 3}}', '{"config": {"model": null}}',
        '{"config": {"model": {"layers": "two"}}}', '{"config": {"train": {"tokens": 5}}}',
    ],
)  # fmt: skip
def test_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json: not a run's config" in refusal(tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    assert "config.json: not a run's config" in refusal(tmp_path)


def test_a_run_of_other_code(copied, directory):
    """Its id does not follow from its config any more, so neither would its loss."""
    message = refusal(copied(lambda document: {**document, "run_id": "another"}, model=True))
    own = json.loads((directory / "config.json").read_text())["run_id"]
    assert f"it describes {own}, not another" in message


@pytest.mark.parametrize("key, value", [("seed", 5), ("model.norms", "pre"), ("optim.b1", 0.8)])
def test_an_edited_config(copied, key, value):
    assert "it describes" in refusal(copied(changed(key, value), model=True))


def test_no_id(copied):
    def without(document):
        del document["run_id"]
        return document

    assert ", not None" in refusal(copied(without, model=True))


def test_a_run_without_a_model(copied):
    message = refusal(copied())
    assert "holds no model" in message and "checkpoint.keep_model=True" in message


def test_a_corpus_that_has_gone(copied, tmp_path):
    with pytest.raises(DataError, match="prepare"):
        load_run(copied(changed("data.source", str(tmp_path / "gone")), model=True))


# Damage


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model(copied, damage):
    """The file that holds the parameters; nothing but their fingerprint sees a flipped bit."""
    path = copied(model=True)
    files = [file for file in (path / "model").rglob("*") if file.is_file()]
    DAMAGES[damage](max(files, key=lambda file: file.stat().st_size))
    assert "model: damaged" in refusal(path) and "train it again" in refusal(path)


def test_a_model_of_another_run(copied):
    path = copied(model=True)
    params = load_run(path).params
    save_model(path, jax.tree.map(lambda x: x + 1, params))
    assert "model: damaged, not what summary.json was written with" in refusal(path)
    save_model(path, params)
    assert load_run(path).directory == path


@pytest.mark.parametrize("damage", [cut, emptied, flipped])
@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl"])
def test_a_damaged_file(copied, damage, name):
    path = copied(model=True)
    damage(path / name)
    assert str(path / name) in refusal(path)


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_a_lost_file(copied, name):
    path = copied(model=True)
    lost(path / name)
    assert name in refusal(path)


def test_a_summary_of_another_run(copied):
    path = copied(model=True)
    write_json(path / "summary.json", {**read_json(path / "summary.json"), "run_id": "another"})
    assert "it is the summary of another" in refusal(path)


def test_a_run_from_before_there_were_digests(copied):
    """Neither of its files has one, and its summary knows of no fingerprint."""
    path = copied(model=True)
    for name in ("config.json", "summary.json"):
        document = {**read_json(path / name), "schema_version": 1}
        for key in ("metrics", "model"):
            document.pop(key, None)
        (path / name).write_text(json.dumps(document))
    assert load_run(path).spec.run_id == read_json(path / "summary.json")["run_id"]


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_file_of_a_newer_version(copied, name):
    path = copied(model=True)
    newer = {**read_json(path / name), "schema_version": SCHEMA_VERSION + 1}
    write_json(path / name, newer)
    assert f"{name}: schema_version={SCHEMA_VERSION + 1}: " in refusal(path)
