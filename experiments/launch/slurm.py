"""Workers as an array of Slurm jobs: the batch script, and what is asked of the cluster.

Slurm allocates, kills and requeues; what is done and what is left stands in the sweep's folder
alone, so that jobs may be lost, added and cancelled at any time. Jobs are known by their name,
which holds a digest of the folder's path.
"""

import dataclasses
import hashlib
import math
import re
import shlex
from pathlib import Path

from ml_collections import ConfigDict

from bitnet_jax.configs.resolve import failures_allowed
from bitnet_jax.errors import require
from experiments.launch.commands import ask, check_there

COMMANDS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue")
MOST = {"workers": 100_000, "minutes": 525_600, "nodes": 10_000, "processes": 100_000, "gpus": 64,
        "cpus": 4096}  # fmt: skip
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
         "PREEMPTED", "TIMEOUT"}  # fmt: skip

_WORD = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
_PATH = re.compile(r"[A-Za-z0-9_./+=@:-]+")

SCRIPT = """#!/bin/bash
{directives}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@30

# A worker of the sweep in {directory}.
# Where it is stopped or preempted it saves, ends with status 143, and is requeued. So it is where
# it was killed (137) or has crashed (134, 139), until that has happened {failures} times while
# nothing was written of any run. Of what is done and what is left the sweep's folder knows.

# Not SLURM_JOB_ID: of one job of an array that is the id of the whole array, too.
job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
crashes={directory}/slurm/$job.crashes

requeue() {{ # unless Slurm has ended the job, as it has where it was cancelled
    if [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
        scontrol requeue "$job"
    fi
}}

crashed() {{
    if [ -n "$(find {directory}/runs -newer "$crashes" -print -quit 2> /dev/null)" ]; then
        : > "$crashes"
    fi
    echo "$(date) status $status" >> "$crashes"
    if [ "$(wc -l < "$crashes")" -lt {failures} ]; then
        requeue
    fi
}}

cd {here} || exit 2
[ -e "$crashes" ] || : > "$crashes"
export PYTHONUNBUFFERED=1
srun --kill-on-bad-exit=1{srun} \\
    {command}
status=$?
case $status in
    143) requeue ;;
    134 | 137 | 139) crashed ;;
    *) rm -f "$crashes" ;;
esac
exit $status
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """The config's section `slurm`, checked. failures: without anything written; see SCRIPT."""

    workers: int
    minutes: int
    partition: str | None
    account: str | None
    processes: int
    nodes: int
    gpus: int
    cpus: int | None
    memory: str | None
    mixed_code: bool
    failures: int


@dataclasses.dataclass(frozen=True)
class SlurmJob:
    """As squeue shows it. job: the id of an array's job, as 12_3. array: 12."""

    job: str
    array: str
    state: str
    time: str
    node: str
    reason: str

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def options(config: ConfigDict) -> Options:
    """The section of a config.

    Raises:
      ConfigError: a value that cannot work.
    """
    section = config.slurm
    for key, most in MOST.items():
        value, least = section[key], 0 if key == "gpus" else 1
        fits = value is None or least <= value <= most
        require(fits, f"slurm.{key}", value, f"it must lie in [{least}, {most}]")
    for key, pattern, right in (
        ("partition", f"{_WORD}(,{_WORD})*", "it must be a partition's name, or several by commas"),
        ("account", _WORD, "it must be an account's name: letters, digits and _ . + -"),
        ("memory", "[1-9][0-9]{0,8}[KMGT]?", "a number and K, M, G or T, such as 16G"),
    ):
        value = section[key]
        fits = value is None or re.fullmatch(pattern, value, re.ASCII) is not None
        require(fits, f"slurm.{key}", value, right)
    devices = config.mesh.data * config.mesh.tensor
    right = (
        f"it must divide the {devices} devices of mesh.data * mesh.tensor, which a run is cut over"
    )
    require(devices % section.processes == 0, "slurm.processes", section.processes, right)
    spread = f"it must be at most slurm.processes={section.processes}"
    require(section.nodes <= section.processes, "slurm.nodes", section.nodes, spread)
    return Options(**section.to_dict(), failures=failures_allowed(config))


