"""Checkpoints: folders that appear whole or not at all, carry their hashes and everything that resume needs."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.config import Config, TrainConfig, UserError, build_config
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.step import fingerprint, write_json

VERSION = 1
INFO = "checkpoint.json"
PREFIX = "step-"
DAMAGED = "damaged-"
log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another version, or does not fit."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint loaded for use."""

    model: STDiT
    config: Config
    stage: str
    step: int
    sha256: str
    vae: Path
    text_encoder: Path

    @property
    def train(self) -> TrainConfig:
        """The configuration of the stage that made it."""
        return getattr(self.config, self.stage)


def stdit_config(config: Config, stage: str, vae_scale: int) -> STDiTConfig:
    """The network of one stage; `vae_scale` is the number of pixels a latent column."""
    train: TrainConfig = getattr(config, stage)
    return STDiTConfig(
        input_size=(train.frames, train.height // vae_scale, train.width // vae_scale),
        space_scale=train.space_scale,
        time_scale=train.time_scale,
        **config.model.model_dump(),
    )


def hash_file(path: Path) -> str:
    """sha256 of a file's content."""
    digest = sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: dict[str, Tensor],
    ema: dict[str, Tensor],
    rng: list[Tensor],
    save_optimizer: Callable[[Path], None],
    info: dict[str, object],
) -> Path:
    """Write `folder/step-N` under a temporary name, fsync, rename; returns its path. For rank 0."""
    final = folder / f"{PREFIX}{step:08d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in model.items()}, part / "model.safetensors")
    save_file({name: value.contiguous() for name, value in ema.items()}, part / "ema.safetensors")
    save_optimizer(part / "optimizer.pt")
    torch.save(rng, part / "rng.pt")
    files = {path.name: hash_file(path) for path in sorted(part.iterdir())}
    write_json(part / INFO, {"version": VERSION, "step": step, "files": files, "sha256": fingerprint(files), **info})
    for path in [*part.iterdir(), part]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)
    return final


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in _checkpoints(folder)[keep:]:
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob(f"{PREFIX}*"), reverse=True)


def read_info(folder: Path, verify: bool = True) -> dict:
    """The checkpoint's own description.

    Raises:
        CheckpointError: missing, of another version, or a file's hash differs from the one recorded.
    """
    try:
        info = json.loads((folder / INFO).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {folder} (no {INFO} there)") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / INFO} is damaged: {error}") from None
    if info.get("version") != VERSION:
        raise CheckpointError(f"{folder} has checkpoint version {info.get('version')}, expected {VERSION}")
    if info["sha256"] != fingerprint(info["files"]):
        raise CheckpointError(f"{folder / INFO} was changed by hand: its sha256 is not that of the files it lists")
    for name, expected in info["files"].items() if verify else ():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        if hash_file(path) != expected:
            raise CheckpointError(f"{folder} is damaged: {name} has another sha256 than recorded")
    return info


def newest_checkpoint(folder: Path, set_aside: bool = False) -> Path:
    """The newest undamaged checkpoint below `folder`; damaged ones are renamed when `set_aside`.

    Raises:
        CheckpointError: there is none.
    """
    for path in _checkpoints(folder):
        try:
            read_info(path)
            return path
        except CheckpointError as error:
            log.warning("%s; using the checkpoint before it", error)
            if set_aside:
                path.rename(path.with_name(DAMAGED + path.name))
    raise CheckpointError(f"no usable checkpoint in {folder}; train that stage first")


def locate(name: str, near: Path) -> Path:
    """A folder named in a checkpoint: absolute, or relative to one of the folders above the checkpoint."""
    for parent in (Path("/"), *near.resolve().parents):
        if (parent / name).is_dir() and (parent != Path("/") or Path(name).is_absolute()):
            return parent / name
    raise CheckpointError(f"{near} needs {name}, which is in none of the folders above it")


def load_weights(model: STDiT, folder: Path, weights: Literal["ema", "model"]) -> None:
    """Load a checkpoint's weights; position tables are the model's own, as they follow its size.

    Raises:
        CheckpointError: tensors are missing, unexpected or mis-shaped; all of them are named.
    """
    state = load_file(folder / "model.safetensors")
    if weights == "ema":
        state |= load_file(folder / "ema.safetensors")
    own = model.state_dict()
    positions = {name for name in own if name.startswith("pos_embed")}
    wrong = [f"missing {name}" for name in own if name not in state and name not in positions]
    wrong += [f"unexpected {name}" for name in state if name not in own]
    wrong += [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and name not in positions and state[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{folder} does not fit the model: {'; '.join(wrong)}")
    model.load_state_dict({name: state[name] if name not in positions else own[name] for name in own})


def load_checkpoint(folder: Path, weights: Literal["ema", "model"] = "ema") -> Checkpoint:
    """A checkpoint ready for sampling, its hashes verified.

    Args:
        folder: a `step-N` folder, or one that holds `step-N` folders or `checkpoints/` (the newest is taken).

    Raises:
        CheckpointError: see `read_info` and `load_weights`.
    """
    folder = Path(folder)
    if not (folder / INFO).is_file():
        folder = newest_checkpoint(folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder)
    info = read_info(folder)
    config = build_config(info["config"])
    model = STDiT(stdit_config(config, info["stage"], info["vae_scale"])).eval()
    load_weights(model, folder, weights)
    vae, text = locate(info["vae"], folder), locate(info["text_encoder"], folder)
    return Checkpoint(model, config, info["stage"], info["step"], info["sha256"], vae, text)
