"""Training samples straight from clips: a few frames decoded at the size that they train at.

Shapes: `T` frames of a sample, `H`, `W` frame size.
"""

from collections.abc import Sequence
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

    def sample(self, draw: Draw) -> dict[str, Any]:
        """One random temporal crop.

        Returns:
            frames uint8 [T, H, W, 3], caption, clip_id, noise_seed, and the draw itself.

        Raises:
            StepError: the shard is missing or short, or the clip cannot be decoded; the message names both.
        """
        row, bucket = draw.row, self.buckets[draw.bucket]
        clip_id, shard = self.clips.text("clip_id", row), self.clips.text("shard", row)
        data = read_bytes(
            self.shards / shard, self.clips.number("offset", row), self.clips.number("size", row), clip_id
        )
        crop = draw.crop(int(self.clips.frames[row]), bucket)
        source = int(self.clips.heights[row]), int(self.clips.widths[row])
        try:
            frames = read_crop(data, range(crop.start, crop.stop, crop.step), source, (bucket.height, bucket.width))
        except ClipError as error:
            raise StepError(
                f"clip {clip_id} in {self.shards / shard} cannot be decoded: {error}; run `opensora split` again"
            ) from error
        return {
            "frames": torch.from_numpy(frames),
            "caption": self.clips.text("caption", row),
            "clip_id": clip_id,
            "noise_seed": draw.noise_seed,
            "draw": draw,
        }
