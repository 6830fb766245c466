"""Suite `workers`: how long a worker takes to its first step where its programs are kept, at the
smallest size; and a launch of a sweep whose hundred runs are finished, report included.

The first of both is not counted: it compiles, or makes the report. Beside the seconds stand those
of CPU time that the process took, since other work on the machine moves them less.
"""

import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitnet_jax import data
from bitnet_jax.files import SCHEMA_VERSION, write_json
from bitnet_jax.results import endpoint_row
from experiments.benchmark.result import Result
from experiments.benchmark.startup import Waited, corpus_of_words, overrides, run_process
from experiments.benchmark.step import Say
from experiments.benchmark.timing import spread
from experiments.benchmark.workload import Workload
from experiments.plan import PlannedRun, load_config, load_points, make_plan

REPEATS = 3
FIRST_STEP, FINISHED = "workers/first_step_seconds", "workers/finished_sweep_seconds"
GOALS = {FIRST_STEP: 6.0, FINISHED: 5.0}
SEEDS = 10

SWEEP = """from bitnet_jax.configs import default
from sweeps.grid import axis, product


def get_config(arg=None):
    c = default.get_config()
    c.name = "measured"
    c.update_from_flattened_dict({keys!r})
    return c


def sweep(c):
    return product(*(axis(key, values) for key, values in {axes!r}.items()))
"""


def run(workload: Workload, say: Say) -> Result:
    """Processes of their own, one after the other."""
    result = Result(notes=[f"{', '.join(GOALS)}: not ratios, but seconds"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = overrides(workload, corpus_of_words(folder))
        steps = _sweep(folder / "one.py", keys, {"seed": (0,)})
        sizes = ("27k", "56k", "95k", "160k", "330k")
        axes = {"model.size": sizes, "precision": ("ternary", "fp16"), "seed": tuple(range(SEEDS))}
        plain = {key: keys[key] for key in ("data.source", "eval.tokens", "tracking.wandb")}
        budgets = {"train.tokens": (400_000, 800_000, 1_600_000)}
        finished = _sweep(folder / "many.py", plain | budgets, axes)
        _finish(finished, folder / "finished")

        def first_step(turn: int) -> Waited:
            workdir = folder / f"worker-{turn}"
            command = [*_command(steps, workdir), "--worker"]
            return run_process(command, workdir, folder / "cache")

        def again(turn: int) -> Waited:
            workdir = folder / "finished"
            waited = run_process(_command(finished, workdir), workdir, folder / "cache")
            return Waited(waited.end, waited.end)

        for name, case in ((FIRST_STEP, first_step), (FINISHED, again)):
            _measure(result, name, case, say)
    return result


def _measure(result: Result, name: str, case: Callable[[int], Waited], say: Say) -> None:
    seconds = []
    for turn in range(REPEATS + 1):
        say(f"{name}, process {turn + 1} of {REPEATS + 1}")
        before = _cpu()
        waited = case(turn)
        label = f"{name.partition('/')[2].removesuffix('_seconds')}, process {turn + 1}"
        row: dict[str, Any] = {"suite": "workers", "case": label, "cpu_seconds": _cpu() - before}
        row |= {"first_step_seconds": waited.first_step, "end_seconds": waited.end}
        result.measurements.append(row)
        seconds += [waited.first_step] if turn else []
    result.ratios[name] = spread(seconds, GOALS[name])


def _cpu() -> float:
    """Seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _sweep(path: Path, keys: dict[str, Any], axes: dict[str, tuple]) -> Path:
    keys = {key: value for key, value in keys.items() if key not in axes}
    path.write_text(SWEEP.format(keys=keys, axes=axes))
    return path


def _command(sweep: Path, workdir: Path) -> list[str]:
    flags = ["--sweep", f"--config={sweep}", f"--workdir={workdir}"]
    return [sys.executable, "-m", "experiments.run", *flags]


def _finish(sweep: Path, workdir: Path) -> None:
    """What runs leave that somebody has trained, with losses by a law."""
    config = load_config(str(sweep))
    corpus = data.load(Path(config.data.source))
    for planned in make_plan(config, load_points(str(sweep), config), corpus, workdir).runs:
        planned.directory.mkdir(parents=True)
        write_json(planned.directory / "summary.json", _summary(planned))


def _summary(run: PlannedRun) -> dict[str, Any]:
    origin = {"device": "none", "jax_version": "none", "git_commit": "none"}
    rows = []
    for end in run.spec.ends:
        row = endpoint_row(run.spec, {"end": end, **_results()}, origin)
        n, d = row["params_non_embedding"], row["tokens"]
        wobble = 0.004 * ((row["seed"] * 7 + end) % 5 - 2)
        loss = 1.2 + 8 * n**-0.25 + 90 * d**-0.4 + 0.05 * (row["precision"] == "ternary") + wobble
        rows.append({**row, "loss": loss, "train_loss": loss, "bits_per_byte": loss / 0.693})
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run.spec.run_id,
        "status": "ok",
        "wall_s": 1.0,
        "total_flops": float(run.spec.total_flops),
        "endpoints": rows,
    }


def _results() -> dict[str, Any]:
    more = {"unique_tokens": 1, "status": "ok", "wall_s": 1.0, "loss_stderr": 0.01}
    return dict.fromkeys(("loss", "train_loss", "bits_per_byte")) | more
