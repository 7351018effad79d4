"""Exponential moving average of the weights (arXiv 1706.02677 uses the plain form below)."""

import torch
from torch import Tensor, nn


class Ema:
    """float32 copies of the trainable parameters, moved by one fused operation a step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = dict(model.named_parameters())
        self._average = {name: value.detach().float().clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the live weights; early steps move faster, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [value.detach().float() for value in self._live.values()]
        torch._foreach_lerp_(list(self._average.values()), live, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return self._average

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take averages over; every name must be there."""
        for name, value in self._average.items():
            value.copy_(state[name])
