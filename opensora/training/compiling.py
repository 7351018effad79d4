"""torch.compile for the blocks of a transformer: norms, modulation and activations become a few fused kernels.

Blocks are compiled one by one, not the model as a whole: they share their code, so a minute of compilation does for all
of them, and wrappers that work by block (FSDP2) stay outside.
"""

import torch
from torch import nn

SHAPES = 64  # versions of a block that are kept: its first form and all others, for each bucket


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Have every block compile itself in its first call; returns the number of blocks.

    Call it after `set_activation_checkpointing`, whose modes are compiled with the block, and before the engine wraps
    the model. A shape not seen before is compiled once more.

    Raises:
        ValueError: the model has no `blocks`.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of blocks to compile")
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    # An error is better than a block that runs uncompiled without a word. Only the exchange of sequence parallelism
    # has to interrupt a block, and then a checkpointed one is not compiled as a whole.
    whole = getattr(model, "sharding", None) is None
    for block in blocks:
        block.compile(fullgraph=whole, dynamic=False, backend=backend)
    return len(blocks)
