"""Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500), in float64.

N samples, D channels, r = min(N, D). A covariance Σ is kept as a root R [r, D] with RᵀR = Σ. Then

    tr (Σ1 Σ2)^½ = the sum of the singular values of R1 R2ᵀ,

and no matrix root is taken. Where N ≤ D the root is the centred features themselves, so that nothing of D×D appears;
where N > D it is a factor of the covariance, which is summed batch by batch without keeping the features.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of one set of samples."""

    count: int  # samples, N
    mean: np.ndarray  # float64 [D]
    root: np.ndarray  # float64 [r, D]; rootᵀ·root is the covariance, its sum of squares the trace

    @property
    def covariance(self) -> np.ndarray:
        """float64 [D, D], with N − 1 in the denominator."""
        return self.root.T @ self.root

    @classmethod
    def from_features(cls, features: np.ndarray) -> "Statistics":
        """Statistics of features [N, D]; raises ValueError as `from_batches` does."""
        return cls.from_batches([features])

    @classmethod
    def from_batches(cls, batches: Iterable[np.ndarray]) -> "Statistics":
        """Statistics of features that come as batches [B, D]; of more than D of them only their sums are kept.

        Raises:
            ValueError: fewer than two samples, batches of other widths, or values that are not finite.
        """
        sums = _Sums()
        for batch in batches:
            sums.add(np.asarray(batch, np.float64))
        return cls(*sums.finish())


def frechet_distance(first: np.ndarray | Statistics, second: np.ndarray | Statistics) -> float:
    """|μ1 − μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½ of Gaussians fitted to features [N, D] and [M, D], or of statistics.

    0 for equal sets, higher the further apart. It is biased upwards by small N, and its scale is the extractor's:
    values of another N or another extractor are not comparable.

    Raises:
        ValueError: fewer than two samples, other widths, or values that are not finite.
    """
    x, y = (part if isinstance(part, Statistics) else Statistics.from_features(part) for part in (first, second))
    if x.mean.shape != y.mean.shape:
        raise ValueError(f"features must be of one D, got {len(x.mean)} and {len(y.mean)} channels")
    apart = float(np.square(x.mean - y.mean).sum())
    spread = float(np.square(x.root).sum() + np.square(y.root).sum())
    shared = float(np.linalg.svd(x.root @ y.root.T, compute_uv=False).sum())
    return max(0.0, apart + spread - 2 * shared)


class _Sums:
    """Features as they come: kept while there are at most D, then their mean and the sums of their products."""

    def __init__(self) -> None:
        self.count = 0
        self.kept: list[np.ndarray] = []
        self.mean = np.zeros(0)
        self.scatter: np.ndarray | None = None  # Σ (x − mean)(x − mean)ᵀ [D, D]

    def add(self, batch: np.ndarray) -> None:
        width = self.kept[0].shape[1] if self.kept else len(self.mean)
        if batch.ndim != 2 or batch.shape[1] == 0 or (self.count and batch.shape[1] != width):
            expected = f"[N, {width}]" if self.count else "[N, D]"
            raise ValueError(f"features must be {expected} of one D, got {list(batch.shape)}")
        bad = int((~np.isfinite(batch).all(axis=1)).sum())
        if bad:
            raise ValueError(f"{bad} of {len(batch)} samples have features that are not finite")
        if len(batch) == 0:
            return
        if self.scatter is None:
            self.kept.append(batch)
            self.count += len(batch)
            if self.count > batch.shape[1]:
                rows, self.kept = np.concatenate(self.kept), []
                self.mean, self.scatter = rows.mean(0), _products(rows, rows.mean(0))
            return
        mean = batch.mean(0)  # two sets are joined as by Chan, Golub and LeVeque (1979)
        total = self.count + len(batch)
        step = mean - self.mean
        self.scatter += _products(batch, mean) + np.outer(step, step) * (self.count * len(batch) / total)
        self.mean = self.mean + step * (len(batch) / total)
        self.count = total

    def finish(self) -> tuple[int, np.ndarray, np.ndarray]:
        """N, mean and root."""
        if self.count < 2:
            raise ValueError(f"a distance needs features [N ≥ 2, D] of each set, got N {self.count}")
        if self.scatter is not None:
            return self.count, self.mean, _factor(self.scatter / (self.count - 1))
        rows = np.concatenate(self.kept)
        return self.count, rows.mean(0), (rows - rows.mean(0)) / np.sqrt(self.count - 1)


def _products(rows: np.ndarray, mean: np.ndarray) -> np.ndarray:
    centred = rows - mean
    return centred.T @ centred


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A root [r, D] of a covariance [D, D]: Cholesky's, or by eigenvalues where channels depend on each other."""
    try:
        return np.linalg.cholesky(covariance).T
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        real = values > np.finfo(np.float64).eps * len(values) * max(values[-1], 0)
        return np.sqrt(values[real])[:, None] * vectors[:, real].T
