"""What of STDiT learns in a stage: everything, the temporal attention alone, or all but what reads the text."""

from typing import Literal

from torch import nn

Trainable = Literal["all", "temporal", "no_text"]
TEMPORAL = ".attn_temp."  # in the names of parameters
TEXT = ("y_embedder.", ".cross_attn.")


def learns(parameter: str, trainable: Trainable) -> bool:
    """Whether the parameter of that name learns.

    Raises:
        ValueError: `trainable` is none of the three.
    """
    match trainable:
        case "all":
            return True
        case "temporal":
            return TEMPORAL in parameter
        case "no_text":
            return not any(part in parameter for part in TEXT)
    raise ValueError(f"trainable must be all, temporal or no_text, got {trainable!r}")


def freeze(model: nn.Module, trainable: Trainable) -> None:
    """Let only those parameters learn; before the optimizer is made and the model is compiled or wrapped.

    Raises:
        ValueError: nothing is left that learns, as in a model without temporal attention.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name, trainable))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameters that learn with trainable={trainable}")
