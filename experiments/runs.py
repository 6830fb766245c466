"""A finished run, read back from its directory: what it was and the parameters it ended with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bitnet_jax import data
from bitnet_jax.checkpoint import load_model
from bitnet_jax.configs import default
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.data import Corpus
from bitnet_jax.errors import ConfigError
from bitnet_jax.spec import RunSpec
from bitnet_jax.train_step import init_state


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """params: of the last endpoint."""

    directory: Path
    spec: RunSpec
    corpus: Corpus
    params: dict


def load_run(directory: Path) -> FinishedRun:
    """Read a run directory.

    Raises:
      ConfigError: not a run directory, one of other code, or one that holds no model.
    """
    path = directory / "config.json"
    try:
        document = json.loads(path.read_text())
        config = config_of(document["config"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"run={str(directory)!r}: not a run directory, no config.json") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a run's config: {error}") from error
    corpus = data.load(data.resolve(config.data.source))
    spec = resolve(config, corpus)
    if spec.run_id != document.get("run_id"):
        raise ConfigError(
            f"{path}: it describes {spec.run_id}, not {document.get('run_id')}: the run was made "
            "by other code, or of another corpus"
        )
    state = jax.eval_shape(lambda: init_state(spec.step, 0))
    try:
        params = load_model(directory, state.params)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # orbax and its readers raise many kinds
        raise ConfigError(
            f"{directory / 'model'}: damaged; delete the run's summary.json and train it again"
        ) from error
    return FinishedRun(directory, spec, corpus, params)


def config_of(values: dict[str, Any]) -> ConfigDict:
    """The config that config.json holds; JSON's lists are the config's tuples."""
    config = default.get_config()
    config.update(_tuples(values))
    return config


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
