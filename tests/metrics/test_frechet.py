"""The Fréchet distance against closed forms and the matrix root, and statistics that are added up batch by batch."""

import numpy as np
import pytest

from opensora.metrics.frechet import Statistics, frechet_distance

RNG = np.random.default_rng(0)


def whitened(count: int, width: int) -> np.ndarray:
    """Samples whose mean is exactly 0 and whose covariance is exactly the identity."""
    x = RNG.normal(size=(count, width))
    x -= x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False).reshape(width, width))
    return x @ vectors / np.sqrt(values) @ vectors.T


def by_matrix_root(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.linalg import sqrtm

    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real))


def test_one_dimension() -> None:
    x = whitened(500, 1)
    assert frechet_distance(x, 4 * x + 3) == pytest.approx(9 + 9)  # (μ1 − μ2)² + (σ1 − σ2)²


def test_commuting_covariances() -> None:
    x, scale = whitened(300, 6), np.arange(1, 7)
    assert frechet_distance(x, x * scale + 2) == pytest.approx(4 * 6 + np.square(scale - 1).sum())


@pytest.mark.parametrize("count", [8, 40])
def test_identical_sets_are_at_zero_and_order_does_not_matter(count: int) -> None:
    x, y = RNG.normal(size=(count, 16)), RNG.normal(size=(11, 16)) * 3
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)
    turn = np.linalg.qr(RNG.normal(size=(16, 16)))[0]
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(frechet_distance(x, y), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(12, 15), (80, 60), (12, 80)])
def test_all_forms_equal_the_matrix_root(n: int, m: int) -> None:
    """Fewer samples than channels, more, and one set of each; the root of a singular matrix is rough."""
    x, y = RNG.normal(size=(n, 20)), RNG.normal(size=(m, 20)) * 2 + 1
    assert frechet_distance(x, y) == pytest.approx(by_matrix_root(x, y), rel=1e-9 if min(n, m) > 20 else 1e-4)


def test_the_size_at_which_distances_are_taken() -> None:
    mix = RNG.normal(size=(768, 768)) / 28
    x, y = RNG.normal(size=(2048, 768)) @ mix, RNG.normal(size=(2048, 768)) @ mix * 1.1 + 0.1
    assert frechet_distance(x, y) == pytest.approx(by_matrix_root(x, y), abs=1e-6)


def test_dead_channels_and_float32() -> None:
    """A network's channel that is always 0 makes the covariance singular; the others count as without it."""
    x, y = (RNG.normal(size=(200, 12)).astype(np.float32) for _ in range(2))
    expected = frechet_distance(x, y)
    dead = [np.insert(part, [3, 7], 0, axis=1) for part in (x, y)]
    assert frechet_distance(*dead) == pytest.approx(expected, abs=1e-9)
    moved = [part.astype(np.float64) + 1e6 for part in (x, y)]  # where float32 would keep one digit of the differences
    assert frechet_distance(*moved) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("count", [9, 200])
def test_batches_equal_the_whole(count: int) -> None:
    x, y = RNG.normal(size=(count, 16)) + 100, RNG.normal(size=(33, 16))
    whole = Statistics.from_features(x)
    parts = Statistics.from_batches(np.array_split(x, 7))
    assert parts.count == count
    np.testing.assert_allclose(parts.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(parts.covariance, np.cov(x, rowvar=False), atol=1e-10)
    assert parts.root.shape == (min(count, 16), 16)
    assert frechet_distance(parts, y) == pytest.approx(frechet_distance(whole, y), rel=1e-10)


def test_more_samples_than_channels_are_not_kept() -> None:
    import tracemalloc

    batches = (np.random.default_rng(index).normal(size=(500, 8)) for index in range(100))
    tracemalloc.start()
    try:
        statistics = Statistics.from_batches(batches)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert statistics.count == 50_000
    assert peak < 50_000 * 8 * 8 / 4


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.zeros((4, 2)), np.zeros((4, 3)), "of one D, got 2 and 3"),
        (np.zeros((1, 2)), np.zeros((4, 2)), "N ≥ 2, D.* got N 1"),
        (np.zeros((0, 2)), np.zeros((4, 2)), "got N 0"),
        (np.zeros(4), np.zeros((4, 2)), r"must be \[N, D\] of one D, got \[4\]"),
        (np.array([[0, 1], [np.nan, 1], [2, np.inf]]), np.zeros((4, 2)), "2 of 3 samples .* not finite"),
    ],
)
def test_what_cannot_be_compared(first: np.ndarray, second: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(first, second)


def test_batches_of_two_widths() -> None:
    with pytest.raises(ValueError, match=r"got \[3, 2\]"):
        Statistics.from_batches([np.zeros((3, 4)), np.zeros((3, 2))])
