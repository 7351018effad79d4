"""Rectified flow: straight paths from data to noise, sampled by Euler steps (arXiv 2209.03003, 2403.03206).

`t` runs from 0 (data) to 1 (noise): x_t = (1 − t)·x0 + t·noise, and the model predicts noise − x0.
The model itself sees t·1000, the scale of the discrete schedules.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.diffusion.guidance import Denoiser, GuidanceMode, StepNoise, guided, working_dtype

TIMESTEP_SCALE = 1000.0


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """t' = s·t / (1 + (s − 1)·t): s > 1 spends more of the path near noise, as more pixels need (arXiv 2403.03206)."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class RectifiedFlow:
    """Training loss and Euler sampler, both under the same timestep shift."""

    num_sampling_steps: int = 30
    shift: float = 1.0  # timestep shift of training and sampling

    def sample_timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        """Shifted uniform times [batch] in (0, 1), on the generator's device."""
        return shift_timesteps(torch.rand(batch, generator=generator, device=generator.device), self.shift)

    def training_losses(
        self, model: Denoiser, x0: Tensor, t: Tensor, noise: Tensor, y: Tensor, mask: Tensor | None
    ) -> dict[str, Tensor]:
        """Mean squared error of the velocity, a sample: {"loss": [B]}.

        Args:
            x0: clean latents [B, c, T, H, W].
            t: times [B] in 0…1, already shifted.
            noise: like x0.
            y, mask: text [B, 1, L, Cc] and its mask [B, L] or None.
        """
        at = t.float()[:, None, None, None, None]
        x_t = (1 - at) * x0 + at * noise
        velocity = model(x_t, t.float() * TIMESTEP_SCALE, y, mask)[:, : x0.shape[1]]
        return {"loss": (velocity - (noise - x0)).square().flatten(1).mean(1)}

    def times(self) -> Tensor:
        """The shifted times of the sampler, from 1 to 0: [num_sampling_steps + 1]."""
        return shift_timesteps(torch.linspace(1, 0, self.num_sampling_steps + 1), self.shift)

    @torch.no_grad()
    def sample(
        self,
        model: Denoiser,
        z: Tensor,
        y: Tensor,
        null_y: Tensor,
        mask: Tensor | None = None,
        guidance_scale: float = 7.0,
        guidance_mode: GuidanceMode = "full",
        step_noise: StepNoise | None = None,
    ) -> Tensor:
        """Latents [B, c, T, H, W] from noise `z` by Euler steps; no noise is drawn, so `step_noise` is not read."""
        predict = guided(model, z, y, null_y, mask, guidance_scale, guidance_mode)
        times = self.times().to(z.device)
        x = z.to(working_dtype(z))
        for now, then in zip(times[:-1], times[1:], strict=True):
            x = x + (then - now) * predict(x, now * TIMESTEP_SCALE)[:, : z.shape[1]]
        return x.to(z.dtype)
