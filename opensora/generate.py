"""Prompts to videos: a checkpoint with its text encoder and VAE, and the files they make."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensora.clip_file import write_clip
from opensora.config import ConfigError
from opensora.diffusion.rectified_flow import RectifiedFlow
from opensora.models.text import TextEncoder
from opensora.models.vae import FrameVAE
from opensora.progress import track
from opensora.training.checkpoint import Checkpoint, load_checkpoint

RECORD = "generated.jsonl"


class Pipeline:
    """A checkpoint ready to sample from."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = checkpoint.model.to(self.device)
        self.vae = FrameVAE(checkpoint.vae, self.device)
        self.text = TextEncoder(checkpoint.text_encoder, self.device)

    @classmethod
    def load(cls, folder: Path) -> "Pipeline":
        """From a checkpoint's folder; raises CheckpointError."""
        return cls(load_checkpoint(folder))

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> np.ndarray:
        """Videos uint8 [B, T, H, W, 3], one a prompt; each depends on its own seed, not on its batch."""
        train = self.checkpoint.train
        if train.objective != "rectified_flow":
            raise ConfigError(f"this version samples rectified flow; the checkpoint was trained with {train.objective}")
        shape = (4, train.frames, train.height // self.vae.scale, train.width // self.vae.scale)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        tokens = self.checkpoint.config.model.model_max_length
        text, mask = self.text.encode(prompts, tokens)
        null = self.model.y_embedder.y_embedding[:tokens].expand(len(prompts), 1, -1, -1)
        flow = RectifiedFlow(steps, train.shift)
        latents = flow.sample(
            self.model,
            noise.to(self.device),
            text.unsqueeze(1).to(self.device),
            null,
            mask.to(self.device),
            guidance,
        )
        return self.vae.decode(latents)


def read_prompts(path: Path, seed: int) -> list[tuple[str, int]]:
    """(prompt, seed) of every line; a line without a seed after a tab takes `seed` plus its number.

    Raises:
        ConfigError: no such file, no prompt in it, or a seed that is no number.
    """
    if not path.is_file():
        raise ConfigError(f"no prompts file at {path}")
    pairs: list[tuple[str, int]] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text, tab, own = line.partition("\t")
        if not text.strip():
            continue
        try:
            pairs.append((text.strip(), int(own) if tab else seed + len(pairs)))
        except ValueError:
            raise ConfigError(f"{path}, line {number}: the seed {own!r} is not a whole number") from None
    if not pairs:
        raise ConfigError(f"{path} holds no prompt")
    return pairs


def generate(
    checkpoint: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    fps: int = 8,
    batch_size: int = 8,
) -> Iterator[Path]:
    """Write a file a prompt into `out` and yield its path; files made before with the same settings are kept.

    `steps` and `guidance` are by default those that the checkpoint's configuration evaluates with.
    Beside them `generated.jsonl` says, a line a file, what made it.
    """
    pipeline = Pipeline.load(checkpoint)
    evaluate = pipeline.checkpoint.config.evaluate
    steps = evaluate.steps if steps is None else steps
    guidance = evaluate.guidance if guidance is None else guidance
    out.mkdir(parents=True, exist_ok=True)
    settings = {"steps": steps, "guidance": guidance, "checkpoint": pipeline.checkpoint.sha256, "fps": fps}
    wanted: list[dict[str, Any]] = [
        {"prompt": text, "seed": seed, **settings} for text, seed in zip(prompts, seeds, strict=True)
    ]
    record = out / RECORD
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
    finished = {_key(line): out / line["file"] for line in lines}
    left = []
    for item in wanted:
        path = finished.get(_key(item))
        if path and path.is_file():
            yield path
        else:
            left.append(item)
    parts = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
    for part in track(parts, len(parts), "generating (batches)"):
        videos = pipeline.sample([i["prompt"] for i in part], [i["seed"] for i in part], steps, guidance)
        for item, frames in zip(part, videos, strict=True):
            path = write_clip(out / _file_name(item), frames, fps, note=json.dumps(item))
            with record.open("a") as handle:
                handle.write(json.dumps(item | {"file": path.name}) + "\n")
            yield path


def _key(item: dict) -> tuple:
    return tuple(item[name] for name in ("prompt", "seed", "steps", "guidance", "checkpoint", "fps"))


def _file_name(item: dict) -> str:
    words = "".join(letter if letter.isalnum() else "-" for letter in item["prompt"].lower())
    return f"{'-'.join(filter(None, words.split('-')))[:60]}-seed{item['seed']}-{item['checkpoint'][:6]}"
