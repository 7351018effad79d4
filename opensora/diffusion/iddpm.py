"""IDDPM, the process that Open-Sora 1.0 and PixArt-α were trained with, and its ancestral and DDIM samplers.

The model predicts the noise and, in as many channels more, where the variance lies between its two bounds.
Papers: IDDPM (arXiv 2102.09672), DDIM (arXiv 2010.02502). Shapes: latents [B, c, T, H, W], text [B, 1, L, Cc].
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.diffusion.guidance import Denoiser, GuidanceMode, Predictor, StepNoise, guided, working_dtype
from opensora.diffusion.schedule import NUM_TIMESTEPS, Tables, at, tables

HALF_BIN = 1 / 255  # half of the width of one of 256 values in −1…1
EDGE = 0.999  # values beyond it count as the outermost bin
TINY = 1e-12  # probabilities are kept above it before their log


@dataclass(frozen=True)
class IDDPM:
    """Training on all 1,000 timesteps; ancestral sampling on `num_sampling_steps` of them."""

    num_sampling_steps: int = 100

    def sample_timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        """Uniform timesteps [batch], int64 in 0…999, on the generator's device."""
        return torch.randint(NUM_TIMESTEPS, (batch,), generator=generator, device=generator.device)

    def training_losses(
        self, model: Denoiser, x0: Tensor, t: Tensor, noise: Tensor, y: Tensor, mask: Tensor | None
    ) -> dict[str, Tensor]:
        """Losses a sample, [B]: `loss` = `mse` of the noise + `vb`, the variational bound in bits a dimension.

        The bound trains the variance alone: the noise in it is detached.

        Args:
            model: `model(x, t, y, mask) -> [B, 2c, T, H, W]`.
            x0: clean latents [B, c, T, H, W].
            t: whole timesteps [B] in 0…999.
            noise: like x0.
            y, mask: text [B, 1, L, Cc] and its mask [B, L] or None.
        """
        table, t = tables(NUM_TIMESTEPS, x0.device), t.long()
        x0, noise = x0.to(working_dtype(x0)), noise.to(working_dtype(x0))
        alpha = table.alphas_cumprod
        x_t = at(alpha.sqrt(), t, x0) * x0 + at((1 - alpha).sqrt(), t, x0) * noise
        predicted, variance = _split(model(x_t, table.timesteps[t], y, mask).to(x0.dtype), x0)
        mse = (noise - predicted).square().flatten(1).mean(1)
        vb = _variational_bound(table, x0, x_t, t, predicted.detach(), variance)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    @torch.no_grad()
    def sample(
        self,
        model: Denoiser,
        z: Tensor,
        y: Tensor,
        null_y: Tensor,
        mask: Tensor | None = None,
        guidance_scale: float = 7.0,
        guidance_mode: GuidanceMode = "v1",
        step_noise: StepNoise | None = None,
    ) -> Tensor:
        """Latents [B, c, T, H, W] from noise `z` of that shape.

        Args:
            step_noise: `step_noise[i]` [B or more, c, T, H, W] replaces the noise drawn at the i-th step.
        """
        predict = guided(model, z, y, null_y, mask, guidance_scale, guidance_mode)
        table = tables(self.num_sampling_steps, z.device)
        x = z.to(working_dtype(z))
        for number, index in enumerate(reversed(range(self.num_sampling_steps))):
            noise = _draw(x, number, step_noise) if index else torch.zeros_like(x)
            x = ancestral_step(table, predict, x, index, noise)
        return x.to(z.dtype)


@dataclass(frozen=True)
class DDIM:
    """The same model sampled by DDIM; `eta` 0 adds no noise, 1 as much as ancestral sampling."""

    num_sampling_steps: int = 50
    eta: float = 0.0

    @torch.no_grad()
    def sample(
        self,
        model: Denoiser,
        z: Tensor,
        y: Tensor,
        null_y: Tensor,
        mask: Tensor | None = None,
        guidance_scale: float = 7.0,
        guidance_mode: GuidanceMode = "v1",
        step_noise: StepNoise | None = None,
    ) -> Tensor:
        """Latents [B, c, T, H, W] from noise `z`; see `IDDPM.sample`."""
        predict = guided(model, z, y, null_y, mask, guidance_scale, guidance_mode)
        table = tables(self.num_sampling_steps, z.device)
        x = z.to(working_dtype(z))
        for number, index in enumerate(reversed(range(self.num_sampling_steps))):
            noise = _draw(x, number, step_noise) if index and self.eta else torch.zeros_like(x)
            x = ddim_step(table, predict, x, index, noise, self.eta)
        return x.to(z.dtype)


