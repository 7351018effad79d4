"""Samples that training makes of itself at intervals, so that one sees what it has learnt.

Shapes: `T` frames, `C` latent channels, `h`, `w` latent size, `L` text tokens, `Cc` caption channels.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora.clip_file import contact_sheet, write_clip
from opensora.config import Config, TrainConfig
from opensora.diffusion.iddpm import DDIM
from opensora.diffusion.rectified_flow import RectifiedFlow
from opensora.models.stdit import STDiT
from opensora.models.text import embed_texts
from opensora.models.vae import FrameVAE
from opensora.tracking.tracker import Tracker
from opensora.training.checkpoint import locate, stdit_config

STEPS = 20  # of the sampler: to look at, not to measure
log = logging.getLogger(__name__)


@dataclass
class SampleWriter:
    """Writes `folder/samples/step-N/` for the prompts of a stage, each with a seed of its own that never changes.

    The VAE and the text encoder are in memory only while samples are made.

    Args:
        places: where those two lie and the VAE's scale, as a checkpoint says it.
    """

    config: Config
    stage: str
    places: Mapping[str, Any]
    folder: Path
    device: torch.device
    tracker: Tracker | None = None

    def __post_init__(self) -> None:
        """Raises CheckpointError where a model is missing: now, and not after a thousand steps."""
        self.vae, self.text_encoder = (locate(self.places[name], self.folder) for name in ("vae", "text_encoder"))

    def write(self, weights: dict[str, Tensor], step: int, beat: Callable[[], None] = lambda: None) -> list[Path]:
        """A file a prompt and `frames.png` with all of them, which the tracker shows, too; returns the files.

        Samples that fail, as where memory is short, are a warning: training goes on. Random states are untouched.

        Args:
            weights: whole tensors of the model by name.
            step: number of steps done.
            beat: called after each prompt.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.no_grad():  # loading models draws, too
                return self._write(weights, step, beat)
        except (OSError, RuntimeError) as error:
            log.warning("no samples of step %d: %s", step, error)
            return []

    def _write(self, weights: dict[str, Tensor], step: int, beat: Callable[[], None]) -> list[Path]:
        folder = self.folder / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        prompts = self._train.sample_prompts
        files, rows = [], []
        for number, (prompt, frames) in enumerate(zip(prompts, self._sample(weights, beat), strict=True)):
            path = write_clip(folder / f"{number:02d}", frames, self.config.evaluate.fps, note=prompt)
            files.append(path)
            rows.append((prompt, frames))
        contact_sheet(folder / "frames.png", rows)
        if self.tracker:
            self.tracker.log_image(_read_picture(folder / "frames.png"), "samples", step)
            for path in files:
                self.tracker.log_artifact(path, f"samples/step-{step:08d}")
        return [*files, folder / "frames.png"]

    @property
    def _train(self) -> TrainConfig:
        return getattr(self.config, self.stage)

    def _sample(self, weights: dict[str, Tensor], beat: Callable[[], None]) -> list[np.ndarray]:
        """Videos uint8 [T, H, W, 3], one a prompt."""
        device = str(self.device)
        dtype = getattr(torch, self._train.dtype if self.device.type == "cuda" else "float32")
        text_dtype, tokens = getattr(torch, self.config.encode.dtype), self.config.model.model_max_length
        cache = self.folder / "samples" / ".text"
        text, mask = embed_texts(
            self.text_encoder, self._train.sample_prompts, tokens, cache=cache, device=device, dtype=text_dtype
        )  # [P, L, Cc], [P, L]
        shape = stdit_config(self.config, self.stage, self.places["vae_scale"])
        with torch.device("meta"):
            model = STDiT(shape)
        model.load_state_dict(weights, assign=True)
        model = model.eval().to(self.device, dtype)
        vae = FrameVAE(self.vae, device, dtype)
        null = model.y_embedder.y_embedding[: text.shape[1]][None, None]
        videos = []
        for number in range(len(text)):
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(1, shape.in_channels, *shape.input_size, generator=generator)
            latents = self._sampler().sample(
                model,
                noise.to(self.device),
                text[number : number + 1, None].to(self.device),
                null,
                mask[number : number + 1].to(self.device),
                self.config.evaluate.guidance,
                self.config.evaluate.guidance_mode or ("v1" if self._train.objective == "iddpm" else "full"),
            )
            videos.append(vae.decode(latents)[0])
            beat()
        return videos

    def _sampler(self) -> RectifiedFlow | DDIM:
        match self._train.objective:
            case "rectified_flow":
                return RectifiedFlow(STEPS, self._train.shift)
            case "iddpm":
                return DDIM(STEPS)


def _read_picture(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))
