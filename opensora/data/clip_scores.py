"""Scores by CLIP from local weights: how well frames fit a text, and how good they look."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.clip_model import ClipModel
from opensora.data.gpu import process_device
from opensora.weights import WeightsError, load_strict, load_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

HEAD_WIDTHS = (1024, 128, 64, 16, 1)  # of LAION's "improved aesthetic predictor"


@cache
def load_scorer(folder: Path, head: Path | None, threads: int = 1) -> "ClipScorer":
    """The scorer of this process, loaded once: on a GPU in bfloat16, else on `threads` of the CPU."""
    import torch

    if torch.cuda.is_available():
        return ClipScorer(folder, head, process_device(), torch.bfloat16)
    torch.set_num_threads(threads)
    return ClipScorer(folder, head)


class ClipScorer:
    """Frames at a few positions of each clip in, scores out (Radford et al. 2021)."""

    def __init__(
        self, folder: Path, head: Path | None = None, device: str = "cpu", dtype: "torch.dtype | None" = None
    ) -> None:
        """Load from local files alone.

        Args:
            folder: CLIP as Transformers saves it, with image processor and tokenizer.
            head: file of a head over the image features: LAION's aesthetic-predictor (`weight`, `bias`) or improved
                aesthetic predictor (`layers.0.weight` …); both want CLIP ViT-L/14.
            dtype: in which CLIP computes, null for float32; the head always computes in float32.

        Raises:
            WeightsError: a file is missing or damaged, or tensors do not fit; the message names them.
        """
        self.clip = ClipModel(folder, device, dtype)
        self.head = read_head(head, self.clip.width).to(device).eval() if head else None

    def __call__(self, frames: Sequence[np.ndarray], texts: Sequence[str]) -> list[dict[str, float]]:
        """Scores of each clip: `aesthetic` with a head, `text_match` where its text is not empty.

        Args:
            frames: of each clip, uint8 [P, H, W, 3].
            texts: of each clip; words past CLIP's 77 tokens are not seen.
        """
        import torch

        if not frames:
            return []
        with torch.inference_mode():
            features = self.clip.embed_images([frame for clip in frames for frame in clip])
            images = features.split([len(clip) for clip in frames])
            scores: list[dict[str, float]] = [{} for _ in frames]
            if self.head is not None:
                for score, image in zip(scores, images, strict=True):
                    score["aesthetic"] = float(self.head(image).mean())
            told = [index for index, text in enumerate(texts) if text]
            if told:
                for index, text in zip(told, self.clip.embed_texts([texts[index] for index in told]), strict=True):
                    scores[index]["text_match"] = float((images[index] @ text).mean())
        return scores

    def text_match(self, frames: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        """Mean cosine of the features of each clip's frames uint8 [P, H, W, 3] and of its text, which is not empty."""
        return [score["text_match"] for score in self(frames, texts)]


def read_head(path: Path, width: int) -> "nn.Module":
    """A head over image features [..., width] of length 1, giving a score [..., 1] of about 1…10.

    Raises:
        WeightsError: names the tensors that are missing, unexpected or of another shape.
    """
    from torch import nn

    state = load_tensors(path)
    module: nn.Module = nn.Linear(width, 1)
    if "weight" not in state:  # no non-linearity between the layers, as published
        sizes = (width, *HEAD_WIDTHS)
        first, second, third, fourth, fifth = (nn.Linear(before, after) for before, after in pairwise(sizes))
        drop = nn.Dropout()  # counted in the names of the layers
        layers = nn.Sequential(first, drop, second, drop, third, drop, fourth, fifth)
        module = nn.Sequential(OrderedDict(layers=layers))
    try:
        load_strict(module, state)
    except WeightsError as error:
        raise WeightsError(f"{path} is no aesthetic head over {width} features of CLIP: {error}") from error
    return module
