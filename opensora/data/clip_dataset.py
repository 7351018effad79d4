"""Training samples straight from clips: a few frames decoded at the size that they train at.

Shapes: `T` frames of a sample, `H`, `W` frame size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opensora.data.buckets import Bucket, Draw
from opensora.data.clip_reader import ClipError, read_crop
from opensora.data.clip_table import ClipTable
from opensora.data.shards import read_bytes
from opensora.step import StepError


class ClipDataset:
    """Frames and captions of clips, for a VAE and a text encoder inside the training step.

    Attributes:
        clips: the kept clips; a draw names one by its row.
    """

    def __init__(self, folder: Path, shards: Path, buckets: Sequence[Bucket]) -> None:
        """Read the manifest of the caption step in `folder`.

        Args:
            shards: folder of the split step.

        Raises:
            StepError: no clip was kept.
        """
        self.shards, self.buckets = shards, tuple(buckets)
        self.clips = ClipTable(folder, ("shard", "offset", "size", "caption"))

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which is told the rows."""
        return vars(self) | {"clips": None}

    def sample(self, draw: Draw, clip: Mapping[str, Any]) -> dict[str, Any]:
        """One random temporal crop.

        Args:
            clip: the draw's row of `clips`.

        Returns:
            frames uint8 [T, H, W, 3], caption, clip_id, noise_seed, and the draw itself.

        Raises:
            StepError: the shard is missing or short, or the clip cannot be decoded; the message names both.
        """
        bucket, path = self.buckets[draw.bucket], self.shards / clip["shard"]
        crop = draw.crop(clip["frames"], bucket)
        try:
            data = read_bytes(path, clip["offset"], clip["size"], clip["clip_id"])
            frames = read_crop(data, range(crop.start, crop.stop, crop.step), (bucket.height, bucket.width))
        except ClipError as error:
            raise StepError(
                f"clip {clip['clip_id']} in {path} cannot be decoded: {error}; run `opensora split` again"
            ) from error
        return {
            "frames": torch.from_numpy(frames),
            "caption": clip["caption"],
            "clip_id": clip["clip_id"],
            "noise_seed": draw.noise_seed,
            "draw": draw,
        }
