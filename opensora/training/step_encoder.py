"""Encoding inside the training step, for training straight from clips instead of the encode step's shards.

Shapes: `B` batch, `T` frames, `C` latent channels, `h`, `w` latent size, `H`, `W` frame size, `L` text tokens,
`Cc` caption channels.
"""

from pathlib import Path
from typing import Any

import torch

from opensora.config import EncodeConfig
from opensora.data.dataset import pad_text
from opensora.models.text import TextEncoder
from opensora.models.vae import FrameVAE


class StepEncoder:
    """The frozen VAE and text encoder of one training process.

    Draws of the same clip and crop give the latents that the encode step's shards give, up to the rounding of
    `encode.store_dtype`: the same frames, the same posterior, and the same noise drawn from it.
    """

    def __init__(self, config: EncodeConfig, vae: Path, text: Path, device: torch.device) -> None:
        """Load both; raises WeightsError when a folder holds none, or a damaged one."""
        dtype = getattr(torch, config.dtype)
        self.config = config
        self.vae = FrameVAE(vae, str(device), dtype)
        self.text = TextEncoder(text, str(device), dtype)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of `ClipDataset`, frames uint8 [B, T, H, W, 3], with what one of `LatentDataset` has instead.

        Frames go through the VAE by micro-batches of `encode.batch_frames`.

        Returns:
            latent [B, C, T, h, w] float32, text [B, L, Cc], mask [B, L], clip_id, noise_seed.
        """
        frames = batch["frames"]
        moments = self.vae.encode(frames.flatten(0, 1).numpy(), self.config.batch_frames)
        means, deviations = (moment.unflatten(0, frames.shape[:2]) for moment in moments)  # [B, T, C, h, w]
        noise = torch.stack([torch.from_numpy(draw.posterior_noise(means.shape[1:])) for draw in batch["draw"]])
        latent = (means + deviations * noise).transpose(1, 2)
        embeddings, masks = self.text.encode(batch["caption"], self.config.max_tokens)
        lengths = masks.sum(1).tolist()
        texts = [
            pad_text(row[:length], self.config.max_tokens) for row, length in zip(embeddings, lengths, strict=True)
        ]
        padded, mask = (torch.stack(parts) for parts in zip(*texts, strict=True))
        kept = {name: batch[name] for name in ("clip_id", "noise_seed")}
        return kept | {"latent": latent, "text": padded, "mask": mask}
