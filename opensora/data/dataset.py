"""Training samples from latent shards: temporal crops, drawn from the VAE's posterior.

Shapes: `B` batch, `T` frames, `h`, `w` latent size, `L` text tokens, `Cc` caption channels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.data.buckets import Bucket, Draw
from opensora.data.clip_table import TEXT_KEY, ClipTable
from opensora.data.shards import TensorFiles, latent_names

KEEP_BYTES = 1 << 30  # latents of a data set that is smaller stay in memory, where the training process reads


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
        first = self.clips.row(0)
        shape = self._files.shape(first["latent_shard"], self._names(first, self.buckets[0])[0])
        self.latent_size: tuple[int, int] = (shape[2], shape[3])
        sizes = {(bucket.height, bucket.width) for bucket in buckets}
        size = len(sizes) * shape[1] * shape[2] * shape[3] * 4 * int(self.clips.frames.sum(dtype=int))
        self._kept: dict[str, Tensor] | None = {} if size < KEEP_BYTES else None

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which is told the rows, and reads from the pages that all processes share."""
        return vars(self) | {"clips": None, "_kept": None}

    def _names(self, clip: Mapping[str, Any], bucket: Bucket) -> tuple[str, str]:
        return latent_names(clip["clip_id"], bucket.height, bucket.width)

    def sample(self, draw: Draw, clip: Mapping[str, Any]) -> dict[str, Any]:
        """One random temporal crop, drawn from the posterior.

        Args:
            clip: the draw's row of `clips`.

        Returns:
            latent [4, T, h, w] float32, text [L, Cc] padded with zeros, mask [L], clip_id, noise_seed.

        Raises:
            StepError: a shard lacks the clip, or is missing or damaged; the message names both.
        """
        bucket = self.buckets[draw.bucket]
        crop = draw.crop(clip["frames"], bucket)
        mean, deviation = (self._read(clip["latent_shard"], name, crop) for name in self._names(clip, bucket))
        latent = mean.float() + deviation.float() * torch.from_numpy(draw.posterior_noise(mean.shape))  # [T, 4, h, w]
        padded, mask = pad_text(self._files.read(clip["text_shard"], clip[TEXT_KEY]), self.max_tokens)
        return {
            "latent": latent.transpose(0, 1),
            "text": padded,
            "mask": mask,
            "clip_id": clip["clip_id"],
            "noise_seed": draw.noise_seed,
        }

    def _read(self, file: str, name: str, crop: slice) -> Tensor:
        if self._kept is None:
            return self._files.read(file, name, slice(crop.start, crop.stop))[:: crop.step]
        if name not in self._kept:
            self._kept[name] = self._files.read(file, name)
        return self._kept[name][crop]


def pad_text(text: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Embeddings [n, Cc], n ≤ L, as [L, Cc] float32 padded with zeros, and their mask [L]."""
    padded = torch.zeros(length, text.shape[1])
    padded[: len(text)] = text
    return padded, (torch.arange(length) < len(text)).long()
