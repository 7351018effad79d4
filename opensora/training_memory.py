"""How much memory a training step takes on each GPU, by part, said before anything is loaded.

All counts are bytes on one GPU. The peak is that of the worst moment, not the sum of the parts.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from opensora.config import BucketConfig, Config, ModelConfig, TrainConfig
from opensora.models.activations import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    Activations,
    Precision,
    activations,
    weight_copy_bytes,
)
from opensora.models.flops import Trainable
from opensora.models.stdit import STDiT, STDiTConfig

FLOAT, LOW = 4, 2  # bytes of float32 and bfloat16
MOMENTS = 2  # of AdamW, in float32 a parameter
RELEASED_VAE_SCALE, DEMO_VAE_SCALE = 8, 4  # pixels a latent column
VAE_PARAMETERS = 83_653_863  # of Stable Diffusion's, which Open-Sora 1.0 uses
T5_PARAMETERS = 4_762_310_656  # of T5-XXL's encoder
VAE_PIXEL_BYTES = 3072  # of float32 activations a pixel that the VAE encodes: 3 GiB for 2**20 of them
GATHERED_BLOCKS = 2  # whole at once under sharded weights: the one at work, and the next
REDUCE_BUCKET = 12 * 2**20  # elements that ColossalAI's ZeRO reduces at once


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters."""

    all: int
    trainable: int
    block: int  # of one block


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        parts: by name, each at its largest.
        peak: of the worst moment of a step: gradients come as activations go.
    """

    parts: dict[str, float]
    peak: float


def training_memory(config: Config, train: TrainConfig, shape: TrainConfig | BucketConfig) -> Memory:
    """Memory of a step on each of `train.processes` GPUs, with samples of one of the stage's shapes."""
    model = stage_model(config, shape)
    counts = count_parameters(config.model, train.trainable)
    states = state_bytes(train, counts)
    one = sample_activations(config, train, shape)
    batch = shape.batch_size
    block_copies = float(weight_copy_bytes(model, precision(train)))
    copies = model.depth * block_copies
    full = train.activation_checkpointing == "full"
    encoders, encoding = encoder_bytes(config, train, shape) if train.data == "clips" else (0.0, 0.0)
    work = working_bytes(train, counts)

    gradients, masters = states["gradients"], states["float32 masters"]
    fixed = sum(states.values()) - gradients + encoders + work
    early = gradients if gradients_stay(train) else 0.0
    saved = batch * sum(one.saved.values())
    moments = {
        "encoding clips": fixed + early + encoding,
        "end of the forward pass": fixed + early + saved + copies,
        "start of the backward pass": fixed + early + batch * one.peak + (block_copies if full else copies),
        "end of the backward pass": fixed + gradients + batch * one.end + block_copies,
        "update": fixed + gradients + masters,  # ZeRO takes its shard of the gradients in float32
    }
    parts = states | {
        "activations": saved,
        "backward pass": float(batch * one.transient),
        "copies of weights": block_copies if full else copies,
        "VAE, text encoder": encoders,
        "gathered from shards": work,
    }
    return Memory({name: float(value) for name, value in parts.items() if value}, max(moments.values()))


def state_bytes(train: TrainConfig, counts: Counts) -> dict[str, float]:
    """What lasts from step to step: weights, gradients, moments of the optimizer, averages.

    | strategy | weights | masters | gradients | optimizer |
    |---|---|---|---|---|
    | ddp | whole, float32 | | whole | whole |
    | fsdp | shard, float32 | | shard | shard |
    | zero1 | whole, as `dtype` | shard, float32 | whole, as `dtype` | shard |
    | zero2 | whole, as `dtype` | shard, float32 | shard, as `dtype` | shard |
    | gemini | shard, as `dtype` | shard, float32 | shard, as `dtype` | shard |

    The averages are float32 and always shared out. With several micro-batches fsdp keeps gradients whole.
    """
    low = LOW if train.dtype == "bfloat16" else FLOAT
    every = train.processes
    everything, learning = float(counts.all), float(counts.trainable)
    masters, optimizer, averages = 0.0, MOMENTS * FLOAT * learning, FLOAT * learning / every
    match train.strategy:
        case "ddp":
            weights, gradients = FLOAT * everything, FLOAT * learning
        case "fsdp":
            weights, optimizer = FLOAT * everything / every, optimizer / every
            gradients = FLOAT * learning / (every if train.accumulate == 1 else 1)
        case "zero1":
            weights, gradients = low * everything, low * learning
            masters, optimizer = FLOAT * learning / every, optimizer / every
        case "zero2":
            weights, gradients = low * everything, low * learning / every
            masters, optimizer = FLOAT * learning / every, optimizer / every
        case "gemini":
            weights, gradients = low * everything / every, low * learning / every
            masters, optimizer = FLOAT * learning / every, optimizer / every
    return {
        "weights": weights,
        "float32 masters": masters,
        "gradients": gradients,
        "optimizer": optimizer,
        "averages (EMA)": averages,
    }


