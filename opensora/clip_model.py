"""CLIP from a local folder (Radford et al. 2021, arXiv 2103.00020): features of frames and of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.weights import WeightsError, first_line, load_pretrained

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ClipModel:
    """Frames or texts in, features of length 1 out: their products are cosines."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: "torch.dtype | None" = None) -> None:
        """Load from local files alone.

        Args:
            folder: CLIP as Transformers saves it, with image processor and tokenizer.
            dtype: in which it computes, null for float32; features are always float32.

        Raises:
            WeightsError: a file is missing or damaged, or tensors do not fit; the message names them.
        """
        import torch
        from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

        self.device, self.dtype = device, dtype or torch.float32
        try:  # `pil` needs no torchvision
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # Transformers raises anything for files that are missing or damaged
            raise WeightsError(f"the CLIP in {folder} cannot be loaded: {first_line(error)}") from error
        self.model = load_pretrained(CLIPModel, folder, self.dtype).to(device)
        self.width: int = self.model.config.projection_dim

    def embed_images(self, frames: Sequence[np.ndarray]) -> "Tensor":
        """float32 [P, D] of uint8 frames [H, W, 3], which may differ in size."""
        pixels = self.processor(images=list(frames), return_tensors="pt").pixel_values
        return _normalise(self.model.get_image_features(pixels.to(self.device, self.dtype)).pooler_output)

    def embed_texts(self, texts: Sequence[str]) -> "Tensor":
        """float32 [N, D] of texts; words past CLIP's 77 tokens are not seen."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return _normalise(self.model.get_text_features(**tokens.to(self.device)).pooler_output)


def _normalise(features: "Tensor") -> "Tensor":
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)
