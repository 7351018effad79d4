"""Measures of motion on clips whose answer is known."""

import numpy as np
import pytest

from opensora.metrics.motion import (
    dynamic_degree,
    flicker,
    flow_degree,
    flow_speeds,
    motion_smoothness,
    moves,
    stands_still,
)


def ramp(step: int) -> np.ndarray:
    return np.stack([np.full((8, 8, 3), step * index, np.uint8) for index in range(8)])


def test_a_still_clip() -> None:
    still = ramp(0)
    assert (flicker(still), dynamic_degree(still), motion_smoothness(still)) == (1.0, 0.0, 1.0)


def test_a_steady_change_is_smooth_and_a_blinking_one_is_not() -> None:
    assert motion_smoothness(ramp(20)) == pytest.approx(1.0)
    assert flicker(ramp(20)) == pytest.approx(1 - 20 / 255)
    blinking = ramp(0)
    blinking[::2] = 255
    assert flicker(blinking) == pytest.approx(0.0)
    assert motion_smoothness(blinking) == pytest.approx(0.0)


def textured(width: int, side: int = 64) -> np.ndarray:
    """A random picture [side, width, 3], smooth over a few pixels."""
    import cv2

    noise = np.random.default_rng(0).random((side, width, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), max(3, side / 85))
    return ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)


def sliding(step: int, frames: int = 9, side: int = 64) -> np.ndarray:
    """A window [T, side, side, 3] that moves over a picture by `step` pixels a frame."""
    picture = textured(side + step * frames, side)
    return np.stack([picture[:, step * index : step * index + side] for index in range(frames)])


@pytest.mark.parametrize("step", [1, 2, 4])
def test_flow_measures_pixels(step: int) -> None:
    clip = sliding(step)
    np.testing.assert_allclose(flow_speeds(clip), step, rtol=0.1)
    assert flow_degree(clip) == pytest.approx(step / 64, rel=0.1)
    assert flow_degree(np.ascontiguousarray(clip.transpose(0, 2, 1, 3))) == pytest.approx(step / 64, rel=0.1)


def test_flow_is_told_in_pixels_of_the_frames() -> None:
    """Where it is computed in smaller ones."""
    np.testing.assert_allclose(flow_speeds(sliding(6, 3, side=512)), 6, rtol=0.1)


def test_a_fade_changes_and_does_not_move() -> None:
    still = np.repeat(textured(64)[None], 8, axis=0)
    faded = (still * np.linspace(1, 0.6, 8)[:, None, None, None]).astype(np.uint8)
    assert flow_degree(still) < 1e-3
    assert dynamic_degree(faded) > 0.02
    assert flow_degree(faded) < flow_degree(sliding(1)) / 2
    assert not moves(faded, 8)


def test_what_moves_by_the_published_rule() -> None:
    """The limit of a 64 pixel frame is 1.5 pixels a frame at eight frames a second."""
    assert not moves(sliding(1), 8)
    assert moves(sliding(2), 8)
    assert moves(sliding(1, 24), 24)  # three pixels every third frame
    assert not moves(sliding(2), 4)  # where twice as far must be gone
    once = np.concatenate([np.repeat(sliding(2)[:1], 15, axis=0), sliding(2)[1:2]])
    assert not moves(once, 8)  # one step of fifteen


def test_what_stands_still_by_the_published_rule() -> None:
    assert stands_still(np.repeat(textured(64)[None], 16, axis=0))
    assert not stands_still(sliding(2, 16))
    assert not stands_still(sliding(1, 16))  # slow, but the end is far from the start


def test_measures_are_taken_in_float64() -> None:
    """Grey levels of uint8 would wrap around."""
    x = np.zeros((3, 2, 2, 3), np.uint8)
    x[1] = 255
    assert flicker(x) == 0
    assert motion_smoothness(x) == 0
    assert dynamic_degree(x) == 1
