"""Damage is followed in the order of the file, and a gap that no frame tells of is told by the key frame after it."""

from opensora.data.damage import Damage

# Packets as they lie in the file: I0 P1 B2 B3 P4 B5 B6 I7 P8; each frame's packet, in order of display.
ORDER = (0, 2, 3, 1, 5, 6, 4, 7, 8)
KEYS = {0, 7}


def follow(order: tuple[int, ...], at: dict[int, int], corrupt: int | None = None) -> list[bool]:
    """Whether the frames of `order` are intact; packet `at[place]` turns out to be damaged before that frame comes."""
    damage = Damage()
    found = []
    for place, number in enumerate(order):
        if place in at:
            damage.at(at[place])
        found.append(damage.passes(number, number in KEYS, number == corrupt))
    return found


def test_frames_that_are_built_on_a_damaged_one_are_not_intact() -> None:
    assert follow(ORDER, {}) == [True] * 9
    # P1 is shown fourth; B2 and B3 before it are built on it.
    assert follow(ORDER, {1: 1}) == [True] + [False] * 6 + [True] * 2
    # Two frames of an earlier packet are still to come.
    assert follow(ORDER, {1: 4}) == [True] * 4 + [False] * 3 + [True] * 2
    assert follow(ORDER, {}, corrupt=6) == [True] * 5 + [False] + [True] * 3


def test_frames_before_a_key_frame_that_lie_behind_it_are_not_intact() -> None:
    leading = (0, 1, 3, 4, 2, 5)  # I0 P1 I2 B3 B4 P5, an open group of pictures
    damage = Damage()
    found = []
    for number in leading:
        if number == 1:
            damage.at(1)
        found.append(damage.passes(number, number in (0, 2), False))
    assert found == [True, False, False, False, True, True]


def test_a_gap_without_a_frame_is_told_by_the_next_key_frame() -> None:
    assert follow((0, 2, 3, 1, 7, 8), {4: 4}) == [True] * 4 + [False, True]
    assert follow((7, 8), {0: 0}) == [True, True]  # nothing was shown before, so nothing is between


def test_a_damaged_key_frame_ends_nothing() -> None:
    assert follow(ORDER, {1: 7}) == [True] * 7 + [False] * 2
