"""Training samples from latent shards: temporal crops, drawn from the VAE's posterior.

Shapes: `B` batch, `T` frames, `h`, `w` latent size, `L` text tokens, `Cc` caption channels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.data.buckets import Bucket, Draw
from opensora.data.clip_table import TEXT_KEY, ClipTable
from opensora.data.shards import TensorFiles, latent_names

KEEP_BYTES = 1 << 30  # latents of a data set that is smaller stay in memory


class LatentDataset:
    """What the encode step wrote, as samples of buckets whose sizes are among `encode.sizes`.

    Attributes:
        clips: the kept clips; a draw names one by its row.
        latent_size: h, w of the first bucket.
    """

    def __init__(self, folder: Path, buckets: Sequence[Bucket], max_tokens: int) -> None:
        """Read the manifest of the encode step in `folder`.

        Raises:
            StepError: no clip was kept, or the first one's latents are not there.
        """
        self.buckets, self.max_tokens = tuple(buckets), max_tokens
        self.clips = ClipTable(folder, ("latent_shard", "text_shard", TEXT_KEY))
        self._files = TensorFiles(folder)
        shape = self._files.shape(self.clips.text("latent_shard", 0), self._names(0, self.buckets[0])[0])
        self.latent_size: tuple[int, int] = (shape[2], shape[3])
        size = sum(shape[1] * shape[2] * shape[3] * 4 for _ in self.buckets) * int(self.clips.frames.sum(dtype=int))
        self._kept: dict[tuple[int, int], list[Tensor]] | None = {} if size < KEEP_BYTES else None

    def _names(self, row: int, bucket: Bucket) -> tuple[str, str]:
        return latent_names(self.clips.text("clip_id", row), bucket.height, bucket.width)

    def sample(self, draw: Draw) -> dict[str, Any]:
        """One random temporal crop, drawn from the posterior.

        Returns:
            latent [4, T, h, w] float32, text [L, Cc] padded with zeros, mask [L], clip_id, noise_seed.

        Raises:
            StepError: a shard lacks the clip, or is missing or damaged; the message names both.
        """
        crop = draw.crop(int(self.clips.frames[draw.row]), self.buckets[draw.bucket])
        mean, deviation = self._moments(draw, crop)  # both [T, 4, h, w]
        latent = mean.float() + deviation.float() * torch.from_numpy(draw.posterior_noise(mean.shape))
        text = self._files.read(self.clips.text("text_shard", draw.row), self.clips.text(TEXT_KEY, draw.row))
        padded, mask = pad_text(text, self.max_tokens)
        return {
            "latent": latent.transpose(0, 1),
            "text": padded,
            "mask": mask,
            "clip_id": self.clips.text("clip_id", draw.row),
            "noise_seed": draw.noise_seed,
        }

    def _moments(self, draw: Draw, crop: slice) -> list[Tensor]:
        names = self._names(draw.row, self.buckets[draw.bucket])
        file = self.clips.text("latent_shard", draw.row)
        if self._kept is None:
            stretch = slice(crop.start, crop.stop)
            return [self._files.read(file, name, stretch)[:: crop.step] for name in names]
        key = (draw.row, draw.bucket)
        if key not in self._kept:
            self._kept[key] = [self._files.read(file, name) for name in names]
        return [tensor[crop] for tensor in self._kept[key]]


def pad_text(text: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Embeddings [n, Cc], n ≤ L, as [L, Cc] float32 padded with zeros, and their mask [L]."""
    padded = torch.zeros(length, text.shape[1])
    padded[: len(text)] = text
    return padded, (torch.arange(length) < len(text)).long()
