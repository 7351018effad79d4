"""The paired interval: exact under "no difference", the same every time, and honest about few prompts."""

from itertools import product
from math import inf

import numpy as np
import pytest

from opensora.promotion.paired import paired_interval


def test_no_difference_and_a_sure_one() -> None:
    assert paired_interval([0.0] * 48) == (0.0, 0.0)
    assert paired_interval([0.25] * 48) == (0.25, 0.25)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_prompts_say_nothing(count: int) -> None:
    assert paired_interval([1.0] * count) == (-inf, inf)


def test_the_same_scores_give_the_same_bounds_and_turned_around_the_negative_ones() -> None:
    values = np.random.default_rng(3).normal(0.2, 1, 64)
    low, high = paired_interval(values)
    assert (low, high) == paired_interval(list(values))
    assert low < values.mean() < high
    assert paired_interval(-values) == pytest.approx((-high, -low))


def test_bounds_are_where_a_sign_flip_test_turns() -> None:
    """All 4096 flips of twelve differences, in the place of the drawn ones."""
    values = np.random.default_rng(5).normal(0.5, 1, 12)
    signs = np.array(list(product((1, -1), repeat=12)))

    def chance(mean: float) -> float:  # of a sum as large, were `mean` the true one
        centred = values - mean
        return float(np.mean(signs @ centred >= centred.sum() - 1e-12))

    low, high = paired_interval(values)
    width = high - low
    assert chance(low - 0.05 * width) < 0.025 < chance(low + 0.05 * width)


@pytest.mark.parametrize("share", [0.04, 0.3])
def test_chance_alone_is_seldom_called_an_improvement(share: float) -> None:
    """Scores 0 and 1 of two equal models on 48 prompts, which differ on few of them or on many."""
    rng = np.random.default_rng(1)
    drawn = rng.choice([-1.0, 0.0, 1.0], size=(400, 48), p=[share, 1 - 2 * share, share])
    called = [paired_interval(values)[0] > 0 for values in drawn]
    assert np.mean(called) < 0.025 + 3 * np.sqrt(0.025 * 0.975 / 400)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [inf]])
def test_what_is_no_number_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        paired_interval(values)
