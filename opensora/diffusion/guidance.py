"""Classifier-free guidance: one batch holds the conditional and the unconditional half (arXiv 2207.12598)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
GuidanceMode = Literal["v1", "full"]
V1_GUIDED_CHANNELS = 3  # the released models guide three of the four latent channels


def guided_prediction(
    model: Denoiser,
    x: Tensor,
    timestep: Tensor,
    y: Tensor,
    null_y: Tensor,
    mask: Tensor | None,
    guidance_scale: float,
    mode: GuidanceMode = "full",
) -> Tensor:
    """Guided output of `model` for latents x [B, c, T, H, W].

    Args:
        model: any callable `model(x, t, y, mask) -> [B, c or 2c, T, H, W]`.
        timestep: [B].
        y, null_y: text and null embeddings [B, 1, L, Cc].
        mask: [B, L] or None; it is used for the null text too, as in training.
        guidance_scale: 1 leaves the conditional prediction as it is, and costs one pass instead of two.
        mode: `full` guides every latent channel, `v1` the first three, as the released models do.

    Returns:
        [B, c or 2c, T, H, W]: the guided prediction; variance channels are the conditional ones.
    """
    if guidance_scale == 1.0:
        return model(x, timestep, y, mask)
    both_masks = None if mask is None else torch.cat([mask, mask])
    out = model(torch.cat([x, x]), torch.cat([timestep, timestep]), torch.cat([y, null_y]), both_masks)
    conditional, unconditional = out.chunk(2)
    guided = V1_GUIDED_CHANNELS if mode == "v1" else x.shape[1]
    base = unconditional[:, :guided]
    return torch.cat([base + guidance_scale * (conditional[:, :guided] - base), conditional[:, guided:]], dim=1)
