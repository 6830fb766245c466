"""Trunk and branches."""

import pytest

from bitnet_jax.optim import Schedule
from bitnet_jax.trajectory import Segment, locate, plan_segments, total_ticks

WSD = Schedule("wsd", warmup_steps=10)
BUDGETS = pytest.mark.parametrize("ends", [(100,), (100, 200), (100, 200, 400), (7, 8, 9)])


def test_segments_of_known_budgets():
    trunk = [Segment(0, 80, False), Segment(80, 160, False), Segment(160, 320, False)]
    decays = [Segment(80, 100, True), Segment(160, 200, True), Segment(320, 400, True)]
    expected = [segment for pair in zip(trunk, decays, strict=True) for segment in pair]
    for budgets in (1, 2, 3):
        segments = plan_segments(WSD, (100, 200, 400)[:budgets])
        assert segments == tuple(expected[: 2 * budgets])
    assert total_ticks(segments) == 320 + 20 + 40 + 80 < 100 + 200 + 400


@BUDGETS
def test_trunk_is_contiguous_and_every_decay_leaves_it_and_ends_at_its_budget(ends):
    segments = plan_segments(WSD, ends)
    position, decayed = 0, []
    for segment in segments:
        assert segment.start == position and segment.steps > 0
        if segment.is_decay:
            decayed.append(segment.end)
            assert segment.decay == (segment.start, segment.end)
        else:
            position = segment.end
            assert segment.decay is None
    assert tuple(decayed) == ends
    assert position == WSD.decay_start(ends[-1])


@BUDGETS
def test_total_is_less_than_independent_runs(ends):
    total = total_ticks(plan_segments(WSD, ends))
    assert total == ends[0] if len(ends) == 1 else total < sum(ends)


@BUDGETS
def test_locate_finds_every_tick(ends):
    """It walks the segments in order, each from its first step to its last."""
    segments = plan_segments(WSD, ends)
    walk = [(i, step) for i, s in enumerate(segments) for step in range(s.start, s.end)]
    assert [locate(segments, tick) for tick in range(total_ticks(segments))] == walk


def test_locate_beyond_the_end():
    segments = plan_segments(WSD, (100, 200))
    with pytest.raises(ValueError, match="beyond the end"):
        locate(segments, total_ticks(segments))


@pytest.mark.parametrize("name", ["cosine", "two_stage"])
def test_other_schedules_are_one_decay_from_the_start(name):
    segments = plan_segments(Schedule(name, warmup_steps=10), (100,))
    assert segments == (Segment(0, 100, True),)
    assert total_ticks(segments) == 100
