"""A finished run, read back from its directory: what it was and the parameters it ended with."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bitnet_jax import data
from bitnet_jax.checkpoint import load_model
from bitnet_jax.configs import default
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.data import Corpus
from bitnet_jax.errors import ConfigError
from bitnet_jax.export.model import TrainedModel
from bitnet_jax.files import DamagedFile, NewerFile, read_json
from bitnet_jax.fingerprint import fingerprint
from bitnet_jax.spec import RunSpec
from bitnet_jax.train_step import init_state
from experiments.differences import described, differences
from experiments.summary import verified_log

AGAIN = "delete the run's summary.json and train it again"
SHOWN_KEYS = 6  # of an identity that has changed


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """params: of the last endpoint."""

    directory: Path
    spec: RunSpec
    corpus: Corpus
    params: dict

    def trained_model(self) -> TrainedModel:
        """What leaves for other clients."""
        spec, document = self.spec, read_json(self.directory / "config.json")
        tokenizer = self.corpus.path / "tokenizer.json"
        name = self.corpus.manifest["tokenizer"]["name"]
        return TrainedModel(
            spec.step.model,
            spec.deployed.precision,
            jax.tree.map(np.asarray, self.params),
            spec.data.sequence_length,
            tokenizer if tokenizer.exists() else None,
            self.corpus.manifest["eot_token"],
            {
                "run_id": spec.run_id,
                "git_commit": str(document.get("git_commit")),
                "corpus": self.corpus.name,
                "precision": spec.deployed.precision.name,
                "tokens": str(spec.ends[-1] * spec.batch_tokens),
            },
            None if tokenizer.exists() or name == "bytes" else name,
        )


@dataclasses.dataclass(frozen=True)
class Description:
    """What a run's config.json says, resolved anew. document: all of it."""

    document: dict[str, Any]
    config: ConfigDict
    corpus: Corpus
    spec: RunSpec


def load_run(directory: Path) -> FinishedRun:
    """Read a run directory.

    Raises:
      ConfigError: not a run directory, one of other code, one that has not finished or holds no
        model, or one whose files are not what was written.
      DataError: its corpus is gone.
    """
    run = describe(directory)
    return FinishedRun(directory, run.spec, run.corpus, verified_params(directory, run.spec))


def describe(directory: Path) -> Description:
    """The run that a directory's config.json describes, finished or not.

    Raises:
      ConfigError: not a run directory, a damaged config.json, or one that no longer resolves to
        the run that it was written for.
      DataError: its corpus is gone.
    """
    path = directory / "config.json"
    document, config = _read_config(path)
    identity = document.get("identity")
    try:
        corpus = data.load(data.resolve(config.data.source))
    except data.DataError as error:
        raise data.DataError(f"{path}: {_corpus(identity)}: {error}") from error
    spec = resolve(config, corpus)
    if spec.run_id != document.get("run_id"):
        differing = described(differences(identity, spec.identity()), most=SHOWN_KEYS)
        raise ConfigError(
            f"{path}: it describes {spec.run_id}, not {document.get('run_id')}: the run was made "
            f"by other code, or of another corpus ({differing or 'of the same identity'})"
        )
    return Description(document, config, corpus, spec)


def _read_config(path: Path) -> tuple[dict[str, Any], ConfigDict]:
    try:
        document = read_json(path)
        return document, config_of(document["config"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"run={str(path.parent)!r}: not a run directory, no config.json"
        ) from error
    except NewerFile:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.reason if isinstance(error, DamagedFile) else error
        raise ConfigError(f"{path}: not a run's config: {reason}") from error


def _corpus(identity: Any) -> str:
    try:
        return f"the run's corpus, sha256 {identity['data']['sha256']}"
    except (KeyError, TypeError):
        return "the run's corpus"


def verified_summary(directory: Path, spec: RunSpec) -> dict[str, Any]:
    """The summary of a run directory, whatever the directory is called.

    Raises:
      ConfigError: none, a damaged one, another run's, or not of the log beside it.
    """
    try:
        summary = read_json(directory / "summary.json")
        verified_log(directory, summary)
    except FileNotFoundError as error:
        raise ConfigError(f"{directory}: no summary.json; train the run to its end") from error
    except DamagedFile as error:
        raise ConfigError(f"{error}; {AGAIN}") from error
    if summary.get("run_id") != spec.run_id:
        raise ConfigError(
            f"{directory / 'summary.json'}: it is the summary of {summary.get('run_id')}; {AGAIN}"
        )
    return summary


def verified_params(directory: Path, spec: RunSpec) -> dict:
    """The parameters in `model/`, if they and the log are what the summary was written with.

    Raises:
      ConfigError: they are not, or there are none.
    """
    state = jax.eval_shape(lambda: init_state(spec.step, 0))
    damaged = ConfigError(
        f"{directory / 'model'}: damaged, not what summary.json was written with; {AGAIN}"
    )
    try:
        params = load_model(directory, state.params)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # orbax and its readers raise many kinds
        raise damaged from error
    summary = verified_summary(directory, spec)
    if summary.get("schema_version") != 1 and summary.get("model") != fingerprint(params):
        raise damaged
    return params


def config_of(values: dict[str, Any]) -> ConfigDict:
    """The config that config.json holds; JSON's lists are the config's tuples."""
    config = default.get_config()
    config.update(_tuples(values))
    return config


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
