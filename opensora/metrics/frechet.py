"""Fréchet distance between two sets of features (arXiv 1706.08500), in float64."""

import numpy as np


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """|μ1 − μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½ of Gaussians fitted to features [N, D] and [M, D].

    The last trace is the sum of the singular values of Xcᵀ-products, without a matrix root. Values for another N or
    another extractor are not comparable: the distance is biased upwards by small N.

    Raises:
        ValueError: fewer than two samples, or other widths.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"features must be [N ≥ 2, D] of one D, got {list(first.shape)} and {list(second.shape)}")
    x, y = first.astype(np.float64), second.astype(np.float64)
    mean = float(np.square(x.mean(0) - y.mean(0)).sum())
    x = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    y = (y - y.mean(0)) / np.sqrt(len(y) - 1)
    spread = float(np.square(x).sum() + np.square(y).sum())
    if min(len(x), len(y)) > x.shape[1]:
        x, y = (np.asarray(np.linalg.qr(part, mode="r")) for part in (x, y))  # same covariance, D rows instead of N
    cross = float(np.linalg.svd(x @ y.T, compute_uv=False).sum())
    return max(0.0, mean + spread - 2 * cross)
