"""What a stage of training will need, said before anything is loaded: memory, time, GPU-hours and dollars.

Memory is counted (`training_memory`), and so is work (`models/flops`). Time is work over the share of the GPU's peak
that `hardware.utilization` assumes; it holds all that is not counted: reading, communication, the optimizer.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from opensora.config import TRAIN_STEPS, BucketConfig, Config, ConfigError, TrainConfig
from opensora.gpus import GIB, Gpu, gpu_here, known_gpu
from opensora.models.flops import Trainable, training_flops
from opensora.training_memory import T5_PARAMETERS, Memory, count_parameters, stage_model, training_memory

if TYPE_CHECKING:
    import torch

# What Open-Sora 1.0 says it took on H800s, encoders in the step included; the second for fine-tuning at 16x512x512 and
# then at 64x512x512, which the profile h800 has as one stage.
PUBLISHED_GPU_HOURS = {(16, 256, 256): 2808.0, (64, 512, 512): 1920.0}  # by frames, height, width
PUBLISHED_PROFILE = "h800"
# Of Stable Diffusion's VAE, encoding; counted by PyTorch's counter at 256 and 512 pixels, its attention included.
VAE_FLOPS_PER_PIXEL = 4.2e6
MAX_BATCH = 2**16  # where the search for the largest batch ends

Shape = TrainConfig | BucketConfig


@dataclass(frozen=True)
class StagePlan:
    """One stage on a number of GPUs. Figures of time and money are None when the kind of GPU is not known."""

    stage: str
    gpus: int
    shape: tuple[int, int, int]  # frames, height, width of the samples that need most memory
    batch_size: int  # of these, a process and micro-batch
    settings: tuple[str, ...]  # what decides memory
    parameters: int
    trainable: int
    memory: Memory
    usable: float | None  # bytes a GPU has for tensors
    largest_batch: int | None  # samples of that shape that would fit
    largest_frames: int | None  # of one such sample
    steps: int
    samples_per_step: float
    step_flops: float  # a GPU
    step_seconds: float | None
    gpu_hours: float | None
    dollars: float | None
    published_gpu_hours: float | None

    @property
    def fits(self) -> bool:
        """Whether the step's peak is within what the GPU has; True when the kind is not known."""
        return self.usable is None or self.memory.peak <= self.usable

    @property
    def days(self) -> float | None:
        """Of the whole stage, on all GPUs at once."""
        return None if self.gpu_hours is None else self.gpu_hours / self.gpus / 24

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"fits": self.fits, "days": self.days}


def plan_stage(config: Config, stage: str, gpu: Gpu | None) -> StagePlan:
    """Count one stage of a resolved profile; its `processes` are the GPUs."""
    train: TrainConfig = getattr(config, stage)
    memory, worst = worst_shape(config, train)
    counts = count_parameters(config.model, train.trainable)
    size = (worst.frames, worst.height, worst.width)
    one = with_value(worst, "batch_size", 1)
    flops = step_flops(config, train)
    seconds = hours = dollars = None
    if gpu and config.hardware.utilization:
        seconds = flops / (gpu.tflops * 1e12 * config.hardware.utilization)
        hours = seconds * train.steps * train.processes / 3600
        dollars = hours * (config.hardware.dollars_per_gpu_hour or gpu.dollars_per_hour)
    return StagePlan(
        stage=stage,
        gpus=train.processes,
        shape=size,
        batch_size=worst.batch_size,
        settings=describe_settings(train),
        parameters=counts.all,
        trainable=counts.trainable,
        memory=memory,
        usable=gpu.usable if gpu else None,
        largest_batch=largest(config, train, worst, "batch_size", gpu.usable) if gpu else None,
        largest_frames=largest(config, train, one, "frames", gpu.usable) if gpu else None,
        steps=train.steps,
        samples_per_step=samples_per_step(train),
        step_flops=flops,
        step_seconds=seconds,
        gpu_hours=hours,
        dollars=dollars,
        published_gpu_hours=PUBLISHED_GPU_HOURS.get(size) if config.profile == PUBLISHED_PROFILE else None,
    )


def shapes(train: TrainConfig) -> tuple[Shape, ...]:
    """Of all batches of a stage: its own, those of its buckets, and single frames when they are mixed in."""
    return (train, *train.buckets, *([image_shape(train)] if train.image_share else []))


def image_shape(train: TrainConfig) -> BucketConfig:
    """Of the batches of single frames in joint training."""
    return BucketConfig(
        frames=1, height=train.height, width=train.width, batch_size=train.image_batch_size, frame_interval=1
    )


def step_flops(config: Config, train: TrainConfig) -> float:
    """FLOPs of one step on each GPU; with several buckets those of the one with most work."""
    shapes: list[Shape] = [train, *train.buckets]
    videos = max(shape.batch_size * sample_flops(config, train, shape) for shape in shapes)
    images = train.image_batch_size * sample_flops(config, train, image_shape(train)) if train.image_share else 0.0
    return train.accumulate * ((1 - train.image_share) * videos + train.image_share * images)


def sample_flops(config: Config, train: TrainConfig, shape: Shape) -> float:
    """FLOPs of one sample on each of the GPUs that share it: STDiT's, and with clips the encoders', in full on each."""
    model = stage_model(config, shape)
    flops = float(
        training_flops(
            model,
            model.input_size,
            config.model.model_max_length,
            Trainable.named(train.trainable),
            train.activation_checkpointing == "full",
            train.sequence_parallel,
        )
    )
    if train.data == "clips":
        flops += VAE_FLOPS_PER_PIXEL * shape.frames * shape.height * shape.width
        flops += 2.0 * T5_PARAMETERS * config.encode.max_tokens
    return flops


