"""A run as a sequence of segments: one trunk, and from it a decay for every token budget.

With warmup-stable-decay the trunk is trained once, and each endpoint at E steps branches off at
E - decay_fraction * E, decays, is evaluated and is thrown away; the trunk goes on from the branch
point. Every branch sees the batches that the trunk sees at the same steps. Other schedules are a
single decay from step 0.

Segments run in a fixed order, so a run's whole progress is one number, the tick: how many optimizer
steps have been made, over all segments.
"""

import dataclasses

from bitnet_jax.optim import Schedule

# A trunk's state is set aside at so many steps from its segment's start, and at multiples of it: a
# run that diverges goes back to there. A decay goes back to where it branched off.
ANCHOR_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps [start, end) of the trunk, or of the decay that ends in an endpoint at `end`."""

    start: int
    end: int
    is_decay: bool

    @property
    def steps(self) -> int:
        return self.end - self.start

    def anchored(self, step: int) -> bool:
        """Whether the state before `step` is one to go back to."""
        distance = step - self.start
        return distance == 0 or not self.is_decay and distance % ANCHOR_STEPS == 0

    def next_anchor(self, step: int) -> int:
        """The first anchor after `step`, or the segment's end."""
        if self.is_decay:
            return self.end
        return min(self.end, step + ANCHOR_STEPS - (step - self.start) % ANCHOR_STEPS)

    @property
    def decay(self) -> tuple[int, int] | None:
        """What `Schedule.factors` wants to know."""
        return (self.start, self.end) if self.is_decay else None


def plan_segments(schedule: Schedule, ends: tuple[int, ...]) -> tuple[Segment, ...]:
    """Segments of a run whose endpoints are at these increasing step counts."""
    segments, position = [], 0
    for end in ends:
        start = schedule.decay_start(end)
        if start > position:
            segments.append(Segment(position, start, is_decay=False))
            position = start
        segments.append(Segment(start, end, is_decay=True))
    return tuple(segments)


def total_ticks(segments: tuple[Segment, ...]) -> int:
    """Optimizer steps of the whole run: what it costs, at most the sum over its endpoints."""
    return sum(s.steps for s in segments)


def locate(segments: tuple[Segment, ...], tick: int) -> tuple[int, int]:
    """(index of the segment that makes this tick, the step within the trajectory)."""
    for index, segment in enumerate(segments):
        if tick < segment.steps:
            return index, segment.start + tick
        tick -= segment.steps
    raise ValueError(f"tick lies {tick} beyond the end of the run")
