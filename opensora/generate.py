"""Prompts to videos: a checkpoint with its text encoder and VAE, and the files they make."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opensora.clip_file import Form, write_clip
from opensora.config import ConfigError, Sampler, TrainConfig
from opensora.diffusion.dpm_solver import DpmSolver
from opensora.diffusion.iddpm import DDIM, IDDPM
from opensora.diffusion.rectified_flow import RectifiedFlow
from opensora.generation_memory import Generation, check_memory
from opensora.models.stdit import STDiT
from opensora.models.text import embed_texts
from opensora.models.vae import FrameVAE
from opensora.progress import progress
from opensora.step import fingerprint
from opensora.training.checkpoint import Checkpoint, describe_checkpoint, load_checkpoint

if TYPE_CHECKING:
    from opensora.diffusion.guidance import GuidanceMode

RECORD = "generated.jsonl"
DEFAULT_STEPS: dict[Sampler, int] = {"iddpm": 100, "ddim": 50, "dpm_solver": 20, "rectified_flow": 30}
# The sizes of the released models: the stage's configuration, and frames a second.
RELEASED_SIZES: dict[str, tuple[dict[str, float], int]] = {
    "16x256x256": ({"frames": 16, "height": 256, "width": 256, "space_scale": 0.5, "time_scale": 1.0}, 8),
    "16x512x512": ({"frames": 16, "height": 512, "width": 512, "space_scale": 1.0, "time_scale": 1.0}, 8),
    "64x512x512": ({"frames": 64, "height": 512, "width": 512, "space_scale": 1.0, "time_scale": 2 / 3}, 12),
}


@dataclass(frozen=True)
class Sampling:
    """How latents are drawn."""

    sampler: Sampler
    steps: int
    guidance: float
    guidance_mode: "GuidanceMode"


def choose_sampling(
    checkpoint: Checkpoint,
    sampler: Sampler | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_mode: "GuidanceMode | None" = None,
) -> Sampling:
    """What is given, and for the rest how the checkpoint's configuration evaluates.

    Raises:
        ConfigError: the sampler does not fit the process that the checkpoint was trained with.
    """
    evaluate, objective = checkpoint.config.evaluate, checkpoint.train.objective
    usual: Sampler = evaluate.sampler or objective
    chosen = sampler or usual
    flow = "rectified_flow"
    if (chosen == flow) != (objective == flow):
        fitting = [name for name in DEFAULT_STEPS if (name == flow) == (objective == flow)]
        raise ConfigError(f"{chosen} does not sample a model trained with {objective}; choose {' or '.join(fitting)}")
    if chosen == "iddpm" and not checkpoint.config.model.pred_sigma:
        raise ConfigError("iddpm needs predicted variances, which this model lacks; choose ddim or dpm_solver")
    most = 1000 if chosen in ("iddpm", "ddim") else None  # whole timesteps, 0 and 999 among them
    if steps is not None and most and not 2 <= steps <= most:
        raise ConfigError(f"--steps {steps}: {chosen} takes 2 to {most}")
    same = chosen == usual
    mode = guidance_mode or (evaluate.guidance_mode if same else None)
    return Sampling(
        sampler=chosen,
        steps=steps or (evaluate.steps if same else DEFAULT_STEPS[chosen]),
        guidance=evaluate.guidance if guidance is None else guidance,
        guidance_mode=mode or ("v1" if chosen in ("iddpm", "ddim") else "full"),
    )


def build_sampler(sampling: Sampling, train: TrainConfig) -> IDDPM | DDIM | DpmSolver | RectifiedFlow:
    """The sampler; rectified flow takes the timestep shift it was trained with."""
    match sampling.sampler:
        case "iddpm":
            return IDDPM(sampling.steps)
        case "ddim":
            return DDIM(sampling.steps)
        case "dpm_solver":
            return DpmSolver(sampling.steps)
        case "rectified_flow":
            return RectifiedFlow(sampling.steps, train.shift)


def choose_size(
    train: TrainConfig,
    vae_scale: int,
    profile: str | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> dict[str, float]:
    """Fields of the stage's configuration that another size changes.

    Positions keep the span they were trained with: a frame of twice the size gets twice the `space_scale`.

    Raises:
        ConfigError: an unknown profile, or a size that the VAE's latents do not divide.
    """
    changes: dict[str, float] = {}
    if profile is not None:
        if profile not in RELEASED_SIZES:
            raise ConfigError(f"unknown profile {profile!r}; one of {', '.join(RELEASED_SIZES)}, or give --frames …")
        changes = dict(RELEASED_SIZES[profile][0])
    base = train.model_copy(update=changes)
    asked = {"frames": frames, "height": height, "width": width}
    changes |= {name: value for name, value in asked.items() if value is not None}
    for name in ("height", "width"):
        value = int(changes.get(name, getattr(base, name)))
        if value % vae_scale or value < vae_scale:
            low = max(value // vae_scale, 1) * vae_scale
            raise ConfigError(
                f"--{name} {value} is not a multiple of {vae_scale}, the pixels a latent; "
                f"the nearest are {low} and {low + vae_scale}"
            )
    if height is not None or width is not None:
        area = changes.get("height", base.height) * changes.get("width", base.width)
        changes["space_scale"] = base.space_scale * math.sqrt(area / (base.height * base.width))
    return changes


class SeededNoise:
    """Noise of each sampling step, drawn from a seed a sample: a video does not depend on its batch."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]) -> None:
        self.seeds, self.shape = seeds, shape

    def __getitem__(self, number: int) -> Tensor:
        """[B, c, T, h, w] of step `number`; −1 is where sampling starts."""
        # The start is drawn from the seed itself; a step's seed is mixed from both, so no two share their draws.
        mixed = self.seeds
        if number >= 0:
            mixed = [int(np.random.SeedSequence((seed % 2**64, number)).generate_state(1)[0]) for seed in self.seeds]
        return torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in mixed])


