"""The main command with --launcher=slurm: submit workers, show how the sweep is doing, cancel.

What other launchers of jobs share is here, too: the flags of workers, the table of runs, and the
refusal of a second commit.
"""

import collections
import dataclasses
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from bitnet_jax.errors import ConfigError
from bitnet_jax.files import DamagedFile, read_json, replacing
from bitnet_jax.tracking import JOINED, git_commit
from experiments import display
from experiments.estimate import flops_per_second
from experiments.launch import slurm
from experiments.launch.failures import read_failures
from experiments.launch.leases import Leases
from experiments.plan import ABSENT, Plan, PlannedRun
from experiments.summary import read_summary

# Flags that are the submission's own; the first have a value.
_VALUED = {"launcher", "workdir", "scratch"}
_SWITCHES = {"sweep", "dry_run", "worker", "status", "cancel"}


def prepared(plan: Plan, config: ConfigDict, argv: Sequence[str]) -> tuple[slurm.Options, str]:
    """What will be asked of Slurm, and the batch script; all of it checked that can be without it.

    Raises:
      ConfigError: options or a path that cannot work.
    """
    wanted = slurm.options(config)
    directory = plan.directory.absolute()
    slurm.check_directory(directory)
    left = sum(not run.finished for run in plan.runs)
    wanted = dataclasses.replace(wanted, workers=max(1, min(wanted.workers, left)))
    command = [sys.executable, "-m", "experiments.run", "--sweep", "--worker",
               f"--workdir={directory.parent}", *worker_flags(argv)]  # fmt: skip
    if wanted.processes > 1:
        command.append("--distributed=auto")
    return wanted, slurm.script(wanted, directory, Path.cwd(), command)


def worker_flags(argv: Sequence[str], but: Collection[str] = ()) -> list[str]:
    """The flags of a submission that its workers need, too. but: flags with a value that are left
    out as well."""
    kept, after = [], False
    for argument in argv[1:]:
        name, equals, _ = argument.lstrip("-").partition("=")
        if after:
            after = False
        elif argument.startswith("-") and name in {*_VALUED, *but}:
            after = not equals
        elif not argument.startswith("-") or name not in _SWITCHES:
            kept.append(argument)
    return kept


def show_plan(screen: Console, plan: Plan, script: str) -> None:
    """What a submission would do."""
    where = str(plan.directory.absolute())
    display.show_plan(screen, plan, *flops_per_second(plan), where=where)
    screen.print(script, soft_wrap=True, markup=False, highlight=False, end="")


def submit(screen: Console, plan: Plan, wanted: slurm.Options, script: str) -> None:
    """Submit, if anything is left to train.

    Raises:
      ConfigError: Slurm refuses it.
    """
    if all(run.finished for run in plan.runs):
        screen.print(f"all {len(plan.runs)} runs are finished: nothing to submit")
        return
    directory = plan.directory.absolute()
    there = sum(not job.ended for job in slurm.jobs(directory))
    path = directory / "slurm" / "worker.sh"
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(script)
    array = slurm.submit(path)
    beside = f", beside {there} jobs that are there" if there else ""
    screen.print(f"submitted array {array}: {wanted.workers} workers{beside}")
    screen.print(f"logs: {path.parent}/{array}_*.log", soft_wrap=True)
    screen.print("how it is doing: the same command with --status; when all is done, without "
                 "--launcher: that makes the table and the report", soft_wrap=True)  # fmt: skip


def cancel(screen: Console, plan: Plan) -> None:
    """Cancel the sweep's jobs, and no others. What their workers have saved stays.

    Raises:
      ConfigError: Slurm does not answer.
    """
    found = [job for job in slurm.jobs(plan.directory.absolute()) if not job.ended]
    slurm.cancel(found)
    screen.print(f"cancelled {len(found)} jobs: {', '.join(job.job for job in found)}"
                 if found else "this sweep has no jobs: nothing to cancel")  # fmt: skip


def show_status(screen: Console, plan: Plan) -> None:
    """Tables of the sweep's jobs and of its runs.

    Raises:
      ConfigError: Slurm does not answer, or a summary is another run's.
    """
    table = Table(title=f"{plan.name}: jobs", title_justify="left")
    for column in ("job", "state", "time", "node", "reason"):
        table.add_column(column)
    found = slurm.jobs(plan.directory.absolute())
    for job in found:
        table.add_row(job.job, job.state.lower(), job.time, job.node, job.reason)
    screen.print(table if found else f"{plan.name}: no jobs")
    show_runs(screen, plan)


def show_runs(screen: Console, plan: Plan) -> None:
    """A table of the sweep's runs, and how many there are of each state.

    Raises:
      ConfigError: a summary is another run's.
    """
    states = [(run, *run_state(plan, run)) for run in plan.runs]
    table = Table(title=f"{plan.name}: runs", title_justify="left")
    for column in ("run", "state", ""):
        table.add_column(column)
    for run, state, more in states:
        table.add_row(run.spec.run_id, state, more)
    screen.print(table)
    count = collections.Counter(state for _, state, _ in states)
    kinds = dict.fromkeys(("done", "running", "waiting", "failed")) | dict.fromkeys(count)
    counted = ", ".join(f"{count[kind]} {kind}" for kind in kinds)
    screen.print(f"{len(plan.runs)} runs: {counted}")


def run_state(plan: Plan, run: PlannedRun) -> tuple[str, str]:
    """(done, diverged, collapsed, running, waiting or failed; more of it). Running is what somebody
    has a lease on, who may have died within the last minute.

    Raises:
      ConfigError: its summary is another run's.
    """
    try:
        status = read_summary(run.directory)["status"]
        return ("done" if status == "ok" else str(status)), ""
    except ABSENT:
        pass
    except (DamagedFile, KeyError):
        return "waiting", "its summary is damaged"
    known = read_failures(run.directory)
    leases = plan.mirror.leases() if plan.mirror else Leases(plan.directory / "leases")
    holder = leases.holder(run.spec.run_id)
    if holder is not None:
        return "running", holder
    if known.given_up:
        return "failed", f"{known.count} times: {known.reason}"
    begun = "begun" if run.started else ""
    tried = f"failed {known.count} times: {known.reason}" if known.count else ""
    return "waiting", tried or begun


def check_code(plan: Plan, section: str) -> None:
    """Refuse to go on with a sweep that another commit has begun: its table would mix two codes.
    section: of the config, whose `mixed_code` lets it pass.

    Raises:
      ConfigError: names the first run that it has trained.
    """
    if (found := of_another_commit(plan)) is not None:
        right = f"check that out, give another config.name, or set {section}.mixed_code=True"
        raise ConfigError(f"{commits_differ(*found)}; {right}")


def of_another_commit(plan: Plan) -> tuple[PlannedRun, str] | None:
    """The first run of the plan that other code has begun, and its commit."""
    now = git_commit()
    for run in plan.runs:
        try:
            trained = str(read_json(run.directory / "config.json").get("git_commit", now))
        except (*ABSENT, ConfigError):
            continue
        others = [commit for commit in trained.split(JOINED) if commit != now]
        if others:
            return run, others[0]
    return None


def commits_differ(run: PlannedRun, commit: str) -> str:
    """In words."""
    return f"{run.directory}: trained by commit {commit}, the code here is {git_commit()}"
