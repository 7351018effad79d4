"""How well a clip shows its prompt, and how steady its content is, by a CLIP from a local folder."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.clip_model import ClipModel
from opensora.weights import hash_model

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 32  # frames at once


class ClipScore:
    """CLIP score (Hessel et al. 2021, arXiv 2104.08718) and temporal consistency of clips."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Load CLIP from local files alone; raises WeightsError where they are missing, damaged or do not fit."""
        self.clip = ClipModel(folder, device)
        self.sha256 = hash_model(folder)

    def __call__(self, frames: np.ndarray, prompt: str) -> dict[str, float]:
        """Scores of one clip uint8 [T, H, W, 3]; what cannot be told is absent.

        `clip_score`, with a prompt: 100 · max(cos, 0) of the features of a frame and of the prompt, the mean over all
        frames: 0…100, and about 20…35 for real clips and captions. Words past CLIP's 77 tokens are not seen.

        `clip_temporal_consistency`, of two frames and more: the mean cosine of the image features of consecutive
        frames: −1…1, and 1 for a frozen video. Read it beside a measure of motion.
        """
        import torch

        with torch.inference_mode():
            images = self._embed(frames)
            scores: dict[str, float] = {}
            if prompt:
                cosines = images @ self.clip.embed_texts([prompt])[0]
                scores["clip_score"] = float(100 * cosines.clamp(min=0).mean())
            if len(frames) > 1:
                scores["clip_temporal_consistency"] = float((images[1:] * images[:-1]).sum(1).mean())
        return scores

    def _embed(self, frames: np.ndarray) -> "Tensor":
        """float32 [T, D], of length 1."""
        import torch

        batches = [list(frames[start : start + BATCH]) for start in range(0, len(frames), BATCH)]
        return torch.cat([self.clip.embed_images(batch) for batch in batches])
