"""The discrete noise schedule of DDPM: linear betas over 1,000 timesteps, and what follows from those that are kept.

ᾱ_t is the share of the data's variance left at timestep t. Papers: DDPM (arXiv 2006.11239), IDDPM (arXiv 2102.09672).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02  # the linear schedule of DDPM


class Tables(NamedTuple):
    """One float64 value a kept timestep, [K], on one device; `timesteps` is float32, what the model sees."""

    timesteps: Tensor
    betas: Tensor
    alphas_cumprod: Tensor  # ᾱ
    alphas_cumprod_prev: Tensor  # ᾱ of the kept timestep before; 1 for the first
    posterior_variance: Tensor  # β̃, the variance of q(x_prev | x_t, x0)
    posterior_log_variance: Tensor  # its log, with the second value in the place of the first, which is log 0
    posterior_mean_x0: Tensor  # the posterior's mean is this · x0 + …
    posterior_mean_xt: Tensor  # … this · x_t


def kept_timesteps(steps: int) -> list[int]:
    """`steps` of the 1,000 timesteps, evenly spaced from 0 to 999 and rounded.

    Raises:
        ValueError: `steps` is not in 1…1000.
    """
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise ValueError(f"the number of sampling steps must be 1 to {NUM_TIMESTEPS}, got {steps}")
    stride = (NUM_TIMESTEPS - 1) / (steps - 1) if steps > 1 else 1.0
    kept, position = [], 0.0
    for _ in range(steps):
        kept.append(round(position))
        position += stride  # added up, not multiplied: the released models' rounding
    return kept


def cumulative_alphas() -> Tensor:
    """ᾱ of all 1,000 timesteps, float64 on the CPU."""
    return (1 - torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64)).cumprod(0)


@lru_cache(maxsize=64)
def tables(steps: int, device: torch.device) -> Tables:
    """The tables of a process that visits `steps` timesteps, built once and kept on `device`."""
    kept = torch.tensor(kept_timesteps(steps))
    alphas = cumulative_alphas()[kept]
    before = torch.cat([alphas.new_ones(1), alphas[:-1]])
    betas = 1 - alphas / before
    variance = betas * (1 - before) / (1 - alphas)
    values = Tables(
        timesteps=kept.float(),
        betas=betas,
        alphas_cumprod=alphas,
        alphas_cumprod_prev=before,
        posterior_variance=variance,
        posterior_log_variance=torch.cat([variance[1:2], variance[1:]]).log() if steps > 1 else variance.log(),
        posterior_mean_x0=betas * before.sqrt() / (1 - alphas),
        posterior_mean_xt=(1 - before) * (1 - betas).sqrt() / (1 - alphas),
    )
    return Tables(*(value.to(device) for value in values))


def at(table: Tensor, index: Tensor | int, like: Tensor) -> Tensor:
    """Values of a table at `index` ([B] or one for all), shaped to multiply `like` [B, c, T, H, W], in its type."""
    return table[index].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