def ancestral_step(table: Tables, predict: Predictor, x: Tensor, index: Tensor | int, noise: Tensor) -> Tensor:
    """x_prev from x_t: the posterior's mean for the predicted x0, plus `noise` of the learned variance.

    Args:
        index: which of the kept timesteps x is at: one for all, or [B].
        noise: like x; zeros at index 0, whose mean is the result.
    """
    predicted, variance = _split(predict(x, table.timesteps[index]), x)
    x0 = _data(table, x, index, predicted)
    mean = _posterior_mean(table, x0, x, index)
    return mean + (0.5 * _log_variance(table, variance, index)).exp() * noise


def ddim_step(
    table: Tables, predict: Predictor, x: Tensor, index: Tensor | int, noise: Tensor, eta: float = 0.0
) -> Tensor:
    """x_prev from x_t by DDIM; arguments as in `ancestral_step`."""
    x0 = _data(table, x, index, _split(predict(x, table.timesteps[index]), x)[0])
    alpha, before = at(table.alphas_cumprod, index, x), at(table.alphas_cumprod_prev, index, x)
    predicted = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
    sigma = eta * ((1 - before) / (1 - alpha)).sqrt() * (1 - alpha / before).sqrt()
    return before.sqrt() * x0 + (1 - before - sigma.square()).clamp(min=0).sqrt() * predicted + sigma * noise


def _split(out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted noise and the variance channels (none for a model without them)."""
    channels = x.shape[1]
    return out[:, :channels], out[:, channels:]


def _draw(x: Tensor, number: int, step_noise: StepNoise | None) -> Tensor:
    if step_noise is None:
        return torch.randn_like(x)
    return step_noise[number][: len(x)].to(x)


def _data(table: Tables, x: Tensor, index: Tensor | int, noise: Tensor) -> Tensor:
    """x0 from x_t and its noise."""
    alpha = table.alphas_cumprod
    return at(alpha.rsqrt(), index, x) * x - at((1 / alpha - 1).sqrt(), index, x) * noise


def _posterior_mean(table: Tables, x0: Tensor, x: Tensor, index: Tensor | int) -> Tensor:
    return at(table.posterior_mean_x0, index, x) * x0 + at(table.posterior_mean_xt, index, x) * x


def _log_variance(table: Tables, variance: Tensor, index: Tensor | int) -> Tensor:
    """log σ² between that of β̃ (at −1) and that of β (at 1).

    Raises:
        ValueError: the model has no variance channels.
    """
    if not variance.shape[1]:
        raise ValueError("IDDPM needs a model that predicts variances (pred_sigma); DDIM and DPM-Solver do without")
    share = (variance + 1) / 2
    high, low = at(table.betas.log(), index, variance), at(table.posterior_log_variance, index, variance)
    return share * high + (1 - share) * low


def _variational_bound(
    table: Tables, x0: Tensor, x_t: Tensor, t: Tensor, predicted: Tensor, variance: Tensor
) -> Tensor:
    """KL of the posterior and the model's step, or at t = 0 the discretised likelihood of the data, in bits, [B]."""
    mean = _posterior_mean(table, _data(table, x_t, t, predicted), x_t, t)
    log_variance = _log_variance(table, variance, t)
    true_mean, true_log = _posterior_mean(table, x0, x_t, t), at(table.posterior_log_variance, t, x0)
    kl = 0.5 * (
        log_variance - true_log - 1 + (true_log - log_variance).exp() + (true_mean - mean).square() / log_variance.exp()
    )
    likelihood = _discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    bound = torch.where(at(table.timesteps, t, x0) == 0, -likelihood, kl)
    return bound.flatten(1).mean(1) / math.log(2)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Log-probability of the bin of width 2/255 round x under a Gaussian, whose CDF is approximated by tanh."""
    centred, scale = x - mean, (-log_deviation).exp()
    above, below = _normal_cdf((centred + HALF_BIN) * scale), _normal_cdf((centred - HALF_BIN) * scale)
    inside = torch.where(x < -EDGE, above, torch.where(x > EDGE, 1 - below, above - below))
    return inside.clamp(min=TINY).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))).tanh())
