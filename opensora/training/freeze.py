"""Only what a stage says learns: everything, the temporal attention alone, or all but what reads the text."""

from typing import Literal, get_args

from torch import nn

from opensora.models import flops

Trainable = Literal["all", "temporal", "no_text"]


def freeze(model: nn.Module, trainable: Trainable) -> None:
    """Let only those parameters learn; before the optimizer is made and the model is compiled or wrapped.

    Raises:
        ValueError: `trainable` is none of the three, or nothing is left that learns, as in a model without temporal
            attention.
    """
    if trainable not in get_args(Trainable):
        raise ValueError(f"trainable must be all, temporal or no_text, got {trainable!r}")
    parts = flops.Trainable.named(trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts.has(name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameters that learn with trainable={trainable}")
