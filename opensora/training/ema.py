"""Exponential moving average of the weights (arXiv 1706.02677 uses the plain form below)."""

import torch
from torch import Tensor


class Ema:
    """float32 copies of this process's part of the parameters, moved by one fused operation a step.

    Args:
        own: live float32 tensors (`Engine.own_parameters`).
        decay: share of the average that stays at a step.
    """

    def __init__(self, own: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._live = own
        self._average = {name: value.clone() for name, value in own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the live weights; early steps move faster, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self._average:  # a shard of a small model may be empty
            torch._foreach_lerp_(list(self._average.values()), list(self._live.values()), 1 - decay)

    def shares(self) -> dict[str, Tensor]:
        """The averages by parameter name, each this process's part."""
        return self._average

    @torch.no_grad()
    def load(self, shares: dict[str, Tensor]) -> None:
        """Take averages over; every name must be there."""
        for name, value in self._average.items():
            value.copy_(shares[name])
