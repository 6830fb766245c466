"""Suite `startup`: how long a run of the smallest model waits until its first step is done.

For the second and later runs of a shape and arm in one process, as in a sweep; and for a process of
its own, with a persistent compilation cache that is empty, then with what that has left in it.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from bitnet_jax import ladder
from bitnet_jax.configs import default
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.data import load, prepare
from bitnet_jax.train import train_and_evaluate
from experiments.benchmark.compilation import no_compilation_cache
from experiments.benchmark.result import Result
from experiments.benchmark.step import Say
from experiments.benchmark.timing import spread
from experiments.benchmark.workload import Workload
from experiments.command_line import ROOT

SEEDS = (0, 1, 2)
STEPS = 5
IMPORTS = 3  # processes that only import; the first may find cold disks
GOAL_SECONDS = 1.0
SECOND_RUN = "startup/second_run_seconds"


class Waited(NamedTuple):
    """Seconds from the start until the first step was done, and until all was."""

    first_step: float
    end: float


def run(workload: Workload, say: Say) -> Result:
    """Runs here, then processes of their own."""
    result = Result(notes=[f"{SECOND_RUN}: not a ratio, but seconds until the first step is done"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = overrides(workload, corpus_of_words(folder))
        for seed in SEEDS:
            say(f"seed {seed}, in this process")
            waited = _run_here(keys | {"seed": seed}, folder / str(seed))
            _add(result, f"run {seed + 1} of a process", waited)
        later = [row["first_step_seconds"] for row in result.measurements[1:]]
        result.ratios[SECOND_RUN] = spread(later, GOAL_SECONDS)
        if jax.default_backend() == "tpu":
            result.notes.append("new processes: not measured, since this one holds the TPU")
        else:
            _add_processes(result, keys, folder, say)
    return result


def _add(result: Result, case: str, waited: Waited) -> None:
    row = {"case": case, "first_step_seconds": waited.first_step, "end_seconds": waited.end}
    result.measurements.append({"suite": "startup", **row})


def _add_processes(result: Result, keys: dict[str, Any], folder: Path, say: Say) -> None:
    for count in range(IMPORTS):
        say("importing, in a new process")
        seconds = _import()
        row = {"case": f"import {count + 1}", "first_step_seconds": None, "end_seconds": seconds}
        result.measurements.append({"suite": "startup", **row})
    waited = {}
    for cache in ("empty", "warm"):
        say(f"a new process, {cache} compilation cache")
        workdir = folder / cache
        waited[cache] = run_process(_command(keys, workdir), workdir, folder / "cache")
        _add(result, f"new process, {cache} cache", waited[cache])
    share = waited["warm"].first_step / waited["empty"].first_step
    result.ratios["startup_time/warm_cache/empty_cache"] = spread([share])


def corpus_of_words(folder: Path) -> Path:
    """Words at random, prepared."""
    generator = random.Random(0)
    for split in ("train", "valid"):
        words = generator.choices(("a", "cat", "sees", "the", "old", "tree"), k=20_000)
        (folder / f"{split}.txt").write_text(" ".join(words))
    out = folder / "corpus"
    train, valid = str(folder / "train.txt"), str(folder / "valid.txt")
    prepare([train], "bytes", out, valid_sources=[valid])
    return out


def overrides(workload: Workload, corpus: Path) -> dict[str, Any]:
    """Keys of a run of a handful of steps, each of which reports; all else as runs have it."""
    name, _, carrier = workload.arms[0].partition(":")
    config = default.get_config()
    return {
        "model.size": next(iter(ladder.LADDER)),
        "precision": name,
        "matmul.carrier": carrier or config.matmul.carrier,
        "data.source": str(corpus),
        "train.tokens": (STEPS * config.train.batch_tokens,),
        "eval.tokens": 16 * config.data.sequence_length,
        "log.every": 1,
        "tracking.wandb": "disabled",
    }


def _run_here(keys: dict[str, Any], directory: Path) -> Waited:
    """All that one run of a sweep does, from the call to its return."""
    config: ConfigDict = default.get_config()
    config.update_from_flattened_dict(keys)
    corpus = load(Path(config.data.source))
    spec, options = resolve(config, corpus), loop_options(config)
    first: list[float] = []
    began = time.perf_counter()
    with no_compilation_cache():
        train_and_evaluate(
            spec,
            corpus,
            directory,
            options,
            config.to_dict(),
            watch=lambda report: first.append(time.perf_counter() - began),
        )
    return Waited(first[0], time.perf_counter() - began)


def _import() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import experiments.run"], cwd=ROOT, check=True)
    return time.perf_counter() - began


def _command(keys: dict[str, Any], workdir: Path) -> list[str]:
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return [sys.executable, "-m", "experiments.run", f"--workdir={workdir}", *flags]


def run_process(command: list[str], workdir: Path, cache: Path) -> Waited:
    """A command that trains, until the log in its workdir has a line of a step, and until it ends.

    cache: where the process keeps what it compiles, and looks for it.

    Raises:
      RuntimeError: it failed; with what it printed.
    """
    # On a GPU this process may hold three quarters of the memory; the other needs little.
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    with open(workdir.with_suffix(".log"), "w+") as printed:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | variables, stdout=printed, stderr=printed
        )
        try:
            while process.poll() is None and not _has_stepped(workdir):
                time.sleep(0.005)
            first = time.perf_counter() - began
            process.wait()
        finally:
            process.kill()  # where waiting for it was interrupted
        end = time.perf_counter() - began
        printed.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{printed.read()}")
    return Waited(first, end)


def _has_stepped(workdir: Path) -> bool:
    return any(path.stat().st_size for path in workdir.glob("*/runs/*/metrics.jsonl"))
