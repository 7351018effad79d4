"""Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500), in float64.

N samples, D channels, r = min(N, D). A covariance Σ is kept as a root R [r, D] with RᵀR = Σ. Then

    tr (Σ1 Σ2)^½ = the sum of the singular values of R1 R2ᵀ,

and no matrix root is taken. Where N ≤ D the root is the centred features themselves, so that nothing of D×D appears;
where N > D it is a factor of the covariance, which is summed batch by batch without keeping the features.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np

FORMAT = 1  # of a saved file


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of one set of samples, by one extractor."""

    count: int  # samples, N
    mean: np.ndarray  # float64 [D]
    root: np.ndarray  # float64 [r, D]; rootᵀ·root is the covariance, its sum of squares the trace
    extractor: str = ""  # by which the features were made; empty: not told
    data: str = ""  # hash of the samples; empty: not told

    @property
    def covariance(self) -> np.ndarray:
        """float64 [D, D], with N − 1 in the denominator."""
        return self.root.T @ self.root

    @classmethod
    def from_features(cls, features: np.ndarray, extractor: str = "", data: str = "") -> "Statistics":
        """Statistics of features [N, D]; raises ValueError as `from_batches` does."""
        return cls.from_batches([features], extractor, data)

    @classmethod
    def from_batches(cls, batches: Iterable[np.ndarray], extractor: str = "", data: str = "") -> "Statistics":
        """Statistics of features that come as batches [B, D]; of more than D of them only their sums are kept.

        Raises:
            ValueError: fewer than two samples, batches of other widths, or values that are not finite.
        """
        sums = _Sums()
        for batch in batches:
            sums.add(np.asarray(batch, np.float64))
        return cls(*sums.finish(), extractor, data)

    @classmethod
    def from_moments(
        cls, mean: np.ndarray, covariance: np.ndarray, count: int, extractor: str = "", data: str = ""
    ) -> "Statistics":
        """Statistics whose mean [D] and covariance [D, D] are known, as those that others publish.

        Raises:
            ValueError: other shapes, values that are not finite, or a matrix that is no covariance.
        """
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or count < 2:
            raise ValueError(
                f"expected a mean [D], a covariance [D, D] and N ≥ 2, got {list(mean.shape)}, "
                f"{list(covariance.shape)} and N {count}"
            )
        if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
            raise ValueError("mean or covariance holds values that are not finite")
        if not np.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-9 * np.abs(covariance).max(initial=0)):
            raise ValueError("the covariance is not symmetric")
        return cls(count, mean, _factor(covariance), extractor, data)

    def save(self, path: Path) -> None:
        """Write an .npz file; a reader sees the whole of it or none."""
        part = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")
        try:
            with part.open("wb") as handle:
                np.savez(
                    handle,
                    format=FORMAT,
                    count=self.count,
                    mean=self.mean,
                    root=self.root,
                    extractor=self.extractor,
                    data=self.data,
                )
                handle.flush()
                os.fsync(handle.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, extractor: str | None = None, data: str | None = None) -> "Statistics":
        """Read a file of `save`; no code in it is run.

        Args:
            extractor, data: what the file must be of; None: anything.

        Raises:
            FileNotFoundError: there is none.
            ValueError: damaged, of another version, or of another extractor or data; make it again then.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in ("format", "count", "mean", "root", "extractor", "data")}
            version = int(found["format"])
            read = cls(int(found["count"]), found["mean"], found["root"], str(found["extractor"]), str(found["data"]))
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged archive can fail in any way
            raise ValueError(f"{path} is damaged or holds no statistics of features; delete it: {error}") from error
        shapes = read.mean.ndim == 1 and read.root.ndim == 2 and read.root.shape[1:] == read.mean.shape
        finite = shapes and np.isfinite(read.mean).all() and np.isfinite(read.root).all()
        if version != FORMAT or not finite or read.count < 2:
            raise ValueError(
                f"{path} is of another version (format {version}, expected {FORMAT}) or damaged; delete it"
            )
        for name, wanted, has in (("extractor", extractor, read.extractor), ("data", data, read.data)):
            if wanted is not None and wanted != has:
                raise ValueError(f"{path} is of {name} {has!r}, expected {wanted!r}; make it again")
        return read


def frechet_distance(first: np.ndarray | Statistics, second: np.ndarray | Statistics) -> float:
    """|μ1 − μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½ of Gaussians fitted to features [N, D] and [M, D], or of statistics.

    0 for equal sets, higher the further apart. It is biased upwards by small N, and its scale is the extractor's:
    values of another N or another extractor are not comparable.

    Raises:
        ValueError: fewer than two samples, other widths, values that are not finite, or known to be of two extractors.
    """
    x, y = (part if isinstance(part, Statistics) else Statistics.from_features(part) for part in (first, second))
    if x.mean.shape != y.mean.shape:
        raise ValueError(f"features must be of one D, got {len(x.mean)} and {len(y.mean)} channels")
    if x.extractor and y.extractor and x.extractor != y.extractor:
        raise ValueError(f"features of {x.extractor!r} and of {y.extractor!r} do not compare")
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
        noise = np.finfo(np.float64).eps * len(values) * max(values[-1], 0)
        if values[0] < -1e6 * noise:
            raise ValueError(f"no covariance: it has the negative eigenvalue {values[0]:.3g}") from None
        real = values > noise
        return np.sqrt(values[real])[:, None] * vectors[:, real].T
