"""The main command.

    python -m experiments.run --sweep                        # the quickstart sweep and its report
    python -m experiments.run --sweep --config=sweeps/isoflop.py:size=800k --dry_run
    python -m experiments.run --config.model.size=95k --config.precision=fp16     # one run
    python -m experiments.run --reproduce=results/quickstart/runs/RUN_ID          # again, compared

With --sweep: every run that the config file's `sweep` yields, then endpoints.parquet, fits.json,
figures/ and report.html. Without: the one run that the config describes. What is finished is
skipped, what was interrupted goes on. The same command given several times at once, on one machine
or on several that share the workdir, shares the runs out; each ends when all are finished.
With --dry_run: shows the plan and trains nothing; --planned=FILE.csv also writes the planned
endpoints, for analysis.predict.

With --worker as well: only trains, as one of any number of workers, and leaves when nothing is left
that others who live do not have. What fails is tried again, until it has failed launch.failures
times without getting on. The same command without --worker makes the table and the report.

With --launcher=slurm as well: submits an array of workers to Slurm, as the config's section `slurm`
says. --dry_run shows the batch script and the plan, --status the sweep's jobs and runs, --cancel
cancels these jobs. With --launcher=k8s: the same on Kubernetes, as a JobSet and as the section
`k8s` says; what --dry_run prints is a file for kubectl (docs/clusters.md).

With --distributed: the same command in every process of several, which train each run together
over all of their devices (`mesh.data`, `mesh.tensor`). auto finds the others where Slurm, a TPU
pod, GKE or MPI started them; HOST:PORT of the first, --processes and --process say it. A signal to
any of them stops all at the same step.

--workdir=gs://BUCKET/PATH (or s3://, az://) keeps the sweep in object storage: launchers train in a
folder of their own (--scratch=DIR, by default in the user's cache), and send each checkpoint and
all results there; others go on from them (docs/clusters.md).

With --reproduce: trains a finished run afresh, and alone, from its config.json, in `reproduced` of
the workdir (never where the original lies), compares endpoints, metrics.jsonl and model with it to
the bit, and shows where both come from. reproduction.json beside the new run says the same.

Exit status: 0 all endpoints there; 1 some run failed or diverged (the rest is complete); 2 bad
usage or config; 130 or 143 interrupted by Ctrl-C or SIGTERM, state saved. A second signal ends the
process at once, by that signal (a shell's 130 or 143); what was saved before is whole. Of a
worker: 0 nothing is left for it; 1 the same, but a run diverged or was given up in it; 2, 130 and
143 as above, and the command again goes on. Of --reproduce: 0 equal to the bit; 1 different or
failed; 2, 130 and 143 as above.
"""

import contextlib
import dataclasses
import logging
import os
import shlex
import shutil
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging as absl_logging
from absl.flags import FlagValues
from rich.console import Console
from rich.table import Table

from bitnet_jax import data, hosts, programs
from bitnet_jax.errors import ConfigError, one_line
from bitnet_jax.files import read_json, remove_torn
from bitnet_jax.loss import bits_per_byte
from bitnet_jax.train import Interrupted
from experiments import (
    cluster,
    cluster_k8s,
    command_line,
    device_memory,
    display,
    report_kept,
)
from experiments.collect import collect
from experiments.estimate import flops_per_second
from experiments.launch import gang, k8s_options, kubectl, slurm, store
from experiments.launch.local import StopRequest, alone, train_all, work
from experiments.launch.mirror import Mirror
from experiments.launch.scratch import own_folder
from experiments.plan import Plan, load_points, make_plan, safe_name
from experiments.planned import write_planned

