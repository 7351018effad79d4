"""Classifier-free guidance: one batch holds the conditional and the unconditional half (arXiv 2207.12598)."""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

# `model(x, t, y, mask) -> [B, c or 2c, T, H, W]`, any callable. One that has a method `encode_text(y, mask)` is asked
# once a prompt for what it makes of the text, and gets that in the place of `y` at every step.
Denoiser = Callable[..., Tensor]
Predictor = Callable[[Tensor, Tensor], Tensor]
GuidanceMode = Literal["v1", "full"]


class StepNoise(Protocol):
    """What replaces the noise that a sampler draws: item `i` [B or more, c, T, H, W] the i-th draw."""

    def __getitem__(self, number: int, /) -> Tensor: ...


V1_GUIDED_CHANNELS = 3  # the released models guide three of the four latent channels


def working_dtype(z: Tensor) -> torch.dtype:
    """The type that samplers compute in: float32, or float64 where the noise `z` is; never half."""
    return torch.promote_types(z.dtype, torch.float32)


def guided(
    model: Denoiser,
    z: Tensor,
    y: Tensor,
    null_y: Tensor,
    mask: Tensor | None,
    guidance_scale: float,
    mode: GuidanceMode,
) -> Predictor:
    """The guided model as a function `predict(x, timestep) -> [B, c or 2c, T, H, W]` of one set of prompts.

    Args:
        model: see `Denoiser`. It gets latents in the type of `z` and timesteps in float32.
        z: the noise [B, c, T, H, W] that sampling starts from.
        y, null_y: text and null embeddings [B, 1, L, Cc]; one row of `null_y` serves all.
        mask: [B, L] or None; it is used for the null text too, as in training, where a dropped caption keeps its mask.
        guidance_scale: 1 leaves the conditional prediction as it is, and costs one pass instead of two.
        mode: `full` guides every latent channel, `v1` the first three, as the released models do. Variance channels
            are always the conditional ones.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("v1", "full"):
        raise ValueError(f"unknown guidance mode {mode!r}; one of v1, full")
    dtype, plain = working_dtype(z), guidance_scale == 1.0
    channels = V1_GUIDED_CHANNELS if mode == "v1" else z.shape[1]
    # The order in which the released samplers lay the halves, so that even rounding is theirs.
    null_first = mode == "full"
    null_y = null_y.to(y.dtype).expand_as(y)
    text = y if plain else torch.cat([null_y, y] if null_first else [y, null_y])
    rows = mask if plain or mask is None else torch.cat([mask, mask])
    encode_text = getattr(model, "encode_text", None)
    if encode_text is not None:
        text, rows = encode_text(text, rows), None

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        x = x.to(z.dtype) if plain else torch.cat([x, x]).to(z.dtype)
        out = model(x, timestep.float().expand(len(x)), text, rows).to(dtype)
        if plain:
            return out
        unconditional, conditional = out.chunk(2) if null_first else reversed(out.chunk(2))
        base = unconditional[:, :channels]
        moved = base + guidance_scale * (conditional[:, :channels] - base)
        return torch.cat([moved, conditional[:, channels:]], dim=1)

    return predict
