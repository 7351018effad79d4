"""Measures of motion on clips whose answer is known."""

import numpy as np
import pytest

from opensora.metrics.features import randconv_features
from opensora.metrics.motion import dynamic_degree, flicker, motion_smoothness


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


def test_random_features_are_the_same_everywhere_and_see_differences() -> None:
    x = np.random.default_rng(0).integers(0, 255, (2, 4, 16, 16, 3), dtype=np.uint8)
    features = randconv_features(x)
    assert features.shape == (2, 64)
    assert features.dtype == np.float64
    np.testing.assert_array_equal(features, randconv_features(x))
    assert np.abs(features[0] - features[1]).max() > 1e-3
