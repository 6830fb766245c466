"""Where launchers of a sweep meet: in the folder that they share, or at a URL that each mirrors."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

from experiments.launch.leases import HEARTBEAT, Held, Lease, LeaseLost, Leases, look_afresh
from experiments.launch.mirror import Mirror
from experiments.launch.store import Unreachable
from experiments.plan import Plan, PlannedRun

LOOK = 2.0  # seconds between looks for new checkpoints
AGAIN = 10.0  # seconds until what a store has refused is tried again


class Sharing(Protocol):
    """leases: on the plan's runs."""

    leases: Leases

    def look(self, runs: Collection[PlannedRun]) -> None:
        """See what others have made of runs that are claimed. Raises Held where that cannot be."""

    def training(self, leases: Collection[Lease]) -> AbstractContextManager[None]:
        """Around the training of runs."""

    def keep(self, leases: Iterable[Lease], should_stop: Callable[[int], bool]) -> set[str]:
        """Before runs are let go: let others see what was made of them. Returns whose were."""


def sharing(plan: Plan, say: Callable[[str], None]) -> Sharing:
    """Of a plan. say: shows a line to who watches."""
    return InFolder(plan) if plan.mirror is None else AtUrl(plan.mirror, say)


class InFolder:
    """Everybody sees everything."""

    def __init__(self, plan: Plan):
        self.leases = Leases(plan.directory / "leases")

    def look(self, runs: Collection[PlannedRun]) -> None:
        """Have a shared file system forget what it remembers."""
        for folder in (*{run.directory.parent for run in runs}, *(run.directory for run in runs)):
            look_afresh(folder)

    @contextmanager
    def training(self, leases: Collection[Lease]) -> Iterator[None]:
        """Nothing to do."""
        yield

    def keep(self, leases: Iterable[Lease], should_stop: Callable[[int], bool]) -> set[str]:
        """It is kept already."""
        return {lease.name for lease in leases}


class AtUrl:
    """A thread sends each checkpoint once it is there, so that no training waits for the store."""

    def __init__(self, mirror: Mirror, say: Callable[[str], None]):
        self._mirror, self._say = mirror, say
        self.leases = mirror.leases()
        self._told = False

    def look(self, runs: Collection[PlannedRun]) -> None:
        """Fetch them."""
        try:
            for run in runs:
                self._mirror.pull_run(run.spec.run_id)
        except Unreachable as error:
            raise Held(str(error)) from error

    @contextmanager
    def training(self, leases: Collection[Lease]) -> Iterator[None]:
        """Their checkpoints are sent on."""
        ended = threading.Event()
        thread = threading.Thread(
            target=self._send_on, args=(list(leases), ended), daemon=True, name="mirror"
        )
        thread.start()
        try:
            yield
        finally:
            ended.set()

    def _send_on(self, leases: list[Lease], ended: threading.Event) -> None:
        sent: dict[str, set[str]] = {}
        checked = time.monotonic()
        while not ended.wait(LOOK):
            for lease in leases:
                ticks = self._mirror.ticks(lease.name)
                if ticks == sent.get(lease.name) or lease.lost or ended.is_set():
                    continue
                with suppress(LeaseLost):  # it is marked, and training ends
                    if self._push(lease):
                        sent[lease.name] = ticks
            if time.monotonic() - checked > HEARTBEAT:
                checked = time.monotonic()
                with suppress(LeaseLost, Unreachable):
                    self.leases.check(leases)

    def _push(self, lease: Lease) -> bool:
        try:
            self._mirror.push_run(lease.name, lambda: self.leases.check([lease]))
        except Unreachable as error:
            if not self._told:
                self._say(f"{error}; training goes on, and so do the attempts")
            self._told = True
            return False
        self._told = False
        return True

    def keep(self, leases: Iterable[Lease], should_stop: Callable[[int], bool]) -> set[str]:
        """Send what is new, for as long as it takes or until a stop is asked for."""
        kept = set()
        for lease in leases:
            with suppress(LeaseLost):
                while not self._push(lease):
                    if should_stop(0):
                        self._say(f"{lease.name}: what was not sent is in {self._mirror.folder}")
                        break
                    time.sleep(AGAIN)
                else:
                    kept.add(lease.name)
        return kept