# The analysis, its figures and pandas are imported where results are written: half of the time to
# start is theirs, and a worker needs none of them.
if TYPE_CHECKING:
    import pandas as pd


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, train, report. A user's mistake is one line on stderr and status 2."""
    try:
        argv = list(sys.argv if argv is None else argv)
        if command_line.asks_for_help(argv):
            print(__doc__ + command_line.HELP)
            return 0
        quiet_libraries()
        return _run(argv)
    except _Stopped as stopped:
        return stopped.status
    except (ConfigError, data.DataError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # at any time but while it trains
        print("interrupted; all is saved. To go on, give the same command again", file=sys.stderr)
        return 128 + signal.SIGINT


class _Stopped(Exception):
    """A signal asked to stop; all is saved and the user has been told. status: the exit status."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def quiet_libraries() -> None:
    """Orbax and friends tell their life; a person watching wants the losses."""
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("jax").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="orbax")


def _run(argv: list[str]) -> int:
    flags = command_line.parse(argv)
    if flags.distributed is not None:
        hosts.start(flags.distributed, flags.processes, flags.process)
    command = shlex.join(["python", "-m", "experiments.run", *argv[1:]])
    if flags.reproduce is not None:
        return _reproduce(flags, command)
    path = command_line.config_path(flags)
    if flags.launcher == "k8s":  # before the network is asked for anything
        k8s_options.options(flags.config, flags.workdir if store.is_url(flags.workdir) else None)
    points = load_points(path, flags.config) if flags.sweep else [{}]
    corpus = data.load(data.resolve(flags.config.data.source))
    overridden = command_line.overridden_keys(flags)
    mirror = _mirror(flags)
    workdir = Path(flags.workdir) if mirror is None else mirror.folder.parent
    plan = make_plan(flags.config, points, corpus, workdir, overridden)
    plan = dataclasses.replace(plan, mirror=mirror)
    screen = display.console()
    if flags.launcher == "slurm":
        return _on_slurm(flags, plan, screen, argv)
    if flags.launcher == "k8s":
        return _on_k8s(flags, plan, screen, argv)
    if flags.dry_run:
        display.show_plan(screen, plan, *flops_per_second(plan))
        device_memory.check(plan)
        if flags.planned is not None:
            count, path = write_planned(plan, Path(flags.planned)), flags.planned
            screen.print(f"{count} planned endpoints: {path}", soft_wrap=True, markup=False)
        return 0
    if not hosts.first():
        return _follow(plan, command)
    _prepare(plan)
    if flags.worker:
        return _work(plan, screen, command)
    return _train(plan, screen, flags.sweep, command)


def _mirror(flags: FlagValues) -> Mirror | None:
    """Of the sweep at the workdir's URL, with what is known of it by now; None of a folder."""
    if not store.is_url(flags.workdir):
        return None
    url, name = flags.workdir.rstrip("/"), safe_name(flags.config.name)
    mirror = Mirror(store.open_store(f"{url}/{name}"), own_folder(url, flags.scratch) / name)
    try:
        mirror.pull_small()
    except store.Unreachable as error:
        if not flags.dry_run or flags.launcher != "k8s":
            raise
        print(f"warning: {one_line(error)}; how far the sweep is stays unknown", file=sys.stderr)
    return mirror


def _on_slurm(flags: FlagValues, plan: Plan, screen: Console, argv: list[str]) -> int:
    """Nothing trains here."""
    wanted, script = cluster.prepared(plan, flags.config, argv)
    if not (wanted.mixed_code or flags.status or flags.cancel):
        cluster.check_code(plan, "slurm")
    if not (flags.status or flags.cancel):
        device_memory.check_said(plan)
    if flags.dry_run and shutil.which("sbatch") is None:
        cluster.show_plan(screen, plan, script)
        print("warning: sbatch: not found; whether Slurm takes it is unknown", file=sys.stderr)
        return 0
    slurm.check_cluster(wanted)
    if flags.dry_run:
        cluster.show_plan(screen, plan, script)
    elif flags.status:
        cluster.show_status(screen, plan)
    elif flags.cancel:
        cluster.cancel(screen, plan)
    else:
        _make_writable(plan.directory)
        cluster.submit(screen, plan, wanted, script)
    return 0


def _on_k8s(flags: FlagValues, plan: Plan, screen: Console, argv: list[str]) -> int:
    """Nothing trains here."""
    path = command_line.config_path(flags)
    wanted = cluster_k8s.prepared(plan, flags.config, argv, path)
    if not (wanted.options.mixed_code or flags.status or flags.cancel):
        cluster.check_code(plan, "k8s")
    if not (flags.status or flags.cancel):
        device_memory.check_said(plan)
    if flags.dry_run:
        cluster_k8s.show_plan(screen, plan, wanted)
        return 0
    kubectl.check_there()
    if flags.status:
        cluster_k8s.show_status(screen, plan, wanted)
    elif flags.cancel:
        cluster_k8s.cancel(screen, plan, wanted)
    else:
        _make_writable(plan.directory)
        cluster_k8s.submit(screen, plan, wanted)
    return 0


def _reproduce(flags: FlagValues, command: str) -> int:
    """Make a run again, and say whether it is the same."""
    from experiments import reproduce

    original = reproduce.read_original(Path(flags.reproduce))
    plan = reproduce.make_reproduction(original, Path(flags.workdir))
    directory, screen = plan.runs[0].directory, display.console()
    if flags.dry_run:
        display.show_plan(screen, plan, *flops_per_second(plan))
        return 0
    _prepare(plan)
    screen.print(f"making {original.directory} again in {directory}", soft_wrap=True, markup=False)
    show = display.SweepDisplay(screen, plan)
    with _stoppable(screen, command) as stop, show.live():
        failures = train_all(plan, show, stop)
    if failures:
        screen.print("the reproduction failed: nothing to compare")
        return 1
    result = reproduce.read_result(directory, original.run)
    compared = reproduce.compare(original.result, result)
    known = reproduce.origins(original.result, result)
    reproduce.show(screen, compared, known)
    path = directory / "reproduction.json"
    reproduce.write(path, original, compared, known)
    screen.print(f"comparison: {path}", soft_wrap=True, markup=False)
    return 0 if all(one.equal for one in compared) else 1


def _prepare(plan: Plan) -> None:
    """Whatever can be wrong with the machine, before anything trains."""
    gang.check(plan)
    device_memory.check(plan)
    for run in plan.runs:
        if run.state == "damaged":
            summary = run.directory / "summary.json"
            what = "damaged: the run is trained again from its newest checkpoint"
            print(f"warning: {summary}: {what}", file=sys.stderr)
    if (found := cluster.of_another_commit(plan)) is not None:
        mixed = "the table names each run's; runs that go on are of both"
        print(f"warning: {cluster.commits_differ(*found)}: {mixed}", file=sys.stderr)
    _make_writable(plan.directory)
    gang.check_folder(plan)
    if plan.mirror is not None:
        plan.mirror.probe()
    programs.keep_programs(plan.directory.parent / "programs")


def _make_writable(directory: Path) -> None:
    """Make the sweep's directory, or say that the workdir is wrong."""
    probe = directory / f".probe.{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # one that has ended its sweep clears such names away
    except OSError as error:
        raise ConfigError(
            f"workdir={str(directory.parent)!r}: cannot write there ({error.strerror}); "
            "give --workdir a writable directory"
        ) from error


def _follow(plan: Plan, command: str) -> int:
    """Train what the first process says; it shows and writes."""
    gang.check(plan)
    gang.check_folder(plan)
    programs.keep_programs(plan.directory.parent / "programs")
    with open(os.devnull, "w") as nowhere, _stoppable(Console(file=nowhere), command) as stop:
        gang.follow(plan, stop)
    return 0


def _work(plan: Plan, screen: Console, command: str) -> int:
    """Train what nobody else does, and leave the results to who collects them."""
    show = display.SweepDisplay(screen, plan)
    with _stoppable(screen, command) as stop, show.live(), gang.led():
        all_well = work(plan, show, stop)
    done = sum(run.finished for run in plan.runs)
    screen.print(f"nothing is left for this worker; {done} of {len(plan.runs)} runs are finished")
    return 0 if all_well else 1


def _train(plan: Plan, screen: Console, is_sweep: bool, command: str) -> int:
    began, show = time.monotonic(), display.SweepDisplay(screen, plan)
    with contextlib.ExitStack() as turn:
        with _stoppable(screen, command) as stop:
            with show.live(), gang.led():
                failures = train_all(plan, show, stop)
            turn.enter_context(alone(plan, show, stop))
        if plan.mirror is not None:
            plan.mirror.pull_small()
        for directory in (plan.directory, plan.directory / "figures"):
            remove_torn(directory)
        tags = {run.spec.run_id: dict(run.spec.tags) for run in plan.runs}
        table = collect(plan.directory, failures, tags)
        _show_endpoints(screen, plan.name, table)
        if is_sweep:
            _report(plan, screen, command)
        else:
            screen.print(f"results: {plan.directory}", soft_wrap=True)
        if plan.mirror is not None:
            plan.mirror.push_results()
            screen.print(f"kept at: {plan.mirror.store.url}", soft_wrap=True, markup=False)
    screen.print(f"{len(table)} endpoints in {display.duration(time.monotonic() - began)}")
    return 0 if (table["status"] == "ok").all() else 1


@contextlib.contextmanager
def _stoppable(screen: Console, command: str) -> Iterator[StopRequest]:
    """Inside, signals are questions for the loop. Raises _Stopped once it has stopped for one."""
    with StopRequest() as stop:
        try:
            yield stop
        except Interrupted as error:
            screen.print("interrupted; all is saved. To go on, give the same command again:")
            screen.print(f"  {command}", soft_wrap=True, markup=False)
            of_others = signal.SIGTERM if hosts.several() else signal.SIGINT
            raise _Stopped(128 + (stop.signal or of_others)) from error


def _show_endpoints(screen: Console, name: str, table: "pd.DataFrame") -> None:
    from experiments import report

    shown = Table(title=f"{name}: endpoints", title_justify="left")
    for column in report.TABLE_HEADER:
        shown.add_column(column, justify="left" if column in ("size", "arm", "status") else "right")
    for row in report.endpoint_table(table):
        shown.add_row(*row)
    screen.print(shown)


def _report(plan: Plan, screen: Console, command: str) -> None:
    """Fit, draw and write, where that is not done; print the laws, the verdict and where things
    are."""
    from experiments import report
    from experiments.references import references

    lines = references(plan)
    bytes_per_token = plan.corpus.valid_bytes_per_token
    told: dict[str, Any] = {
        "title": f"bitnet_jax: {plan.name}",
        "references": lines,
        "facts": {"command": command, "corpus": plan.corpus.name},
    }
    paths = report_kept.kept(plan.directory, told)
    if paths is None:
        paths = report.write_report(plan.directory, **told)
        report_kept.keep(plan.directory, told, paths)
    for label, nats in lines.items():
        bits = bits_per_byte(nats, bytes_per_token)
        screen.print(f"{label}: {nats:.4f} nats a token, {bits:.3f} bits a byte")
    document = read_json(paths["fits"])
    for line in (*report.fit_lines(document), *document["verdict"]):
        screen.print(line, soft_wrap=True, markup=False)
    for name, path in paths.items():
        screen.print(f"{name}: {path}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
