"""Training samples from latent shards: temporal crops whose choice is a function of (seed, step, rank) alone.

Shapes: `T` frames, `h`, `w` latent size, `L` text tokens, `Cc` caption channels.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from opensora.manifest import Clip
from opensora.step import StepError

CACHE_LIMIT = 1 << 30  # bytes of latents that are kept in memory
ORDER, CROP, NOISE = 1, 2, 3  # what a seed is for; no two uses share one


class LatentDataset:
    """Latents of the clips that are long enough for `frames` at `interval`.

    Raises:
        StepError: no clip is long enough.
    """

    def __init__(
        self, folder: Path, clips: list[Clip], height: int, width: int, frames: int, interval: int, max_tokens: int
    ) -> None:
        self.folder, self.frames, self.interval, self.max_tokens = folder, frames, interval, max_tokens
        self.key = f"{height}x{width}"
        self.span = (frames - 1) * interval + 1
        self.clips = [clip for clip in clips if clip.frames >= self.span]
        self.excluded = len(clips) - len(self.clips)
        if not self.clips:
            raise StepError(
                f"no clip has the {self.span} frames that {frames} frames at interval {interval} need "
                f"({self.excluded} shorter ones in {folder}); lower frames or frame_interval, or add longer videos"
            )
        self._stack = ExitStack()
        self._shards: dict[str, Any] = {}
        self._cache: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        mean, _, text = self._read(0)
        self.latent_size: tuple[int, int] = (mean.shape[2], mean.shape[3])
        self.caption_channels: int = text.shape[1]
        self._keep = 4 * mean.numel() / mean.shape[0] * sum(clip.frames for clip in self.clips) < CACHE_LIMIT

    def __len__(self) -> int:
        return len(self.clips)

    def _read(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if index in self._cache:
            return self._cache[index]
        clip = self.clips[index]
        if clip.latent_shard not in self._shards:
            shard = safe_open(str(self.folder / clip.latent_shard), "pt")
            self._shards[clip.latent_shard] = self._stack.enter_context(shard)
        shard = self._shards[clip.latent_shard]
        parts = (f"{self.key}/mean", f"{self.key}/std", "text")
        mean, deviation, text = (shard.get_tensor(f"{clip.clip_id}/{part}") for part in parts)
        if getattr(self, "_keep", False):
            self._cache[index] = mean, deviation, text
        return mean, deviation, text

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One random temporal crop, drawn from the posterior.

        Returns:
            latent [4, T, h, w] float32, text [L, Cc] padded with zeros, mask [L], clip_id.
        """
        mean, deviation, text = self._read(index)
        start = int(torch.randint(mean.shape[0] - self.span + 1, (), generator=generator))
        chosen = slice(start, start + self.span, self.interval)
        noise = torch.randn(mean[chosen].shape, generator=generator)
        latent = mean[chosen].float() + deviation[chosen].float() * noise  # [T, 4, h, w]
        padded = torch.zeros(self.max_tokens, text.shape[1])
        padded[: len(text)] = text
        mask = (torch.arange(self.max_tokens) < len(text)).long()
        return {"latent": latent.transpose(0, 1), "text": padded, "mask": mask, "clip_id": self.clips[index].clip_id}


def draw_seed(*parts: int) -> int:
    """A 32-bit seed mixed from numbers such as (seed, step, rank); torch's CPU generator reads no more bits."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def batches(
    dataset: LatentDataset, batch_size: int, seed: int, rank: int, world_size: int, start_step: int
) -> Iterator[dict[str, Any]]:
    """Endless batches from `start_step` on; each epoch visits every clip once, in an order of its own.

    Sample `i` of all (over steps, ranks and places in the batch) is clip `i mod n` of epoch `i div n`'s permutation:
    any step can be drawn without those before it, no two ranks draw the same, and the same samples with the same
    noise come whatever the number of processes. `noise_seed` holds a seed a sample.
    """
    count = len(dataset)
    orders: dict[int, Tensor] = {}
    step = start_step
    while True:
        samples: list[dict[str, Any]] = []
        noise_seeds: list[int] = []
        for place in range(batch_size):
            number = (step * world_size + rank) * batch_size + place
            epoch, position = divmod(number, count)
            if epoch not in orders:
                generator = torch.Generator().manual_seed(draw_seed(seed, epoch, ORDER))
                orders = {epoch: torch.randperm(count, generator=generator)}
            generator = torch.Generator().manual_seed(draw_seed(seed, epoch, position, CROP))
            samples.append(dataset.sample(int(orders[epoch][position]), generator))
            noise_seeds.append(draw_seed(seed, epoch, position, NOISE))
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in ("latent", "text", "mask")}
        yield batch | {"clip_id": [sample["clip_id"] for sample in samples], "noise_seed": noise_seeds}
        step += 1
