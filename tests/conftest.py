"""Settings that every test runs under."""

import os
import random
from pathlib import Path

os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

from bitnet_jax.configs import default  # noqa: E402
from bitnet_jax.data import load, prepare  # noqa: E402

# Silent broadcasting of ranks hides shape mistakes.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling takes most of the time. Workers side by side, and later runs, share what is compiled.
PROGRAMS = Path(__file__).parent.parent / ".pytest_cache" / "programs"
jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# A corpus and a run that train within a second, for the tests of whole runs. Every test that keeps
# the model, arm and optimizer of `tiny_config` shares one compiled program with the others.

TINY = {
    "name": "tiny",
    "precision": "fp32",
    "model.size": "27k",
    "model.layers": 1,
    "model.width": 16,
    "model.ff_width": 32,
    "model.heads": 2,
    "model.kv_heads": 1,
    "data.sequence_length": 16,
    "train.tokens": (20 * 128, 40 * 128),  # 20 and 40 steps; decays from 16 and from 32
    "train.batch_tokens": 128,
    "optim.peak_lr": 0.01,
    "eval.tokens": 29 * 16,  # 29 rows: not a whole number of batches of 8
    "log.every": 7,  # does not divide the lengths of the segments
    "tracking.wandb": "disabled",
}


# Files of few, long tests begin first, so that none is left for the end, when other workers idle.
LONG = ("test_torture.py", "test_slurm.py", "test_mesh.py", "test_hosts.py")


def pytest_collection_modifyitems(items):
    """The rest stays in its order."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Compiled programs are dropped between files once they fill gigabytes; the disk keeps them."""
    yield
    pages = Path("/proc/self/statm")
    if pages.exists() and int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") > 2 * 2**30:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_corpus_path(tmp_path_factory):
    """20k bytes of generated English-like text, prepared."""
    folder = tmp_path_factory.mktemp("tiny")
    generator = random.Random(0)
    words = ["the", "a", "old", "grey", "cat", "dog", "tree", "house", "sees", "likes", "near"]
    for split, lines in (("train", 500), ("valid", 60)):
        text = "".join(" ".join(generator.choices(words, k=10)) + ".\n" for _ in range(lines))
        (folder / f"{split}.txt").write_text(text)
    out = folder / "corpus"
    prepare([str(folder / "train.txt")], "bytes", out, valid_sources=[str(folder / "valid.txt")])
    return out


@pytest.fixture(scope="session")
def tiny_corpus(tiny_corpus_path):
    return load(tiny_corpus_path)


@pytest.fixture(scope="session")
def tiny_overrides(tiny_corpus_path):
    """Config keys and values of the tiny run."""
    return {**TINY, "data.source": str(tiny_corpus_path)}


@pytest.fixture(scope="session")
def tiny_config(tiny_overrides):
    """A function that gives the tiny run's config, with further overrides by dotted key."""

    def make(overrides=None):
        config = default.get_config()
        config.update_from_flattened_dict({**tiny_overrides, **(overrides or {})})
        return config

    return make
