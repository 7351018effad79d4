"""All measures of generated clips that this machine has weights for, and the reasons why others are absent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opensora.metrics.clip_score import ClipScore
from opensora.metrics.features import (
    Extractor,
    load_i3d,
    load_image_encoder,
    load_inception,
    load_randconv,
    load_videomae,
)
from opensora.metrics.frechet import Statistics, frechet_distance
from opensora.metrics.motion import dynamic_degree, flicker, flow_degree, motion_smoothness

Reference = Mapping[str, np.ndarray]  # features [M, P·D] of real clips by extractor
MOTION = {
    "flicker": flicker,
    "dynamic_degree": dynamic_degree,
    "motion_smoothness": motion_smoothness,
    "flow_degree": flow_degree,
}
BY_CLIP = ("clip_score", "clip_temporal_consistency")


@dataclass(frozen=True)
class Distance:
    """A Fréchet distance and what it is of: values of another N or of other weights do not compare."""

    extractor: str
    sha256: str  # of the extractor's weights
    n: int = 0  # samples of generated clips; of an encoder of images frames
    reference_n: int = 0  # of real ones
    value: float | None = None
    absent: str = ""  # why there is no value


class Suite:
    """The measures of generated clips that this machine has the weights for."""

    def __init__(
        self, extractors: Sequence[Extractor], clip_score: ClipScore | None, absent: Mapping[str, str]
    ) -> None:
        self.extractors = {extractor.name: extractor for extractor in extractors}
        self.clip_score = clip_score
        self.absent = dict(absent)  # metrics that are not measured, and why
        self.names = tuple(self.extractors)

    @classmethod
    def load(
        cls,
        videomae: Path | None = None,
        i3d: Path | None = None,
        inception: Path | None = None,
        clip: Path | None = None,
        device: str | None = None,
    ) -> "Suite":
        """Load what is given; what is None is absent. Features of a random network need nothing.

        Args:
            videomae: folder of a VideoMAE.
            i3d: state dict of I3D.
            inception: state dict of Inception-v3, or folder of another encoder of images, which names its FID.
            clip: folder of a CLIP.
            device: as torch names it; None: a GPU if there is one.

        Raises:
            WeightsError: weights that are given are missing, damaged, or do not fit.
        """
        import torch

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        extractors = [load_randconv()]
        absent: dict[str, str] = {}
        given: dict[str, tuple[Path | None, Callable[[Path, str], Extractor], str]] = {
            "videomae": (videomae, load_videomae, "fvd_videomae"),
            "i3d": (i3d, load_i3d, "fvd_i3d"),
            "inception": (inception, _load_frames, "fid"),
        }
        for field, (path, load, metric) in given.items():
            if path is not None:
                extractors.append(load(path, device))
            else:
                absent[metric] = f"evaluate.{field} is not set"
        if clip is None:
            absent |= dict.fromkeys(BY_CLIP, "evaluate.clip is not set")
        return cls(extractors, ClipScore(clip, device) if clip is not None else None, absent)

    def clip(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """All measures of one clip uint8 [T, H, W, 3], as JSON takes them: numbers, and features by extractor.

        A picture (T 1) has no measures of motion: a flicker of 1 would look like praise.
        """
        row: dict[str, Any] = {}
        if len(frames) > 1:
            row |= {name: measure(frames) for name, measure in MOTION.items()}
        if self.clip_score is not None:
            row |= self.clip_score(frames, prompt)
        return row | {"features": self.reference(frames)}

    def reference(self, frames: np.ndarray) -> dict[str, list[float]]:
        """Features of one clip by extractor; positions of a clip, P × D numbers, come one after another."""
        return {
            name: extractor(frames).ravel().tolist()
            for name, extractor in self.extractors.items()
            if len(frames) >= extractor.min_frames
        }

    def summary(self, rows: Sequence[Mapping[str, Any]], reference: Reference | None) -> dict[str, float]:
        """Means of the clips' numbers, and the Fréchet distances that can be taken; what cannot be measured is absent.

        Args:
            rows: of `clip`; whatever else is in them is passed over.
            reference: None: no distances.
        """
        values = {name: [row[name] for row in rows if row.get(name) is not None] for name in (*MOTION, *BY_CLIP)}
        means = {name: float(np.mean(found)) for name, found in values.items() if found}
        distances = self.distances(rows, reference)
        return means | {name: found.value for name, found in distances.items() if found.value is not None}

    def distances(self, rows: Sequence[Mapping[str, Any]], reference: Reference | None) -> dict[str, Distance]:
        """By metric: each Fréchet distance with what it is of, or why it is absent."""
        return {extractor.metric: _distance(extractor, rows, reference) for extractor in self.extractors.values()}


def _load_frames(path: Path, device: str) -> Extractor:
    return load_image_encoder(path, device) if path.is_dir() else load_inception(path, device)


def _distance(extractor: Extractor, rows: Sequence[Mapping[str, Any]], reference: Reference | None) -> Distance:
    about = Distance(extractor.name, extractor.sha256)
    real = (reference or {}).get(extractor.name)
    if real is None:
        return replace(about, absent="there are no reference clips")
    made = [row["features"][extractor.name] for row in rows if extractor.name in row["features"]]
    if len(made) < len(rows):
        short = f"{len(rows) - len(made)} of {len(rows)} clips have fewer than {extractor.min_frames} frames"
        return replace(about, absent=short)
    try:
        first = _statistics(extractor, made)
        second = _statistics(extractor, [real])
        value = frechet_distance(first, second)
    except ValueError as error:  # features that are not finite, or too few of them
        return replace(about, absent=str(error))
    return replace(about, value=value, n=first.count, reference_n=second.count)


def _statistics(extractor: Extractor, features: Sequence[Sequence[float] | np.ndarray]) -> Statistics:
    """Of features whose positions come one after another."""
    return Statistics.from_batches(np.asarray(part, np.float64).reshape(-1, extractor.width) for part in features)