def working_bytes(train: TrainConfig, counts: Counts) -> float:
    """Weights gathered from their shards for the blocks at work, their gradients, and the buckets of reduction."""
    low = LOW if train.dtype == "bfloat16" else FLOAT
    if train.processes == 1:
        return 0.0
    match train.strategy:
        case "ddp":
            return 0.0  # gradients lie in the buckets
        case "fsdp" | "gemini":
            return float((GATHERED_BLOCKS * low + FLOAT) * counts.block)
        case "zero1" | "zero2":
            return float(2 * REDUCE_BUCKET * low)


def gradients_stay(train: TrainConfig) -> bool:
    """Whether memory for gradients is taken when a forward pass begins: DDP's buckets, or earlier micro-batches."""
    return train.accumulate > 1 or (train.strategy == "ddp" and train.processes > 1)


def sample_activations(config: Config, train: TrainConfig, shape: TrainConfig | BucketConfig) -> Activations:
    """Of one sample of that shape, on each of the processes that share it."""
    model = stage_model(config, shape)
    return activations(
        model,
        model.input_size,
        config.model.model_max_length,
        precision(train),
        train.activation_checkpointing,
        Trainable.named(train.trainable),
        train.sequence_parallel,
    )


def precision(train: TrainConfig) -> Precision:
    """In which a stage computes: shards are gathered, or kept, in bfloat16; whole weights stay float32 and are cast."""
    if train.dtype == "float32":
        return FLOAT32
    return AUTOCAST if train.strategy == "ddp" else BFLOAT16


def encoder_bytes(config: Config, train: TrainConfig, shape: TrainConfig | BucketConfig) -> tuple[float, float]:
    """Weights of VAE and text encoder when clips are encoded in the step; and what encoding one micro-batch takes."""
    from opensora.generation_memory import text_encoder_bytes
    from opensora.models.vae import BATCH_PIXELS

    size = LOW if config.encode.dtype == "bfloat16" else FLOAT
    text = Path(config.weights_dir) / config.encode.text_encoder
    text_bytes = text_encoder_bytes(text, size) if (text / "config.json").is_file() else float(T5_PARAMETERS * size)
    pixels = shape.batch_size * shape.frames * shape.height * shape.width
    at_once = (config.encode.batch_frames or 0) * shape.height * shape.width or BATCH_PIXELS
    return VAE_PARAMETERS * size + text_bytes, VAE_PIXEL_BYTES * size / FLOAT * min(pixels, at_once)


def stage_model(config: Config, shape: TrainConfig | BucketConfig) -> STDiTConfig:
    """The STDiT, with the size of that shape's latents."""
    scale = vae_scale(config)
    size = (shape.frames, shape.height // scale, shape.width // scale)
    return STDiTConfig(size, **config.model.model_dump())


def vae_scale(config: Config) -> int:
    """Pixels a latent column: of the VAE in `weights_dir`, if it is there, else of the one that the profile implies."""
    file = Path(config.weights_dir) / config.encode.vae / "config.json"
    if config.demo.build_models:
        return DEMO_VAE_SCALE
    if file.is_file():
        return 2 ** (len(json.loads(file.read_text())["block_out_channels"]) - 1)
    return RELEASED_VAE_SCALE


@lru_cache(maxsize=8)
def count_parameters(model: ModelConfig, trainable: str) -> Counts:
    """Of a model that is built without memory for its weights; no count depends on the size of the samples."""
    import torch

    chosen = Trainable.named(trainable)
    with torch.device("meta"):
        built = STDiT(STDiTConfig((1, 2, 2), **model.model_dump()))
    sizes = {name: value.numel() for name, value in built.named_parameters()}
    learning = sum(size for name, size in sizes.items() if chosen.has(name))
    block = sum(size for name, size in sizes.items() if name.startswith("blocks.0."))
    return Counts(sum(sizes.values()), learning, block)
