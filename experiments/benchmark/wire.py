"""Suite `wire`: what travels between devices of a mesh in a step, read off the compiled program.

A run cut by `mesh.data` gathers each block's kernels in the forward pass and again in the backward
pass: as 16-bit values in a 16-bit arm, as int8 codes or packed ones in a ternary one. Nothing is
timed, so devices that a CPU makes up will do.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from bitnet_jax import programs
from bitnet_jax.errors import require
from bitnet_jax.precision import WIRES
from bitnet_jax.sharding import MeshShape
from bitnet_jax.train_step import StepConfig
from experiments.benchmark.result import Result
from experiments.benchmark.step import Say
from experiments.benchmark.timing import Ratio
from experiments.benchmark.workload import Workload

GOALS = {"int8": 0.5, "packed": 0.125}
MADE_UP = "XLA_FLAGS=--xla_force_host_platform_device_count=8 makes some up on a CPU"
KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_ELEMENT = {
    "bf16": 2,
    "f16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "s8": 1,
    "u8": 1,
    "pred": 1,
}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """kind: one of KINDS. dtypes: of what is there afterwards. bytes: of that, on each device.
    in_block: whether every block of the model does it, and not the step once."""

    kind: str
    dtypes: tuple[str, ...]
    bytes: int
    in_block: bool


def run(workload: Workload, say: Say) -> Result:
    """Every arm on a `data` mesh of all devices; a quantized one by each wire.

    Raises:
      ConfigError: there is one device, or they do not divide what a mesh cuts.
    """
    count = jax.device_count()
    require(count > 1, "suite", "wire", f"it needs several devices; {MADE_UP}")
    result = Result(notes=[f"{count} devices on the mesh's data axis; compiled, not run"])
    for size in workload.sizes:
        found: dict[str, int] = {}
        for name, config in _cases(workload, size, MeshShape(data=count)):
            say(f"{size} {name}")
            rows = _measure(workload, size, name, config)
            result.measurements += rows
            found[name] = sum(r["layer_bytes"] for r in rows if r["case"] == "all-gather")
        base = found[workload.base]
        for name, gathered in found.items():
            if name != workload.base:
                goal = GOALS.get(name.partition(" ")[2])
                share = gathered / base
                key = f"gathered_bytes/{name}/{workload.base}{workload.suffix(size)}"
                result.ratios[key] = Ratio(share, share, share, goal)
    return result


def _cases(workload: Workload, size: str, mesh: MeshShape) -> Iterator[tuple[str, StepConfig]]:
    for arm in workload.arms:
        config = dataclasses.replace(workload.step(size, arm), mesh=mesh)
        if not config.precision.quantized:
            yield arm, config
            continue
        for wire in WIRES:
            precision = dataclasses.replace(config.precision, wire=wire)
            yield f"{arm} {wire}", dataclasses.replace(config, precision=precision)


def _measure(workload: Workload, size: str, name: str, config: StepConfig) -> list[dict[str, Any]]:
    block, once = Counter[str](), Counter[str]()
    dtypes: dict[str, set[str]] = {}
    for each in collectives(compiled_step(config, workload.rows, workload.sequence_length)):
        (block if each.in_block else once)[each.kind] += each.bytes
        dtypes.setdefault(each.kind, set()).update(each.dtypes)
    return [
        {
            "suite": "wire",
            "size": size,
            "arm": name,
            "case": kind,
            "dtypes": " ".join(sorted(dtypes[kind])),
            "layer_bytes": block[kind],
            "once_bytes": once[kind],
            "step_bytes": block[kind] * config.model.layers + once[kind],
        }
        for kind in KINDS
        if block[kind] or once[kind]
    ]


def compiled_step(config: StepConfig, rows: int, sequence_length: int) -> str:
    """Text of the program that makes a step of a lone run on a mesh."""
    init = programs.compiled_init(config, 1)
    seeds = jax.ShapeDtypeStruct((1,), np.int32)
    state = programs.place(jax.eval_shape(init, seeds), 1, config.mesh)
    tokens = jax.ShapeDtypeStruct((rows * (sequence_length + 1),), np.uint8)
    starts = jax.ShapeDtypeStruct((1, 2, rows), np.int32)
    rates = np.zeros((1, 2), np.float32)
    schedule = programs.Schedule(rates, rates, rates[0], np.zeros(2, bool))
    steps = programs.compiled_steps(config, 1, sequence_length)
    count = jax.ShapeDtypeStruct((), np.int32)
    return steps.lower(state, tokens, starts, schedule, count).compile().as_text()


def collectives(program: str) -> list[Collective]:
    """What communicates in a compiled program's text. The asynchronous form is two lines, of which
    the first counts: its type holds what goes in, too."""
    pattern = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
    found = []
    for line in program.splitlines():
        if not (match := pattern.search(line)):
            continue
        shapes = _SHAPE.findall(match[1])
        if match[3] and match[2] != "all-reduce":
            shapes = shapes[len(shapes) // 2 :]
        sizes = [
            _ELEMENT[kind] * math.prod(map(int, filter(None, dims.split(","))))
            for kind, dims in shapes
        ]
        in_block = line.count("while/body") > 1  # the loop over blocks, within that over steps
        found.append(Collective(match[2], tuple(kind for kind, _ in shapes), sum(sizes), in_block))
    return found
