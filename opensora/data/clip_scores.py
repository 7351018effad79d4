"""Scores by CLIP from local weights: how well frames fit a text, and how good they look."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.data.gpu import process_device
from opensora.weights import WeightsError, load_strict, load_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import BaseImageProcessor, CLIPModel, CLIPTokenizer

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
        import torch

        self.device, self.dtype = device, dtype or torch.float32
        self.model, self.processor, self.tokenizer = _load_clip(folder, self.dtype)
        self.model.to(device).eval()
        width = self.model.config.projection_dim
        self.head = read_head(head, width).to(device).eval() if head else None

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
            images = self._embed_images(frames)
            scores: list[dict[str, float]] = [{} for _ in frames]
            if self.head is not None:
                for score, image in zip(scores, images, strict=True):
                    score["aesthetic"] = float(self.head(image).mean())
            told = [index for index, text in enumerate(texts) if text]
            if told:
                features = self._embed_texts([texts[index] for index in told])
                for index, text in zip(told, features, strict=True):
                    scores[index]["text_match"] = float((images[index] @ text).mean())
        return scores

    def text_match(self, frames: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        """Mean cosine of the features of each clip's frames uint8 [P, H, W, 3] and of its text, which is not empty."""
        return [score["text_match"] for score in self(frames, texts)]

    def _embed_images(self, frames: Sequence[np.ndarray]) -> "Sequence[Tensor]":
        """float32 [P, D] of each clip, of length 1."""
        pixels = self.processor(images=[frame for clip in frames for frame in clip], return_tensors="pt").pixel_values
        features = self.model.get_image_features(pixels.to(self.device, self.dtype)).pooler_output
        return _normalise(features).split([len(clip) for clip in frames])

    def _embed_texts(self, texts: Sequence[str]) -> "Tensor":
        """float32 [N, D], of length 1."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return _normalise(self.model.get_text_features(**tokens.to(self.device)).pooler_output)


def _normalise(features: "Tensor") -> "Tensor":
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


def _load_clip(folder: Path, dtype: "torch.dtype") -> "tuple[CLIPModel, BaseImageProcessor, CLIPTokenizer]":
    """Model, image processor that needs no torchvision, and tokenizer."""
    from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = CLIPModel.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # Transformers raises anything for files that are missing, damaged or do not fit
        reason = (str(error).splitlines() or [""])[0]
        raise WeightsError(f"the CLIP in {folder} cannot be loaded: {type(error).__name__}: {reason}") from error
    wrong = [f"missing {name}" for name in sorted(report["missing_keys"])]
    wrong += [
        f"{name} is {list(found)}, expected {list(own)}" for name, found, own in sorted(report["mismatched_keys"])
    ]
    if wrong:  # Transformers would go on with random values
        raise WeightsError(f"the weights in {folder} do not fit a CLIP of both halves: {'; '.join(wrong)}")
    return model, processor, tokenizer


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
