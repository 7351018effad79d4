"""The tiny VAE of the embedded world: four times smaller latents, because eight times blurs shapes of 32 pixels.

A linear map must read the mean colour of the pixels from each latent. Without it a small VAE hides colours in edges or
puts them on one line, where a small error of the diffusion model turns green into blue.

Shapes: `M` frames, `B` batch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SMALL = 32  # pixels, the small size that training stages use; crops have it too
LEARNING_RATE = 6e-3  # falls linearly to zero
KL_WEIGHT = 2.5e-2
HALVED, CROPPED = 2, 2  # frames a batch, scaled down to `SMALL` or cut out round the object; few, for many steps
MEASURED = 512  # frames that the latents' spread is measured on


def build_vae() -> "AutoencoderKL":
    """An untrained VAE [B, 3, H, W] -> latents [B, 4, H/4, W/4]."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def train_vae(
    frames: Tensor, *, steps: int, seed: int, progress: Callable[[int, float], None] | None = None
) -> "AutoencoderKL":
    """Train a VAE on frames uint8 [M, 3, H, W] with H = W ≥ 32; its scaling factor gives latents a spread of one.

    Args:
        steps: optimizer steps.
        seed: of the weights and of every draw.
        progress: called with the steps done and the loss.

    Raises:
        ValueError: `frames` is not of that shape or type.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or min(frames.shape[2:]) < SMALL:
        raise ValueError(
            f"frames must be uint8 [M, 3, H, W] of at least {SMALL} pixels, got {frames.dtype} {list(frames.shape)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = build_vae()
        colours = nn.Conv2d(vae.config.latent_channels, 3, 1)
        rng = np.random.default_rng(seed)
        optimizer = torch.optim.AdamW(
            [*vae.parameters(), *colours.parameters()],
            lr=LEARNING_RATE,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps)
        )
        vae.train()
        for step in range(steps):
            loss = _loss(vae, colours, _batch(frames, rng))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, loss.item())
    vae.eval()
    vae.register_to_config(scaling_factor=1.0 / _spread(vae, frames, rng))
    return vae


def _loss(vae: "AutoencoderKL", colours: nn.Conv2d, pixels: Tensor) -> Tensor:
    """Errors of the reconstruction and of the colours read from the latents, and the KL term a pixel [B, 3, H, W]."""
    posterior = vae.encode(pixels).latent_dist  # float32: processors without bf16 need twenty times as long for bf16
    latents = posterior.sample()
    means = F.adaptive_avg_pool2d(pixels, latents.shape[-2:])
    kl = posterior.kl().mean() / pixels[0].numel()
    return _error(vae.decode(latents).sample, pixels) + _error(colours(latents), means) + KL_WEIGHT * kl


def _error(made: Tensor, pixels: Tensor) -> Tensor:
    """Mean absolute plus mean squared error."""
    error = made - pixels
    return error.abs().mean() + error.square().mean()


def _batch(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """Frames [4, 3, 32, 32] in −1…1, scaled down or cut out round the object."""
    size = frames.shape[-1]
    chosen = torch.from_numpy(rng.integers(len(frames), size=HALVED + CROPPED))
    halved, cut = (frames[chosen].float() / 127.5 - 1).split([HALVED, CROPPED])
    crops = []
    for frame in cut:
        row, column = _object_centre(frame)
        top = int(np.clip(row - SMALL // 2 + rng.integers(-SMALL // 2, SMALL // 2 + 1), 0, size - SMALL))
        left = int(np.clip(column - SMALL // 2 + rng.integers(-SMALL // 2, SMALL // 2 + 1), 0, size - SMALL))
        crops.append(frame[:, top : top + SMALL, left : left + SMALL])
    return torch.cat([F.interpolate(halved, size=(SMALL, SMALL), mode="area"), torch.stack(crops)])


def _object_centre(frame: Tensor) -> tuple[int, int]:
    """Row and column of the centre of what is most colourful in a frame [3, H, W]."""
    chroma = frame.amax(0) - frame.amin(0)
    rows, columns = torch.nonzero(chroma >= 0.5 * chroma.max(), as_tuple=True)
    return int(rows.float().mean()), int(columns.float().mean())


@torch.no_grad()
def _spread(vae: "AutoencoderKL", frames: Tensor, rng: np.random.Generator) -> float:
    """Standard deviation of the latents of some frames."""
    chosen = torch.from_numpy(rng.integers(len(frames), size=MEASURED))
    parts = [vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in frames[chosen].split(32)]
    return float(torch.cat(parts).std())
