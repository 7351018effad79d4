"""How much memory generation will need, said before anything is loaded, and what would fit instead."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from opensora.config import UserError
from opensora.models.stdit import STDiT, STDiTConfig

GIB = 2**30
BASE = 0.6 * GIB  # Python, PyTorch and the other libraries
# Tensors of [B, N, C] that are alive at the peak of a pass without gradients, which lies in a block's MLP: the block's
# input, the residual stream, the modulated input, four of the hidden layer, the output; and one for all the rest.
LIVE_TENSORS = 9
LIVE_VAE_TENSORS = 8  # of the first width at full size, at the peak of the VAE's decoder
BYTES = {"float32": 4, "bfloat16": 2}


class MemoryShort(UserError):
    """The machine has too little memory for what was asked; the message says what would fit."""


@dataclass(frozen=True)
class Generation:
    """What is to be generated, as far as it decides memory."""

    model: STDiTConfig  # `input_size` is the latents' size
    batch_size: int  # videos at once
    guided: bool  # two passes in one batch
    dtype: str  # of the model
    vae: Path
    vae_scale: int  # pixels a latent column
    text_encoder: Path
    text_dtype: str

    def parts(self) -> dict[str, dict[str, float]]:
        """Bytes by part for the three phases; the text encoder has left when the model comes."""
        import torch

        with torch.device("meta"):
            parameters = sum(value.numel() for value in STDiT(self.model).parameters())
        size = BYTES[self.dtype]
        frames, rows, columns = self.model.grid
        rows_of_batch = self.batch_size * (2 if self.guided else 1)
        tokens = frames * rows * columns * rows_of_batch
        model = {"model": float(parameters * size)}
        _, height, width = self.model.input_size
        pixels = height * width * self.vae_scale**2
        video = {"videos": float(self.batch_size * frames * pixels * 3)}
        return {
            "text": {"text encoder": text_encoder_bytes(self.text_encoder, BYTES[self.text_dtype])},
            "sampling": model | {"activations": float(LIVE_TENSORS * tokens * self.model.hidden_size * size)},
            "decoding": model | video | vae_bytes(self.vae, frames * self.batch_size * pixels, size),
        }

    def peak(self) -> float:
        """Bytes at the most demanding phase."""
        return BASE + max(sum(part.values()) for part in self.parts().values())


def text_encoder_bytes(folder: Path, size: int) -> float:
    """Bytes of a T5 encoder's weights, from its config.json; of another encoder, those of its files."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "t5":
        return float(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    width, layers = config["d_model"], config["num_layers"]
    attention = 4 * width * config["d_kv"] * config["num_heads"]
    matrices = 3 if "gated" in config.get("feed_forward_proj", "") else 2
    return float(size * (config["vocab_size"] * width + layers * (attention + matrices * width * config["d_ff"])))


def vae_bytes(folder: Path, pixels: int, size: int) -> dict[str, float]:
    """Bytes of a VAE's weights and of one micro-batch that it decodes, of a video of that many pixels."""
    from opensora.models.vae import BATCH_PIXELS

    config = json.loads((folder / "config.json").read_text())
    weights = sum(path.stat().st_size for path in folder.glob("diffusion_pytorch_model.*"))
    live = LIVE_VAE_TENSORS * config["block_out_channels"][0] * size
    return {"VAE": float(weights), "one micro-batch of frames": float(min(pixels, BATCH_PIXELS) * live)}


def free_memory(device: str) -> float:
    """Bytes that can be taken now on the device, for "cpu" within the limit of the container, too."""
    if device != "cpu":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    import psutil

    free = float(psutil.virtual_memory().available)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, float(text) - float(used.read_text()))
    return free


def check_memory(generation: Generation, device: str) -> None:
    """Refuse what would not fit.

    Raises:
        MemoryShort: says by parts what is needed, what is free, and the nearest settings that fit.
    """
    free, needed = free_memory(device), generation.peak()
    if needed <= free:
        return
    phase, parts = max(generation.parts().items(), key=lambda item: sum(item[1].values()))
    detail = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items())
    fitting = next((how for how, other in _smaller(generation) if other.peak() <= free), "")
    advice = f"it would fit with {fitting}" if fitting else "no smaller setting of these fits this machine"
    raise MemoryShort(
        f"this needs about {needed / GIB:.1f} GiB of memory ({phase}: {detail}), and {free / GIB:.1f} GiB are free on "
        f"{device}; {advice}"
    )


def check_resident_memory(generation: Generation, device: str) -> None:
    """Refuse to hold the text encoder, the model and the VAE in memory together where they do not fit.

    Raises:
        MemoryShort: says what is needed and what is free.
    """
    parts = generation.parts()
    text = sum(parts["text"].values())
    needed = BASE + text + max(sum(parts[phase].values()) for phase in ("sampling", "decoding"))
    free = free_memory(device)
    if needed > free:
        raise MemoryShort(
            f"this model needs about {needed / GIB:.1f} GiB of memory with its text encoder ({text / GIB:.1f} GiB) "
            f"kept beside it, and {free / GIB:.1f} GiB are free on {device}; free some, or take a machine with more"
        )


def _smaller(generation: Generation) -> Iterator[tuple[str, Generation]]:
    """Settings that need less, the least painful first."""
    while generation.batch_size > 1:
        generation = replace(generation, batch_size=generation.batch_size // 2)
        yield f"--batch-size {generation.batch_size}", generation
    how = "--batch-size 1"
    if generation.dtype == "float32":
        generation = replace(generation, dtype="bfloat16")
        how += " --dtype bfloat16"
        yield how, generation
    frames, height, width = generation.model.input_size
    while frames > 1:
        frames //= 2
        smaller = replace(generation, model=replace(generation.model, input_size=(frames, height, width)))
        yield f"{how} --frames {frames}", smaller
    while min(height, width) > 1:
        height, width = max(height // 2, 1), max(width // 2, 1)
        smaller = replace(generation, model=replace(generation.model, input_size=(1, height, width)))
        scale = generation.vae_scale
        yield f"{how} --frames 1 --height {height * scale} --width {width * scale}", smaller
