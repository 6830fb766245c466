"""Other people's code, doing the same work: what our step is compared with.

A peer is a module with ARMS, those of our arms that it has a counterpart of, and `contenders`. It
is imported when somebody asks for it, since what it is written in need not be installed.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Int

from bitnet_jax.errors import ConfigError, choose
from experiments.benchmark.timing import Case
from experiments.benchmark.workload import Workload


class Contender(NamedTuple):
    """A peer's counterpart of one of our arms.

    step: makes one optimizer step and waits for it.
    peak_bytes: the most that a step holds at once; None where that is not known.
    goal: what our time should be of its, at most.
    """

    arm: str
    step: Case
    compile_seconds: float
    peak_bytes: int | None = None
    goal: float | None = None
    notes: tuple[str, ...] = ()


# (workload, size, tokens) -> the contenders for the workload's arms, by name.
Peer = Callable[[Workload, str, Int[Array, "B T1"]], dict[str, Contender]]


class _Home(NamedTuple):
    """A peer's module here, and the package that it needs."""

    module: str
    package: str
    title: str


PEERS = {
    "torch": _Home("torch_peer", "torch", "PyTorch"),
    "qwix": _Home("qwix_peer", "qwix", "Qwix"),
}


def load(name: str, workload: Workload) -> Peer:
    """The peer called `name`.

    Raises:
      ConfigError: no such peer, its package is missing, or none of the arms has a counterpart.
    """
    choose("peer", name, PEERS)
    home = PEERS[name]
    try:
        module = importlib.import_module(f"{__name__}.{home.module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != home.package:
            raise
        raise ConfigError(
            f"--peer={name}: {home.title} is not installed; pip install {home.package}"
        ) from error
    if not set(module.ARMS) & {arm.split(":")[0] for arm in workload.arms}:
        raise ConfigError(
            f"--peer={name}: it has counterparts of {' and '.join(module.ARMS)} alone; "
            "name one of them in --arms"
        )
    return module.contenders
