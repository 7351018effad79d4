"""Exponential moving average of the weights (arXiv 1706.02677 uses the plain form below)."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """float32 averages of a process's own parameters or shards of them, moved by one fused operation a step.

    Args:
        own: the live tensors by parameter name; they are read at every update, and float32 ones are never copied again.
        decay: share of the average that a step keeps.
    """

    def __init__(self, own: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._live = dict(own)
        self._average = {name: value.detach().to(torch.float32, copy=True) for name, value in own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the live weights; early steps move faster, so that the start is forgotten."""
        if not self._average:  # nothing that this process holds learns
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [value.detach().float() for value in self._live.values()]
        torch._foreach_lerp_(list(self._average.values()), live, 1 - decay)

    def shares(self) -> dict[str, Tensor]:
        """The averages by parameter name, the tensors themselves."""
        return self._average

    @torch.no_grad()
    def load(self, shares: Mapping[str, Tensor]) -> None:
        """Take averages over.

        Raises:
            ValueError: names or shapes are not those of the live tensors; all that differ are named.
        """
        found = {name: tuple(value.shape) for name, value in shares.items()}
        expected = {name: tuple(value.shape) for name, value in self._average.items()}
        wrong = sorted({name for name, _ in found.items() ^ expected.items()})
        if wrong:
            raise ValueError(
                f"averages do not fit the weights that learn: {', '.join(wrong[:5])}{' …' if len(wrong) > 5 else ''} "
                "missing, unexpected or of another shape; resume with the settings the checkpoint was made with"
            )
        for name, value in self._average.items():
            value.copy_(shares[name])