def check_directory(directory: Path) -> None:
    """Refuse a sweep's folder, an absolute path, that Slurm or a shell would read otherwise.

    Raises:
      ConfigError: names the path.
    """
    right = "Slurm's logs go there: give --workdir and config.name of letters, digits and . _ + = @"
    require(_PATH.fullmatch(str(directory)) is not None, "directory", str(directory), right)


def check_cluster(wanted: Options) -> None:
    """Whether there is a Slurm, and it has these partitions.

    Raises:
      ConfigError: there is none, or it has not.
    """
    right = "--launcher=slurm needs the commands of Slurm; give it where jobs are submitted"
    check_there(COMMANDS, right)
    limits = dict(line.split("|") for line in
                  ask("sinfo", "--noheader", "--format=%P|%l").splitlines())  # fmt: skip
    chosen = [name.rstrip("*") for name in limits if name.endswith("*")]  # the default's mark
    limits = {name.rstrip("*"): limit for name, limit in limits.items()}
    if wanted.partition:
        chosen = wanted.partition.split(",")
    for name in chosen:
        right = f"unknown to this cluster; choose from {', '.join(sorted(limits)) or 'none'}"
        require(name in limits, "slurm.partition", name, right)
    most = max((_minutes(limits[name]) for name in chosen), default=math.inf)
    right = f"partition {', '.join(chosen)} allows {most:.0f}; jobs go on where they were cut short"
    require(wanted.minutes <= most, "slurm.minutes", wanted.minutes, right)


def _minutes(limit: str) -> float:
    """Of sinfo's [days-][[hours:]minutes:]seconds; without bound where there is none."""
    days, _, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in [*parts, days or "0"]):
        return math.inf
    seconds = sum(int(part) * 60**power for power, part in enumerate(reversed(parts)))
    return int(days or 0) * 1440 + seconds / 60


def job_name(directory: Path) -> str:
    """Of all jobs of the sweep in this folder, and of no other's. directory: absolute."""
    return f"bitnet_jax.{directory.name}.{hashlib.sha256(str(directory).encode()).hexdigest()[:8]}"


def script(wanted: Options, directory: Path, here: Path, command: list[str]) -> str:
    """The batch script of an array of workers. here: where the command is given."""
    directives = {
        "job-name": job_name(directory),
        "array": f"0-{wanted.workers - 1}",
        "output": f"{directory}/slurm/%A_%a.log",
        "time": wanted.minutes,
        "nodes": wanted.nodes,
        "ntasks": wanted.processes,
        "partition": wanted.partition,
        "account": wanted.account,
        "gpus-per-node": wanted.gpus or None,
        "cpus-per-task": wanted.cpus,
        "mem": wanted.memory,
    }
    given = {key: value for key, value in directives.items() if value is not None}
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH --{key}={value}" for key, value in given.items()),
        directory=directory,
        failures=wanted.failures,
        here=shlex.quote(str(here)),
        # Since Slurm 22.05 a step does not have it of its job.
        srun=f" --cpus-per-task={wanted.cpus}" if wanted.cpus else "",
        command=shlex.join(command),
    )


def submit(path: Path) -> str:
    """Submit a batch script; the array's id. Raises ConfigError where Slurm refuses it."""
    return ask("sbatch", "--parsable", str(path)).strip().split(";")[0]


def jobs(directory: Path) -> list[SlurmJob]:
    """The sweep's jobs that Slurm still knows of, those that have ended lately included.

    Raises:
      ConfigError: Slurm does not answer.
    """
    shown = ask("squeue", "--me", "--noheader", "--array", "--states=all",
                 f"--name={job_name(directory)}", "--format=%i|%F|%T|%M|%N|%r")  # fmt: skip
    return [SlurmJob(*line.split("|", 5)) for line in shown.splitlines()]


def cancel(found: list[SlurmJob]) -> None:
    """Raises ConfigError where Slurm refuses it."""
    arrays = sorted({job.array for job in found if not job.ended})
    if arrays:
        ask("scancel", *arrays)