class Pipeline:
    """A checkpoint ready to sample from: the model and the VAE in memory, the text encoder only while it works."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str | None = None,
        vae: Path | None = None,
        text_encoder: Path | None = None,
        text_cache: Path | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = dtype or (checkpoint.train.dtype if self.device == "cuda" else "float32")
        self.vae_folder = vae or checkpoint.vae
        self.text_folder = text_encoder or checkpoint.text_encoder
        self.text_cache = text_cache
        self._model: STDiT | None = None
        self._vae: FrameVAE | None = None

    @classmethod
    def load(cls, folder: Path, text_cache: Path | None = None) -> "Pipeline":
        """From a checkpoint's folder, with its own settings; raises CheckpointError."""
        return cls(describe_checkpoint(folder), text_cache=text_cache)

    @property
    def vae(self) -> FrameVAE:
        """The VAE, loaded when it is first needed."""
        if self._vae is None:
            self._vae = FrameVAE(self.vae_folder, self.device, getattr(torch, self.dtype))
            expected = self.checkpoint.info["vae_scale"]
            if self._vae.scale != expected:
                raise ConfigError(
                    f"the VAE in {self.vae_folder} has {self._vae.scale} pixels a latent, the model was trained "
                    f"with {expected}; give its own by --vae"
                )
        return self._vae

    @property
    def model(self) -> STDiT:
        """The denoiser, loaded when it is first needed."""
        if self._model is None:
            self._model = load_checkpoint(self.checkpoint).to(self.device, getattr(torch, self.dtype))
        return self._model

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, Cc] and masks [B, L] of prompts."""
        config = self.checkpoint.config
        dtype = getattr(torch, config.encode.dtype)
        tokens = config.model.model_max_length
        return embed_texts(self.text_folder, prompts, tokens, cache=self.text_cache, device=self.device, dtype=dtype)

    def sample(
        self,
        text: tuple[Tensor, Tensor],
        seeds: Sequence[int],
        sampling: Sampling,
        step_done: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Videos uint8 [B, T, H, W, 3] of embedded prompts; each depends on its own seed, not on its batch.

        Args:
            text: of `embed`.
            step_done: called after each pass through the model.
        """
        embeddings, mask = (value.to(self.device) for value in text)
        config = self.checkpoint.model_config
        noise = SeededNoise(seeds, (config.in_channels, *config.input_size))
        latents = build_sampler(sampling, self.checkpoint.train).sample(
            _Watched(self.model, step_done),
            noise[-1].to(self.device),
            embeddings[:, None],
            self.model.y_embedder.y_embedding[: embeddings.shape[1]][None, None],
            mask,
            sampling.guidance,
            sampling.guidance_mode,
            noise,
        )
        return self.vae.decode(latents)


class _Watched:
    """The model with a call after each pass."""

    def __init__(self, model: Any, done: Callable[[], None] | None) -> None:
        self.model, self.encode_text = model, model.encode_text
        self.done = done or (lambda: None)

    def __call__(self, *inputs: Any) -> Tensor:
        out = self.model(*inputs)
        self.done()
        return out


