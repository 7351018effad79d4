"""DPM-Solver++, second order, multistep: few steps through the same model as IDDPM's (arXiv 2211.01095).

The solver works with the predicted data and in λ = log(α / σ), half the log of the signal-to-noise ratio.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from opensora.diffusion.guidance import Denoiser, GuidanceMode, StepNoise, guided, working_dtype
from opensora.diffusion.schedule import NUM_TIMESTEPS, cumulative_alphas

MIN_STEPS_SECOND_ORDER = 10  # with fewer steps the last one is of first order, which is steadier


class Grid(NamedTuple):
    """The solver's times from noise to data, [steps + 1] each, float32 on one device."""

    timesteps: Tensor  # what the model sees, 0…999, fractional
    alphas: Tensor
    sigmas: Tensor
    half_log_snr: Tensor  # λ


@lru_cache(maxsize=64)
def grid(steps: int, device: torch.device) -> Grid:
    """Times spaced evenly from 1 to 1/1000, log α interpolated linearly between the 1,000 timesteps.

    All of it in float32, as in the released sampler: twenty steps under strong guidance make a rounding error of λ
    some hundred times larger.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"the number of sampling steps must be 1 or more, got {steps}")
    known = torch.linspace(0, 1, NUM_TIMESTEPS + 1)[1:]
    logs = (0.5 * cumulative_alphas().log()).float()
    times = torch.linspace(1, 1 / NUM_TIMESTEPS, steps + 1)
    low = (torch.searchsorted(known, times) - 1).clamp(0, NUM_TIMESTEPS - 2)
    slope = (logs[low + 1] - logs[low]) / (known[low + 1] - known[low])
    log_alphas = logs[low] + (times - known[low]) * slope
    variances = 1 - (2 * log_alphas).exp()
    timesteps = (times - 1 / NUM_TIMESTEPS) * NUM_TIMESTEPS
    values = Grid(timesteps, log_alphas.exp(), variances.sqrt(), log_alphas - 0.5 * variances.log())
    return Grid(*(value.to(device) for value in values))


@dataclass(frozen=True)
class DpmSolver:
    """Sampling by `num_sampling_steps` passes through the model."""

    num_sampling_steps: int = 20

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
        """Latents [B, c, T, H, W] from noise `z` of that shape; no noise is drawn, so `step_noise` is not read."""
        predict = guided(model, z, y, null_y, mask, guidance_scale, guidance_mode)
        timesteps, alphas, sigmas, lambdas = grid(self.num_sampling_steps, z.device)
        x = z.to(working_dtype(z))
        x0_before = x
        for step in range(self.num_sampling_steps):
            then, last = step + 1, step + 1 == self.num_sampling_steps
            noise = predict(x, timesteps[step])[:, : z.shape[1]]
            x0 = (x - sigmas[step] * noise) / alphas[step]
            width = lambdas[then] - lambdas[step]
            weight = alphas[then] * torch.expm1(-width)
            moved = sigmas[then] / sigmas[step] * x - weight * x0
            if step > 0 and not (last and self.num_sampling_steps < MIN_STEPS_SECOND_ORDER):
                # the slope of the predicted data over λ, from the step before
                slope = (x0 - x0_before) * (width / (lambdas[step] - lambdas[step - 1]))
                moved = moved - 0.5 * weight * slope
            x, x0_before = moved, x0
        return x.to(z.dtype)
