"""Whether a plan's runs fit into the memory of a device, and what would help where not."""

import dataclasses
import os
from collections.abc import Iterator
from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from bitnet_jax.errors import ConfigError
from bitnet_jax.memory import Batch, Memory, step_memory
from experiments.plan import Plan, PlannedRun

GB = 1e9
MOST_PARTS = 2**16  # microbatches or devices that are tried as a remedy


class Change(NamedTuple):
    """Of how a run is laid out. microbatches, data (devices along `mesh.data`): 0 for its own."""

    microbatches: int = 0
    remat: bool = False
    data: int = 0


AS_IT_IS = Change()


def amount(size: float) -> str:
    """Bytes in three digits and a unit of thousands: 141 kB, 25.3 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.3g} B"


def available(plan: Plan) -> tuple[int | None, str]:
    """Bytes that a device has, and who says so: launch.device_memory_gb, or the machine; None
    where it does not tell."""
    said = plan.runs[0].config.launch.device_memory_gb
    if said:
        return int(said * GB), "launch.device_memory_gb"
    device = jax.devices()[0]
    if device.platform != "cpu":
        limit = (device.memory_stats() or {}).get("bytes_limit")
        return limit, device.device_kind
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None, "cpu"
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine"


def run_memory(run: PlannedRun, corpus_bytes: int = 0, change: Change = AS_IT_IS) -> Memory:
    """What a step of a run needs on a device, with no other run beside it.

    corpus_bytes: of the training tokens, which lie on the device where they are few enough.
    """
    spec, model = run.spec, run.spec.step.model
    parts = change.microbatches or max(spec.step.microbatches, run.microbatches)
    step = dataclasses.replace(
        spec.step,
        microbatches=parts,
        warming=spec.phases.programs(spec.step)[0].warming,
        model=dataclasses.replace(model, remat=model.remat or change.remat),
    )
    if corpus_bytes > run.config.launch.resident_bytes:
        corpus_bytes = spec.batch_size * (spec.data.sequence_length + 1) * 4
    batch = Batch(spec.batch_size // parts, spec.data.sequence_length)
    mesh = spec.step.mesh
    return step_memory(step, batch, corpus_bytes, change.data or mesh.data, mesh.tensor)


def needed(run: PlannedRun, corpus_bytes: int = 0, change: Change = AS_IT_IS) -> int:
    """Bytes of a step, and of the state that a run sets aside for its trunk or a rollback."""
    memory = run_memory(run, corpus_bytes, change)
    return memory.total + memory.state


def check(plan: Plan) -> None:
    """Refuse a run that surely does not fit, before anything trains.

    On a CPU the system would end the process, not the run, so it is judged as configured; where
    launch.device_memory_gb says, too. An accelerator's loop cuts the batch by itself where memory
    runs out, so there it is judged with a row at a time. Refused is what `Memory.at_least` says,
    never a mere estimate.

    Raises:
      ConfigError: naming the run, the bytes needed and had, and what would help.
    """
    has, _ = available(plan)
    if has is None:
        return
    for run in plan.runs:
        if not run.finished and _surely(run) > has:
            raise ConfigError(_refusal(run, plan.corpus.train.nbytes, has))


def check_said(plan: Plan) -> None:
    """`check` for devices elsewhere: where launch.device_memory_gb says what they have.

    Raises:
      ConfigError: as `check` does.
    """
    if plan.runs[0].config.launch.device_memory_gb:
        check(plan)


def _surely(run: PlannedRun) -> int:
    said, on_cpu = run.config.launch.device_memory_gb, jax.default_backend() == "cpu"
    finest = AS_IT_IS if on_cpu or said else Change(microbatches=run.spec.batch_size)
    memory = run_memory(run, change=finest)
    return memory.at_least(on_cpu and not said) + memory.state


def _refusal(run: PlannedRun, corpus_bytes: int, has: int) -> str:
    need = needed(run, corpus_bytes)
    found = list(_remedies(run, corpus_bytes, has)) or ["take a smaller model.size"]
    return (
        f"{run.spec.run_id}: it takes about {amount(need)}, where a device has {amount(has)}; "
        f"{', or '.join(found)}"
    )


def _remedies(run: PlannedRun, corpus_bytes: int, has: int) -> Iterator[str]:
    """What would make a run fit by the whole estimate, the least change first."""

    def fits(change: Change) -> bool:
        return needed(run, corpus_bytes, change) <= has

    rows, now = run.spec.batch_size, run.spec.step.microbatches
    finer = [n for n in range(now + 1, min(rows, MOST_PARTS) + 1) if rows % n == 0]
    for remat in (False, True):
        parts = next((n for n in finer if fits(Change(n, remat))), None)
        if remat and fits(Change(remat=True)):
            yield "set model.remat=True"
        elif parts is not None:
            also = " and model.remat=True" if remat else ""
            yield f"set train.microbatches={parts}{also}"
        else:
            continue
        break
    width, mine = run.spec.step.model.width, run.spec.step.mesh.data
    counts = (2**k for k in range(1, MOST_PARTS.bit_length()) if 2**k > mine)
    allowed = (n for n in counts if rows // now % n == 0 and width % n == 0)
    devices = next((n for n in allowed if fits(Change(data=n))), None)
    if devices is not None:
        yield f"set mesh.data={devices}, over as many such devices"


def show(screen: Console, plan: Plan, elsewhere: bool = False) -> None:
    """What a step needs of a device, by shape and arm. elsewhere: it is not one of this machine."""
    has, source = available(plan)
    if elsewhere and not plan.runs[0].config.launch.device_memory_gb:
        has = None
    unknown = "unknown: launch.device_memory_gb says it" if elsewhere else "unknown"
    had = unknown if has is None else f"{amount(has)} ({source})"
    title = f"what a run needs of a device's memory, which is {had}"
    table = Table(title=title, title_justify="left")
    for column in ("size", "arm"):
        table.add_column(column)
    columns = ("parameters", "optimizer", "gradients", "saved", "saved under remat", "all")
    for column in (*columns, "fits"):
        table.add_column(column, justify="right")
    rows: dict[tuple[str, ...], None] = {}
    for run in plan.runs:
        tokens = plan.corpus.train.nbytes
        memory, remat = run_memory(run, tokens), run_memory(run, tokens, Change(remat=True))
        sizes = (memory.parameters, memory.optimizer, memory.gradients, memory.activations)
        need = needed(run, tokens)
        all_sizes = (*sizes, remat.activations, need)
        arm = run.spec.step.precision.name
        shown = (run.spec.size, arm, *map(amount, all_sizes))
        rows[(*shown, "?" if has is None else "yes" if need <= has else "no")] = None
    for row in rows:
        table.add_row(*row)
    screen.print(table)
