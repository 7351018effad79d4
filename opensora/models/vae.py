"""The image VAE, applied frame by frame (Latent Diffusion, arXiv 2112.10752), through diffusers.

Shapes: `M` frames, `B` batch, `T` frames a clip, `h`, `w` latent size.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class FrameVAE:
    """An AutoencoderKL from a local folder; latents are scaled to a spread of about one."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=dtype, low_cpu_mem_usage=False)
        self.vae = vae.to(device).eval()
        self.device, self.dtype = device, dtype
        self.factor: float = self.vae.config.scaling_factor
        self.scale: int = 2 ** (len(self.vae.config.block_out_channels) - 1)  # pixels a latent column

    @torch.no_grad()
    def encode(self, frames: np.ndarray, micro_batch: int = 64) -> tuple[Tensor, Tensor]:
        """uint8 [M, H, W, 3] -> scaled mean and standard deviation, both [M, 4, h, w] float32 on the CPU."""
        means, deviations = [], []
        for start in range(0, len(frames), micro_batch):
            pixels = torch.from_numpy(frames[start : start + micro_batch]).to(self.device).permute(0, 3, 1, 2)
            posterior = self.vae.encode(pixels.to(self.dtype) / 127.5 - 1).latent_dist
            means.append(posterior.mean.float().cpu() * self.factor)
            deviations.append(posterior.std.float().cpu() * self.factor)
        return torch.cat(means), torch.cat(deviations)

    @torch.no_grad()
    def decode(self, latents: Tensor, micro_batch: int = 64) -> np.ndarray:
        """Scaled latents [B, 4, T, h, w] -> uint8 [B, T, H, W, 3]."""
        batch, _, frames = latents.shape[:3]
        flat = latents.transpose(1, 2).flatten(0, 1) / self.factor  # [B·T, 4, h, w]
        parts = []
        for part in flat.split(micro_batch):
            pixels = self.vae.decode(part.to(self.device, self.dtype)).sample.float()
            parts.append(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu())
        return torch.cat(parts).unflatten(0, (batch, frames)).numpy()
