"""AdamW: what of a model it decays, and PyTorch's own with a state from the start."""

import logging
from functools import cache

import torch
from torch import nn

from opensora.config import TrainConfig

log = logging.getLogger(__name__)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups of what learns: weights are decayed; biases, tables and other small things are not."""
    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [name for name, parameter in learning if parameter.ndim >= 2 and not name.endswith("_table")]
    return [
        {"params": [p for name, p in learning if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in learning if name not in decayed], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW, which updates all parameters in one kernel, on CPUs too."""
    _log_once("optimizer: PyTorch's fused AdamW")
    return torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=config.lr, fused=True)


@cache
def _log_once(line: str) -> None:
    log.info(line)


def start_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the parameters the state that AdamW makes at its first step, so that it can be saved and loaded before."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device) if isinstance(optimizer, torch.optim.AdamW) else 0,
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Have AdamW go on after that many updates. PyTorch counts them in tensors, ColossalAI in numbers or groups."""
    for group in optimizer.param_groups:
        if not isinstance(optimizer, torch.optim.AdamW):
            group["step"] = updates
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["step"] = torch.full_like(state["step"], updates) if torch.is_tensor(state["step"]) else updates
