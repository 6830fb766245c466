"""The main command.

    python -m experiments.run --sweep                        # the quickstart sweep and its report
    python -m experiments.run --sweep --config=sweeps/isoflop.py:size=800k --dry_run
    python -m experiments.run --config.model.size=95k --config.precision=fp16     # one run

With --sweep: every run that the config file's `sweep` yields, then endpoints.parquet, fits.json,
figures/ and report.html. Without: the one run that the config describes. What is finished is
skipped, what was interrupted goes on.

Exit status: 0 all endpoints there; 1 some run failed or diverged (the rest is complete); 2 bad
usage or config; 130 or 143 interrupted by Ctrl-C or SIGTERM, state saved.
"""

import contextlib
import difflib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

ROOT = Path(__file__).parent.parent
DEFAULT_SWEEP = ROOT / "sweeps" / "quickstart.py"
DEFAULT_RUN = ROOT / "bitnet_jax" / "configs" / "default.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, plan, train, report; a user's mistake is one line on stderr and status 2."""
    from bitnet_jax.data import DataError
    from bitnet_jax.errors import ConfigError

    try:
        values = _parse(list(sys.argv if argv is None else argv))
        if values is None:
            return 0
        return _run(values)
    except (ConfigError, DataError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> flags.FlagValues | None:
    """The command line, or None where it only asked for help.

    Raises:
      ConfigError, flags.Error: with a message of one line.
    """
    from bitnet_jax.errors import ConfigError

    argv = _join_config(argv)
    if {"--help", "-h", "-help"} & set(argv):
        print(__doc__.strip())
        print("\nFlags: --sweep  --config=FILE[:ARG]  --config.KEY=VALUE  --workdir=DIR  --dry_run")
        print(f"Keys and what they mean: {DEFAULT_RUN.relative_to(ROOT)}")
        return None
    if not any(a.startswith("--config=") for a in argv):
        sweeping = "--sweep" in argv or "--sweep=true" in argv
        argv = [argv[0], f"--config={DEFAULT_SWEEP if sweeping else DEFAULT_RUN}", *argv[1:]]
    _check_overrides(argv)
    values = flags.FlagValues()
    flags.DEFINE_bool("sweep", False, "run the sweep of the config file", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print the plan, train nothing", flag_values=values)
    flags.DEFINE_string("workdir", "results", "where results go", flag_values=values)
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(_one_line(error)) from error
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]!r}: unexpected argument; flags begin with --")
    return values


def _join_config(argv: list[str]) -> list[str]:
    """`--config FILE` as `--config=FILE`."""
    argv = list(argv)
    while "--config" in argv[:-1]:
        at = argv.index("--config")
        argv[at : at + 2] = [f"--config={argv[at + 1]}"]
    return argv


def _check_overrides(argv: list[str]) -> None:
    """Name a missing config file and an unknown config key before absl meets them."""
    from bitnet_jax.errors import ConfigError
    from experiments.plan import load_config

    overrides = [a.removeprefix("--").partition("=") for a in argv if a.startswith("--config")]
    config = load_config(next(value for flag, _, value in overrides if flag == "config"))
    for flag, _, value in overrides:
        key = flag.removeprefix("config").lstrip(".")
        if key and key not in config.keys(True):
            close = difflib.get_close_matches(key, list(config.keys(True)), n=1)
            hint = f"did you mean {close[0]}?" if close else "see bitnet_jax/configs/default.py"
            raise ConfigError(f"config.{key}={value!r}: unknown key; {hint}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())


def _run(values: flags.FlagValues) -> int:
    quiet_libraries()
    from bitnet_jax import data
    from experiments import display
    from experiments.plan import load_sweep, make_plan

    config: ConfigDict = values.config
    overridden = list(config_flags.get_override_values(values["config"]))
    points: Any = [{}]
    if values.sweep:
        points = load_sweep(config_flags.get_config_filename(values["config"]))(config)
    screen = display.console()
    corpus = data.load(data.resolve(config.data.source))
    plan = make_plan(config, points, corpus, Path(values.workdir), overridden)
    if values.dry_run:
        from experiments.estimate import flops_per_second

        display.show_plan(screen, plan, *flops_per_second(plan))
        return 0
    _claim(plan.directory)
    return _train(plan, screen, values.sweep, " ".join(sys.argv[1:]))


def quiet_libraries() -> None:
    """Orbax and friends tell their life; a person watching wants the losses."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.filterwarnings("ignore", module="orbax")


def _claim(directory: Path) -> None:
    """Make the directory, or say which key is wrong."""
    from bitnet_jax.errors import ConfigError

    try:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as cleanup:
            probe = directory / f".probe-{os.getpid()}"
            cleanup.callback(lambda: probe.unlink(missing_ok=True))
            probe.touch()
    except OSError as error:
        raise ConfigError(
            f"workdir={str(directory.parent)!r}: cannot write there ({error.strerror}); "
            "give --workdir a writable directory"
        ) from error


def _train(plan: Any, screen: Any, is_sweep: bool, command: str) -> int:
    from bitnet_jax.train import Interrupted
    from experiments import display
    from experiments.collect import collect
    from experiments.launch.local import StopRequest, train_all

    began, show = time.monotonic(), display.SweepDisplay(screen, plan)
    with StopRequest() as stop:
        try:
            with show.live():
                failures = train_all(plan, show, stop)
        except (Interrupted, KeyboardInterrupt):
            screen.print(
                "interrupted; everything so far is saved. To go on, give the same command again:\n"
                f"  python -m experiments.run {command}",
                soft_wrap=True,
                markup=False,
            )
            return 128 + (stop.signal or 2)
    table = collect(plan.directory, failures, {run.spec.run_id for run in plan.runs})
    _show_results(plan, screen, table, is_sweep, command)
    screen.print(f"{len(table)} endpoints in {display.duration(time.monotonic() - began)}")
    return 0 if (table["status"] == "ok").all() else 1


def _show_results(plan: Any, screen: Any, table: Any, is_sweep: bool, command: str) -> None:
    """The table, the fitted laws, and where the rest is."""
    from rich.table import Table

    from experiments import report
    from experiments.references import references

    shown = Table(title=f"{plan.name}: endpoints", title_justify="left")
    for column in report.TABLE_HEADER:
        shown.add_column(column, justify="left" if column in ("size", "arm", "status") else "right")
    for row in report.endpoint_table(table):
        shown.add_row(*row)
    screen.print(shown)
    if not is_sweep:
        screen.print(f"results: {plan.directory}", soft_wrap=True)
        return
    lines = references(plan)
    for label, nats in lines.items():
        screen.print(f"{label}: {nats:.4f} nats a token")
    paths = report.write_report(
        plan.directory,
        title=f"bitnet_jax: {plan.name}",
        references=lines,
        facts={"command": f"python -m experiments.run {command}", "corpus": plan.corpus.name},
    )
    document = json.loads(paths["fits"].read_text())
    for line in (*report.fit_lines(document), *document["verdict"]):
        screen.print(line, soft_wrap=True, markup=False)
    for name, path in paths.items():
        screen.print(f"{name}: {path}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
