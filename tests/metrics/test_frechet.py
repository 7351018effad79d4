"""The Fréchet distance against closed forms."""

import numpy as np
import pytest

from opensora.metrics.frechet import frechet_distance

RNG = np.random.default_rng(0)


def whitened(count: int, width: int) -> np.ndarray:
    """Samples whose mean is exactly 0 and whose covariance is exactly the identity."""
    x = RNG.normal(size=(count, width))
    x -= x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False).reshape(width, width))
    return x @ vectors / np.sqrt(values) @ vectors.T


def test_one_dimension() -> None:
    x = whitened(500, 1)
    assert frechet_distance(x, 4 * x + 3) == pytest.approx(9 + 9)  # (μ1 − μ2)² + (σ1 − σ2)²


def test_commuting_covariances() -> None:
    x, scale = whitened(300, 6), np.arange(1, 7)
    assert frechet_distance(x, x * scale + 2) == pytest.approx(4 * 6 + np.square(scale - 1).sum())


@pytest.mark.parametrize("count", [8, 40])
def test_identical_sets_are_at_zero(count: int) -> None:
    x = RNG.normal(size=(count, 16))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_both_forms_equal_the_matrix_root() -> None:
    from scipy.linalg import sqrtm

    for count in (12, 80):  # fewer samples than channels, and more
        x, y = RNG.normal(size=(count, 20)), RNG.normal(size=(count, 20)) * 2 + 1
        a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
        assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="of one D"):
        frechet_distance(np.zeros((4, 2)), np.zeros((4, 3)))
