"""Checkpoints: folders that appear whole or not at all, carry their hashes and everything that resume needs."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.config import Config, TrainConfig, UserError, build_config
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.step import fingerprint, write_json
from opensora.weights import WeightsError, hash_file, load_strict

VERSION = 1
INFO = "checkpoint.json"
MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
POSITIONS = ("pos_embed", "pos_embed_temporal")  # the model's own, as they follow its size
PREFIX = "step-"
DAMAGED = "damaged-"
log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another version, or does not fit."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and what it says of itself."""

    folder: Path
    config: Config
    stage: str
    step: int
    sha256: str
    info: dict

    @property
    def train(self) -> TrainConfig:
        """The configuration of the stage that made it."""
        return getattr(self.config, self.stage)

    @property
    def model_config(self) -> STDiTConfig:
        """The network."""
        return stdit_config(self.config, self.stage, self.info["vae_scale"])

    def changed(self, fields: Mapping[str, object]) -> "Checkpoint":
        """The same weights for another configuration of the stage, as in more frames."""
        train = TrainConfig.model_validate(self.train.model_dump() | dict(fields))
        return replace(self, config=self.config.model_copy(update={self.stage: train}))

    @property
    def vae(self) -> Path:
        """Folder of the VAE; raises CheckpointError where it is missing."""
        return locate(self.info["vae"], self.folder)

    @property
    def text_encoder(self) -> Path:
        """Folder of the text encoder; raises CheckpointError where it is missing."""
        return locate(self.info["text_encoder"], self.folder)


def stdit_config(config: Config, stage: str, vae_scale: int) -> STDiTConfig:
    """The network of one stage; `vae_scale` is the number of pixels a latent column."""
    train: TrainConfig = getattr(config, stage)
    return STDiTConfig(
        input_size=(train.frames, train.height // vae_scale, train.width // vae_scale),
        space_scale=train.space_scale,
        time_scale=train.time_scale,
        **config.model.model_dump(),
    )


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: Mapping[str, Tensor],
    info: dict[str, object],
    ema: Mapping[str, Tensor] | None = None,
    rng: list[Tensor] | None = None,
    optimizer: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder/step-N` under a temporary name, fsync, rename; returns its path. For rank 0.

    Averages, random states and optimizer are what a resumed training needs; imported weights have none.
    """
    final = folder / f"{PREFIX}{step:08d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in model.items()}, part / MODEL)
    if ema is not None:
        save_file({name: value.contiguous() for name, value in ema.items()}, part / EMA)
    if optimizer is not None:
        save_file({name: value.contiguous() for name, value in optimizer.items()}, part / OPTIMIZER)
    if rng is not None:
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
    raise CheckpointError(
        f"{near} needs {name}, which is in none of the folders above it; "
        "put it there, or name another folder by --vae or --text-encoder"
    )


def load_weights(model: STDiT, folder: Path, weights: Literal["ema", "model"]) -> None:
    """Load a checkpoint's weights, the average's where it has one; position tables stay the model's own.

    Raises:
        CheckpointError: tensors are missing, unexpected or mis-shaped; all of them are named.
    """
    state = load_file(folder / MODEL)
    if weights == "ema" and (folder / EMA).is_file():
        state |= load_file(folder / EMA)
    try:
        load_strict(model, state, computed=POSITIONS)
    except WeightsError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def describe_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint's description, its files' hashes verified and its weights not loaded yet.

    Args:
        folder: a `step-N` folder, or one that holds `step-N` folders or `checkpoints/` (the newest is taken).

    Raises:
        CheckpointError: see `read_info`.
    """
    folder = Path(folder)
    search = not (folder / INFO).is_file()
    if search:
        folder = newest_checkpoint(folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder)
    info = read_info(folder, verify=not search)  # what was searched for is verified already
    return Checkpoint(folder, build_config(info["config"]), info["stage"], info["step"], info["sha256"], info)


def load_checkpoint(described: Checkpoint | Path, weights: Literal["ema", "model"] = "ema") -> STDiT:
    """The model of a checkpoint, ready for sampling.

    Raises:
        CheckpointError: see `describe_checkpoint` and `load_weights`.
    """
    checkpoint = described if isinstance(described, Checkpoint) else describe_checkpoint(described)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        model = STDiT(checkpoint.model_config)
    load_weights(model, checkpoint.folder, weights)
    return model.eval()
