"""The main command with --launcher=k8s: submit workers, show how the sweep is doing, cancel."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitnet_jax.data.corpora import BUILT_IN
from bitnet_jax.errors import ConfigError, require
from bitnet_jax.files import replacing
from experiments import cluster, display
from experiments.command_line import ROOT
from experiments.estimate import flops_per_second
from experiments.launch import k8s, k8s_options, kubectl
from experiments.plan import Plan


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What will be asked of the cluster. sweep: the label of all that belongs to it."""

    options: k8s_options.Options
    sweep: str
    command: list[str]


def prepared(plan: Plan, config: ConfigDict, argv: Sequence[str], config_file: str) -> Wanted:
    """All of it checked that can be without the cluster. config_file: FILE.py[:ARG].

    Raises:
      ConfigError: options, a file or a corpus that cannot work.
    """
    url = None if plan.mirror is None else plan.mirror.store.url.rpartition("/")[0]
    options = k8s_options.options(config, url)
    _check_corpus(str(config.data.source), options)
    _check_mesh(plan, options)
    left = sum(not run.finished for run in plan.runs)
    options = dataclasses.replace(options, workers=max(1, min(options.workers, left)))
    scratch = [f"--scratch={options.mount}"] if url else []
    command = ["python", "-m", "experiments.run", "--sweep", "--worker",
               f"--workdir={url or options.mount}", *scratch,
               f"--config={in_image(config_file, ROOT)}",
               *cluster.worker_flags(argv, but=("config",))]  # fmt: skip
    return Wanted(options, k8s.sweep_id(options, plan.name), command)


def in_image(config_file: str, root: Path) -> str:
    """A config file, FILE.py[:ARG], as the pods have it. root: of this code.

    Raises:
      ConfigError: it lies elsewhere.
    """
    path, colon, argument = config_file.partition(":")
    resolved = Path(path).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise ConfigError(
            f"--config={path}: pods have only what is in the image; put it into sweeps/ of this "
            "code, and build the image with it"
        )
    return f"{resolved.relative_to(root.resolve()).as_posix()}{colon}{argument}"


def _check_corpus(source: str, options: k8s_options.Options) -> None:
    mount, right = options.mount, f"pods have {', '.join(BUILT_IN)}"
    if options.url is not None:
        return require(source in BUILT_IN, "data.source", source, f"{right}, and no files")
    right += (f", and what is in k8s.mount={mount!r}; prepare it "
              "there, with the claim mounted here at the same path")  # fmt: skip
    inside = PurePosixPath(source).is_relative_to(mount) and ".." not in source.split("/")
    require(source in BUILT_IN or inside, "data.source", source, right)


def _check_mesh(plan: Plan, wanted: k8s_options.Options) -> None:
    """A run is cut over all devices of a gang, and over no more than a worker has."""
    there = k8s_options.devices(wanted)
    if there is None:
        return
    for run in plan.runs:
        size = run.spec.step.mesh.size
        fits = size == there if wanted.hosts > 1 else size <= there
        right = f"each worker has {there} devices on {wanted.hosts} hosts"
        right += "; cut each run over all of them" if wanted.hosts > 1 else ""
        require(fits, "mesh.data * mesh.tensor", size, right)


def show_plan(screen: Console, plan: Plan, wanted: Wanted) -> None:
    """What a submission would do, as a file that kubectl takes: the plan is a comment in it."""
    with screen.capture() as captured:
        where = wanted.options.url or wanted.options.mount
        display.show_plan(
            screen, plan, *flops_per_second(plan), where=f"{where}/{plan.directory.name}"
        )
    for line in Text.from_ansi(captured.get()).plain.splitlines():
        screen.print(f"# {line}".rstrip(), soft_wrap=True, markup=False, highlight=False)
    text = k8s.manifest(wanted.options, plan.name, 1, wanted.command)
    screen.print(text, soft_wrap=True, markup=False, highlight=False, end="")


def submit(screen: Console, plan: Plan, wanted: Wanted) -> None:
    """Submit, if anything is left to train; what was submitted before stays.

    Raises:
      ConfigError: the cluster refuses it.
    """
    if all(run.finished for run in plan.runs):
        screen.print(f"all {len(plan.runs)} runs are finished: nothing to submit")
        return
    found = kubectl.jobsets(wanted.options, wanted.sweep)
    number = 1 + max((kubectl.submission(one.name) for one in found), default=0)
    path = plan.directory / "k8s" / f"{wanted.sweep}-{number}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = k8s.manifest(wanted.options, plan.name, number, wanted.command)
    with replacing(path) as temporary:
        temporary.write_text(manifest)
    kubectl.apply(manifest)
    there = sum(one.workers for one in found if not one.ended)
    beside = f", beside {there} that are there" if there else ""
    gangs = f" of {wanted.options.hosts} pods" if wanted.options.hosts > 1 else ""
    screen.print(f"submitted {path.stem}: {wanted.options.workers} workers{gangs}{beside}")
    screen.print(f"manifest: {path}", soft_wrap=True)
    screen.print("how it is doing: the same command with --status; when all is done, without "
                 "--launcher where the claim is the workdir: that makes the table and the report",
                 soft_wrap=True)  # fmt: skip


def cancel(screen: Console, plan: Plan, wanted: Wanted) -> None:
    """Delete the sweep's JobSets that have not ended, and no others. What is saved stays.

    Raises:
      ConfigError: the cluster does not answer.
    """
    found = [one for one in kubectl.jobsets(wanted.options, wanted.sweep) if not one.ended]
    kubectl.delete(wanted.options, found)
    names = ", ".join(one.name for one in found)
    screen.print(f"deleted {len(found)} JobSets: {names}" if found
                 else "this sweep has no workers: nothing to cancel", soft_wrap=True)  # fmt: skip


def show_status(screen: Console, plan: Plan, wanted: Wanted) -> None:
    """Tables of the sweep's JobSets, pods and, as far as its folder is here, runs.

    Raises:
      ConfigError: the cluster does not answer, or a summary is another run's.
    """
    found = kubectl.jobsets(wanted.options, wanted.sweep)
    table = Table(title=f"{plan.name}: JobSets", title_justify="left")
    for column in ("JobSet", "state", "workers"):
        table.add_column(column)
    for one in found:
        table.add_row(one.name, one.state, str(one.workers))
    screen.print(table if found else f"{plan.name}: no JobSets")
    pods = kubectl.pods(wanted.options, wanted.sweep)
    table = Table(title=f"{plan.name}: pods", title_justify="left")
    for column in ("pod", "state", "since", "node", "reason"):
        table.add_column(column)
    for pod in pods:
        table.add_row(pod.name, pod.state, pod.since, pod.node, Text(pod.reason))
    screen.print(table if pods else f"{plan.name}: no pods")
    cluster.show_runs(screen, plan)
