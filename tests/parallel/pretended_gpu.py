"""Lets ColossalAI's ZeRO and Gemini run on CPUs, so that what our engines do with them is tested without a GPU.

Nothing of their sharding, reduction or updates is replaced: the check for a GPU is off, streams are nothing, and moving
a chunk between CPU and GPU, which are one memory here, does no more than put it under the GPU's name.
"""

from contextlib import nullcontext

from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.chunk.chunk import Chunk

from opensora.config import TrainConfig
from opensora.parallel.colossal_engine import GeminiEngine, ZeroEngine
from opensora.parallel.engine import Engine


def build_pretended(config: TrainConfig) -> Engine:
    """The engine of a strategy that ColossalAI has for GPUs alone."""
    accelerator = get_accelerator()
    accelerator._name = "cuda"
    accelerator.Stream = accelerator.current_stream = lambda *_: None
    accelerator.stream = lambda *_: nullcontext()
    close_chunk = Chunk.close_chunk

    def move(chunk: Chunk, *_: object, **__: object) -> None:
        if chunk.cpu_shard is not None:
            chunk.cuda_shard, chunk.cpu_shard = chunk.cpu_shard, None

    def close(chunk: Chunk) -> None:
        close_chunk(chunk)
        move(chunk)

    if not hasattr(Chunk, "pretended"):
        Chunk.pretended, Chunk.shard_move, Chunk.close_chunk = True, move, close
    return GeminiEngine(config) if config.strategy == "gemini" else ZeroEngine(config)
