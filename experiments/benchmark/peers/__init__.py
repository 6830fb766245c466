"""Other people's code, doing the same work: what our step is compared with.

A peer of the suite `step` is a module with ARMS, those of our arms that it has a counterpart of,
and `contenders`; one of the suite `decode` has `check` and `rivals`. It is imported when somebody
asks for it, since what it is written in need not be installed.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
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


class Rival(NamedTuple):
    """A peer's counterpart of one of the cases of the suite `decode`.

    case: ours. call: decodes as many tokens as a call of ours, and returns them.
    weight_bytes: that each of them reads. goal: what our time should be of its, at most.
    """

    case: str
    call: Callable[[], list[int]]
    weight_bytes: int
    goal: float | None = None
    notes: tuple[str, ...] = ()


# (workload, size) -> the rivals by name.
DecodingPeer = Callable[[Workload, str], dict[str, Rival]]


class _Home(NamedTuple):
    """A peer's module here, the package that it needs, and the suite that measures it.

    distribution: what pip calls the package, where that is another name.
    """

    module: str
    package: str
    title: str
    suite: str = "step"
    distribution: str = ""


PEERS = {
    "torch": _Home("torch_peer", "torch", "PyTorch"),
    "qwix": _Home("qwix_peer", "qwix", "Qwix"),
    "llama.cpp": _Home(
        "llama_cpp_peer", "llama_cpp", "llama.cpp", suite="decode", distribution="llama-cpp-python"
    ),
}


def of_suite(suite: str, names: tuple[str, ...]) -> list[str]:
    """Those of the peers that a suite measures."""
    return [name for name in names if PEERS[name].suite == suite]


def check(name: str, workload: Workload) -> None:
    """Whether a peer can be measured.

    Raises:
      ConfigError: no such peer, its package is missing, or it cannot do the same work.
    """
    choose("peer", name, PEERS)
    if PEERS[name].suite == "decode":
        load_decoding(name, workload)
    else:
        load(name, workload)


def load_decoding(name: str, workload: Workload) -> DecodingPeer:
    """The suite `decode`'s peer called `name`.

    Raises:
      ConfigError: its package is missing, or it cannot do the same work.
    """
    module = _imported(name)
    module.check(workload)
    return module.rivals


def load(name: str, workload: Workload) -> Peer:
    """The peer called `name`.

    Raises:
      ConfigError: no such peer, its package is missing, or none of the arms has a counterpart.
    """
    choose("peer", name, PEERS)
    module = _imported(name)
    if not set(module.ARMS) & {arm.split(":")[0] for arm in workload.arms}:
        raise ConfigError(
            f"--peer={name}: it has counterparts of {' and '.join(module.ARMS)} alone; "
            "name one of them in --arms"
        )
    return module.contenders


def _imported(name: str) -> ModuleType:
    home = PEERS[name]
    try:
        return importlib.import_module(f"{__name__}.{home.module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != home.package:
            raise
        raise ConfigError(
            f"--peer={name}: {home.title} is not installed; "
            f"pip install {home.distribution or home.package}"
        ) from error
