"""Activation checkpointing of transformer blocks: what the backward pass needs is kept, or computed again.

`selective` keeps the results of matrix products and of attention, which take most of the time, and computes norms,
modulation, activations and residual sums again, which make a third of the memory. `full` keeps the input of each block
and runs the whole block again (arXiv 1604.06174): the least memory, for a third more time.
"""

import functools
from collections.abc import Callable
from typing import Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import opensora.models.temporal_kernel  # noqa: F401  (defines the operation opensora::attend_in_time)

Checkpointing = Literal["none", "selective", "full"]
MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")
Arguments = ParamSpec("Arguments")

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.opensora.attend_in_time.default,
}


class Block(Protocol):
    """A module whose `forward` is decorated with `checkpointed`."""

    checkpointing: Checkpointing


Owner = TypeVar("Owner", bound=Block)


def set_activation_checkpointing(model: nn.Module, mode: Checkpointing) -> None:
    """Choose what the blocks of `model` recompute in the backward pass; before it is compiled or wrapped.

    Raises:
        ValueError: `mode` is none of `MODES`, or the model has no block that can be checkpointed.
    """
    if mode not in MODES:
        raise ValueError(f"activation checkpointing must be one of {', '.join(MODES)}, got {mode!r}")
    blocks = [cast(Block, module) for module in model.modules() if hasattr(module, "checkpointing")]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks whose activations can be checkpointed")
    for block in blocks:
        block.checkpointing = mode


def checkpointed(
    forward: Callable[Concatenate[Owner, Arguments], Tensor],
) -> Callable[Concatenate[Owner, Arguments], Tensor]:
    """A block's `forward` that follows the block's attribute `checkpointing`. It must draw no random numbers."""

    @functools.wraps(forward)
    def wrapped(self: Owner, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        options: dict = {"use_reentrant": False, "preserve_rng_state": False}
        if self.checkpointing == "selective":
            options["context_fn"] = _selective
        return checkpoint(forward, self, *args, **options, **kwargs)  # type: ignore[arg-type]

    return wrapped


def _selective() -> tuple:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
