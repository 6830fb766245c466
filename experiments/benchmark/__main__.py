"""Times side by side: arms against each other, our step against other people's, and where it goes.

    python -m experiments.benchmark --suite=step --sizes=7m --arms=ternary,bf16
    python -m experiments.benchmark --suite=step --arms=ternary,ternary:int8,bf16 --layers=4
    python -m experiments.benchmark --suite=step --peer=torch --json
    python -m experiments.benchmark --suite=parts --arms=ternary --out=parts.json
    python -m experiments.benchmark --suite=decode --peer=llama.cpp --sizes=60m
    python -m experiments.benchmark --suite=data,startup

Suites:
  step     seconds, tokens/s, share of the device's peak, peak memory and compile time of a step
  parts    each product, attention, norms, quantizers, head, optimizer, beside the whole step
  carriers both ways to multiply int8 codes, for the table in bitnet_jax/carriers.py
  sweep    8 runs as one program, and 2 programs at once, against one by one; steps a call; FLOPs
           that branching saves
  data     batches/s of the data pipeline, beside the tokens/s of the smallest model
  decode   tokens/s of one text in float32, bfloat16 and packed trits, and memory's floor of each
  checkpoint
           seconds that a save takes from training, as a share of the time between two saves
  startup  until the first step: a second run in a process, a new process, a warm compilation cache
  workers  seconds to a worker's first step with kept programs, and of a launch of 100 finished runs
  wire     bytes that a step sends between the devices of a mesh, by arm, from compiled programs
  fit      the search for a law's parameters against a loop over scipy's

What is compared runs by turns in one process, and its ratio is that of a turn; reported are the
median and the range over --repeats turns. JSON: {"environment", "ratios": {NAME: {"median", "min",
"max", "goal"}}, "measurements", "notes"}, where a goal is an upper bound or null.
Exit status: 0, or 2 with one line for what cannot be done.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from bitnet_jax.attention import IMPLEMENTATIONS
from bitnet_jax.errors import ConfigError, choose, require
from bitnet_jax.files import write_json
from experiments import display
from experiments.benchmark import (
    carriers,
    checkpoint,
    data,
    decode,
    fit,
    parts,
    peers,
    startup,
    step,
    sweep,
    table,
    wire,
    workers,
)
from experiments.benchmark.environment import environment
from experiments.benchmark.result import Result
from experiments.benchmark.workload import Workload
from experiments.run import quiet_libraries

SUITES: dict[str, Callable[[Workload, step.Say], Result]] = {
    "step": step.run,
    "parts": parts.run,
    "carriers": carriers.run,
    "sweep": sweep.run,
    "data": data.run,
    "decode": decode.run,
    "checkpoint": checkpoint.run,
    "startup": startup.run,
    "workers": workers.run,
    "wire": wire.run,
    "fit": fit.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    quiet_libraries()
    suites = _suites(options)
    workload = _workload(options)
    if options.out:
        _check_writable(options.out)
    for name in workload.peers:
        peers.check(name, workload)  # what is missing is said before anything is measured
        # Two libraries on one GPU: JAX must not take three quarters of its memory beforehand.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    facts, result = environment(arguments), Result()
    with Console(stderr=True).status("") as status:
        for name in suites:
            result.add(SUITES[name](workload, status.update))
    document = result.document(facts)
    if options.out:
        write_json(options.out, document)
    if options.json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        table.show(display.console(), facts, result)
    return 0


class _Parser(argparse.ArgumentParser):
    """Its complaints are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m experiments.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = Workload()
    parser.add_argument(
        "--suite", default="step", help=f"of {', '.join(SUITES)}; several by commas"
    )
    parser.add_argument("--sizes", default=",".join(default.sizes), help="of the ladder")
    parser.add_argument(
        "--arms",
        default=",".join(default.arms),
        help="ternary:int8 names the dtype of an arm's integer product",
    )
    parser.add_argument("--peer", default="", help=_peers_help())
    for flag, text in {
        "sequence_length": "tokens a row",
        "batch_tokens": "tokens a step",
        "layers": "in place of the size's own",
        "vocab": "vocabulary",
        "repeats": "rounds",
        "microbatches": "parts a step's batch is cut into",
    }.items():
        parser.add_argument(f"--{flag}", type=int, default=getattr(default, flag), help=text)
    parser.add_argument("--attention", default=default.attention, help=", ".join(IMPLEMENTATIONS))
    parser.add_argument("--out", type=Path, help="write the JSON document to this file")
    parser.add_argument("--json", action="store_true", help="print it in place of tables")
    return parser


def _peers_help() -> str:
    """The peers of each suite that has some."""
    by_suite: dict[str, list[str]] = {}
    for name, home in peers.PEERS.items():
        by_suite.setdefault(home.suite, []).append(name)
    return "; ".join(f"suite {suite}: {', '.join(names)}" for suite, names in by_suite.items())


def _suites(options: argparse.Namespace) -> tuple[str, ...]:
    suites = _names(options.suite)
    require(len(suites) > 0, "suite", options.suite, f"name one of {', '.join(SUITES)}")
    for name in suites:
        choose("suite", name, SUITES)
    for name in _names(options.peer):
        choose("peer", name, peers.PEERS)
        suite = peers.PEERS[name].suite
        require(suite in suites, "peer", name, f"it goes with --suite={suite}")
    return suites


LARGEST = {  # beyond which a number is a slip, or a machine's integers end
    "sequence_length": 2**20,
    "batch_tokens": 2**24,
    "layers": 1000,
    "vocab": 2**20,
    "repeats": 100_000,
    "microbatches": 2**20,
}


def _workload(options: argparse.Namespace) -> Workload:
    for name, most in LARGEST.items():
        value = getattr(options, name)
        require(value is None or value <= most, name, value, f"it must be at most {most}")
    return Workload(
        sizes=_names(options.sizes),
        arms=_names(options.arms),
        sequence_length=options.sequence_length,
        batch_tokens=options.batch_tokens,
        layers=options.layers,
        vocab=options.vocab,
        repeats=options.repeats,
        microbatches=options.microbatches,
        attention=options.attention,
        peers=_names(options.peer),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def _check_writable(path: Path) -> None:
    """Before anything is measured for nothing."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--out={path}: cannot write there; give a file in a writable directory")


if __name__ == "__main__":
    sys.exit(main())
