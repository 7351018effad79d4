"""Times rise, whatever the timestamps are."""

import pytest

from opensora.data.clock import Clock


def times(*stamps: float | None) -> list[float]:
    clock = Clock(10)
    return [clock.tell(stamp) for stamp in stamps]


def test_times_begin_at_zero_and_fill_gaps_in_the_stamps() -> None:
    assert times(3.0, 3.1, None, 3.3) == pytest.approx([0, 0.1, 0.2, 0.3])


def test_a_clock_that_jumps_or_begins_anew_goes_on_by_a_step() -> None:
    assert times(0.0, 0.1, 95443.7, 95443.8) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert times(5.0, 5.1, 5.2, 5.3, 5.4, 5.5, 5.6, 5.0, 5.1) == pytest.approx([n / 10 for n in range(9)])


def test_stamps_that_do_not_rise_give_times_that_do() -> None:
    found = times(0.0, 0.1, 0.1, 0.05, 0.2)
    assert all(before < after for before, after in zip(found[:-1], found[1:], strict=True))
    assert found[-1] == pytest.approx(0.2)


def test_a_damaged_frame_moves_no_other() -> None:
    clock = Clock(10)
    found = [clock.tell(stamp, intact) for stamp, intact in [(0.0, True), (2.0, False), (1.0, False), (3.0, True)]]
    assert found == pytest.approx([0, 2.0, 2.1, 3.0])