def read_prompts(path: Path, seed: int) -> list[tuple[str, int]]:
    """(prompt, seed) of every line; a line without a seed after a tab takes `seed` plus its number.

    Empty lines and lines that begin with # are passed over.

    Raises:
        ConfigError: no such file, no prompt in it, or a seed that is no number.
    """
    if not path.is_file():
        raise ConfigError(f"no prompts file at {path}")
    pairs: list[tuple[str, int]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text, tab, own = line.partition("\t")
        if not text.strip() or text.startswith("#"):
            continue
        try:
            pairs.append((text.strip(), int(own) if tab else seed + len(pairs)))
        except ValueError:
            raise ConfigError(f"{path}, line {number}: the seed {own!r} is not a whole number") from None
    if not pairs:
        raise ConfigError(f"{path} holds no prompt")
    return pairs


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    sampling: Sampling,
    *,
    fps: int = 8,
    batch_size: int = 1,
    form: Form = "mp4",
) -> Iterator[Path]:
    """Write a file a prompt into `out` and yield its path; files made before with the same settings are kept.

    Beside them `generated.jsonl` says, a line a file, what made it; the same stands in each file's metadata.

    Raises:
        MemoryShort: the machine has too little memory; nothing was loaded.
    """
    out.mkdir(parents=True, exist_ok=True)
    wanted = [
        describe_clip(pipeline, text, seed, sampling, fps, form) for text, seed in zip(prompts, seeds, strict=True)
    ]
    finished = {_key(line): out / line["file"] for line in _read_record(out / RECORD)}
    left = []
    for item in wanted:
        path = finished.get(_key(item))
        if path and path.is_file():
            yield path
        else:
            left.append(item)
    if not left:
        return
    check_memory(needs(pipeline, sampling, min(batch_size, len(left))), pipeline.device)
    embeddings, masks = pipeline.embed([item["prompt"] for item in left])
    starts = range(0, len(left), batch_size)
    with progress(len(starts) * sampling.steps, "generating (steps)") as advance:
        for start in starts:
            part = slice(start, start + batch_size)
            items = left[part]
            videos = pipeline.sample(
                (embeddings[part], masks[part]), [item["seed"] for item in items], sampling, advance
            )
            for item, frames in zip(items, videos, strict=True):
                path = write_clip(out / _file_name(item), frames, fps, note=json.dumps(item), form=form)
                _append_record(out / RECORD, item | {"file": path.name})
                yield path


def describe_clip(
    pipeline: Pipeline, prompt: str, seed: int, sampling: Sampling, fps: int, form: Form = "mp4"
) -> dict[str, Any]:
    """All that makes one file, as its metadata say it."""
    train = pipeline.checkpoint.train
    return {
        "prompt": prompt,
        "seed": seed,
        **asdict(sampling),
        "frames": train.frames,
        "height": train.height,
        "width": train.width,
        "fps": fps,
        "form": form,
        "dtype": pipeline.dtype,
        "checkpoint": pipeline.checkpoint.sha256,
    }


def needs(pipeline: Pipeline, sampling: Sampling, batch_size: int) -> Generation:
    """What decides the memory that sampling of `batch_size` videos at once takes."""
    checkpoint = pipeline.checkpoint
    return Generation(
        model=checkpoint.model_config,
        batch_size=batch_size,
        guided=sampling.guidance != 1.0,
        dtype=pipeline.dtype,
        vae=pipeline.vae_folder,
        vae_scale=checkpoint.info["vae_scale"],
        text_encoder=pipeline.text_folder,
        text_dtype=checkpoint.config.encode.dtype,
    )


def _read_record(path: Path) -> list[dict[str, Any]]:
    """What was made before; a line that a kill cut off is passed over, and its file is made again."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _append_record(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a+b") as handle:
        if handle.tell():  # a line that a kill cut off must not swallow this one
            handle.seek(-1, os.SEEK_END)
            torn = handle.read(1) != b"\n"
        else:
            torn = False
        handle.write(b"\n" * torn + json.dumps(line).encode() + b"\n")


def _key(item: Mapping[str, Any]) -> str:
    """What tells one file from another: all of its settings."""
    return fingerprint({name: value for name, value in item.items() if name != "file"})


def _file_name(item: Mapping[str, Any]) -> str:
    words = "".join(letter if letter.isalnum() else "-" for letter in item["prompt"].lower())
    slug = "-".join(filter(None, words.split("-")))[:60].strip("-") or "video"
    return f"{slug}-seed{item['seed']}-{_key(item)[:8]}"
