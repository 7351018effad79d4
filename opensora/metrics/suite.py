"""All measures of a clip in one place, and the means and distances of many clips."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opensora.metrics.features import EXTRACTOR, randconv_features
from opensora.metrics.frechet import frechet_distance
from opensora.metrics.motion import dynamic_degree, flicker, motion_smoothness


class Suite:
    """The measures that this machine's weights allow.

    Attributes:
        names: extractors of features in use.
        absent: what is not measured, and why.
    """

    def __init__(self, names: tuple[str, ...], absent: dict[str, str]) -> None:
        self.names, self.absent = names, absent

    @classmethod
    def load(
        cls,
        videomae: Path | None = None,
        i3d: Path | None = None,
        inception: Path | None = None,
        clip: Path | None = None,
    ) -> "Suite":
        """Load what there are weights for."""
        return cls((EXTRACTOR,), {})

    def clip(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """Scalars of a clip uint8 [T, H, W, 3], and its features by extractor."""
        return {
            "flicker": flicker(frames),
            "dynamic_degree": dynamic_degree(frames),
            "motion_smoothness": motion_smoothness(frames),
            "features": self.reference(frames),
        }

    def reference(self, frames: np.ndarray) -> dict[str, list[float]]:
        """Features alone, by extractor."""
        return {EXTRACTOR: randconv_features(frames[None])[0].tolist()}

    def summary(
        self, rows: Sequence[Mapping[str, Any]], reference: Mapping[str, np.ndarray] | None
    ) -> dict[str, float]:
        """Means over the rows of `clip`, and Fréchet distances to features [N, D] of real clips."""
        names = [name for name in rows[0] if name != "features"]
        means = {name: float(np.mean([row[name] for row in rows])) for name in names}
        if reference and len(rows) > 1:
            made = np.array([row["features"][EXTRACTOR] for row in rows])
            means[f"fd_{EXTRACTOR}"] = frechet_distance(made, reference[EXTRACTOR])
        return means