def samples_per_step(train: TrainConfig) -> float:
    """Over all GPUs; the stage's own shape stands for its buckets."""
    videos, images = train.batch_size, train.image_batch_size
    mean = (1 - train.image_share) * videos + train.image_share * images
    return mean * train.accumulate * train.processes / train.sequence_parallel


def largest(config: Config, train: TrainConfig, shape: Shape, name: str, usable: float) -> int:
    """The largest `batch_size` or `frames` of a shape that fits; 0 when not even one does."""

    def fits(value: int) -> bool:
        return training_memory(config, train, with_value(shape, name, value)).peak <= usable

    low, high = 0, 1
    while high <= MAX_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_value(shape: Shape, name: str, value: int) -> BucketConfig:
    """A shape that differs in one value."""
    values = {field: getattr(shape, field) for field in BucketConfig.model_fields}
    return BucketConfig(**{**values, name: value})


def describe_settings(train: TrainConfig) -> tuple[str, ...]:
    """What decides memory, beside the shape of the samples."""
    words = [train.strategy, train.dtype, f"recompute: {train.activation_checkpointing}"]
    words += [f"{train.sequence_parallel} share a sample"] if train.sequence_parallel > 1 else []
    words += [f"{train.accumulate} micro-batches"] if train.accumulate > 1 else []
    words += [f"{train.trainable} learns"] if train.trainable != "all" else []
    return (*words, *(["clips encoded in the step"] if train.data == "clips" else []))


def check_fits(config: Config, stage: str, device: "torch.device | None" = None) -> None:
    """Refuse a stage that the GPU's memory cannot hold, before anything is loaded.

    Args:
        device: that of this process: its kind counts before `hardware.gpu`. A CPU is not checked, and neither is a GPU
            whose kind is known from nothing. None stands for a GPU of the kind `hardware.gpu`.

    Raises:
        ConfigError: names the parts that take most, and the settings that would fit.
    """
    gpu = known_gpu(config.hardware.gpu) if config.hardware.gpu else None
    if device is not None:
        gpu = (gpu_here(device.index or 0) or gpu) if device.type == "cuda" else None
    if gpu is None:
        return
    train: TrainConfig = getattr(config, stage)
    memory, shape = worst_shape(config, train)
    if memory.peak <= gpu.usable:
        return
    biggest = sorted(memory.parts, key=lambda name: -memory.parts[name])[:3]
    parts = ", ".join(f"{name} {memory.parts[name] / GIB:.1f}" for name in biggest)
    advice = "take a smaller height and width"
    for how, other in smaller(stage, train):
        if worst_peak(config, other) <= gpu.usable:
            advice = f"it fits with {how}"
            break
        frames = largest(config, other, with_value(shape, "batch_size", 1), "frames", gpu.usable)
        if frames and other.batch_size == 1:
            advice = f"the longest sample that fits has {frames} frames, with {how}"
    raise ConfigError(
        f"{stage} of {shape.batch_size} x {shape.frames}x{shape.height}x{shape.width} "
        f"({', '.join(describe_settings(train))}) takes {memory.peak / GIB:.1f} GiB on each GPU, and one {gpu.name} "
        f"has {gpu.usable / GIB:.1f} for it ({parts}); {advice}"
    )


def worst_shape(config: Config, train: TrainConfig) -> tuple[Memory, Shape]:
    """The shape of samples that needs most memory, and what it needs."""
    return max(((training_memory(config, train, shape), shape) for shape in shapes(train)), key=lambda it: it[0].peak)


def worst_peak(config: Config, train: TrainConfig) -> float:
    """Bytes of that shape."""
    return worst_shape(config, train)[0].peak


def smaller(stage: str, train: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Settings that need less, the least painful first, each with those before it: how to set them, and the result."""
    changes: dict[str, str | int] = {}

    def now(**change: str | int) -> tuple[str, TrainConfig]:
        changes.update(change)
        how = " ".join(f"--set {stage}.{name}={value}" for name, value in changes.items())
        return how, train.model_copy(update=changes)

    if train.activation_checkpointing == "none":
        yield now(activation_checkpointing="selective")
    if train.activation_checkpointing != "full":
        yield now(activation_checkpointing="full")
    if train.processes > 1 and train.strategy in ("ddp", "zero1", "zero2"):
        yield now(strategy="fsdp" if train.engine == "torch" else "gemini")
    batch, accumulate = train.batch_size, train.accumulate
    while batch % 2 == 0 and not train.buckets and not train.image_share:  # as many samples a step, in more parts
        batch, accumulate = batch // 2, accumulate * 2
        yield now(batch_size=batch, accumulate=accumulate)
    shared = train.sequence_parallel
    while train.processes % (2 * shared) == 0 and shared < 8:  # within a node
        shared *= 2
        yield now(sequence_parallel=shared)


def plan_stages(config: Config, gpu: Gpu | None, stages: tuple[str, ...] = TRAIN_STEPS) -> list[StagePlan]:
    """The plans of several stages."""
    return [plan_stage(config, stage, gpu) for stage in stages]
