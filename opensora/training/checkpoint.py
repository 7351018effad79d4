"""Checkpoints: folders that appear whole or not at all, carry their hashes and everything that resume needs.

One form serves every engine, strategy and number of processes: whole tensors by parameter name, in float32.

    step-00000500/
        checkpoint.json         version, step, stage, configuration, place in the data, counters, sha256 of all files,
                                lineage: code, image and data of the run that wrote it
        model.safetensors       weights and buffers
        ema.safetensors         averages of what is trained
        optimizer.safetensors   exp_avg/NAME, exp_avg_sq/NAME, step/NAME
        rng.safetensors         RANK/cpu and RANK/cuda: states of every process's generators
"""

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.config import Config, TrainConfig, UserError, build_config
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.step import fingerprint, sync, write_json
from opensora.weights import WeightsError, hash_file, load_strict

VERSION = 2
INFO = "checkpoint.json"
MODEL, EMA, OPTIMIZER, RNG = (f"{name}.safetensors" for name in ("model", "ema", "optimizer", "rng"))
SAMPLED = (MODEL, EMA)  # what sampling reads; a copy that only samples may lack the rest
MODELS = ("vae", "text_encoder")  # that sampling needs besides; checkpoint.json names their folders
POSITIONS = ("pos_embed", "pos_embed_temporal")  # the model's own, as they follow its size
PREFIX = "step-"
DAMAGED = "damaged-"
log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another version, does not fit, or cannot be written."""


class DamagedError(CheckpointError):
    """A checkpoint's files are not those that were written."""


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
    optimizer: Mapping[str, Tensor] | None = None,
    rng: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder/step-N` under a temporary name, fsync, rename; returns its path. For rank 0.

    Averages, optimizer and random states are what a resumed training needs; imported weights have none.

    Raises:
        CheckpointError: it could not be written, as on a full disk; nothing of it is left.
    """
    final = folder / f"{PREFIX}{step:08d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, tensors in ((MODEL, model), (EMA, ema), (OPTIMIZER, optimizer), (RNG, rng)):
            if tensors is not None:
                save_file({key: value.contiguous() for key, value in tensors.items()}, part / name)
        files = {path.name: hash_file(path) for path in sorted(part.iterdir())}
        values = {"version": VERSION, "step": step, "files": files, "sha256": fingerprint(files), **info}
        write_json(part / INFO, values)
        for path in [*part.iterdir(), part]:
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder} ({error}); what was saved before is "
            "whole, and a new start goes on from it"
        ) from error
    return final


def remove_old(folder: Path, keep: int, every: int = 0) -> None:
    """Delete all but the newest `keep` checkpoints and those of steps that `every` divides, if it is not 0."""
    for path in _checkpoints(folder)[keep:]:
        if not every or step_of(path) % every:
            shutil.rmtree(path)


def step_of(path: Path) -> int:
    """The number of a `step-N` folder."""
    return int(path.name.removeprefix(PREFIX))


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob(f"{PREFIX}[0-9]*"), key=step_of, reverse=True)


def read_info(folder: Path, verify: bool = True, only: Collection[str] | None = None) -> dict:
    """The checkpoint's own description.

    Args:
        verify: read the files and compare their hashes.
        only: names of files; the others are not looked at.

    Raises:
        CheckpointError: of another version.
        DamagedError: a file is missing, or its hash differs from the one recorded.
    """
    try:
        info = json.loads((folder / INFO).read_text())
    except FileNotFoundError:
        raise DamagedError(f"no checkpoint at {folder} (no {INFO} there)") from None
    except ValueError as error:
        raise DamagedError(f"{folder / INFO} is damaged: {error}") from None
    if info.get("version") != VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint version {info.get('version')}, and this program reads version {VERSION}; train "
            "that stage anew, import released weights anew, or use the program that wrote it"
        )
    if info["sha256"] != fingerprint(info["files"]):
        raise DamagedError(f"{folder / INFO} was changed by hand: its sha256 is not that of the files it lists")
    for name, expected in info["files"].items() if verify else ():
        if only is not None and name not in only:
            continue
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{folder} is damaged: {name} is missing")
        found = hash_file(path)
        if found != expected:
            raise DamagedError(
                f"{folder} is damaged: {name} has another sha256 than recorded: found {found}, expected {expected}"
            )
    return info


def find_newest(folder: Path, verify: bool = True, tidy: bool = False) -> Path | None:
    """The newest undamaged checkpoint below `folder`, if there is one.

    Args:
        verify: read every file and compare its hash.
        tidy: rename damaged ones, and remove what a killed process had begun to write; for the one that writes there.

    Raises:
        CheckpointError: the newest one is of another version.
    """
    for part in folder.glob(f".{PREFIX}*.part") if tidy else ():
        shutil.rmtree(part)
    for path in _checkpoints(folder):
        try:
            read_info(path, verify)
            return path
        except DamagedError as error:
            log.warning("%s; using the checkpoint before it", error)
            if tidy:
                aside = path.with_name(DAMAGED + path.name)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
    return None


def newest_checkpoint(folder: Path) -> Path:
    """The newest undamaged checkpoint below `folder`.

    Raises:
        CheckpointError: there is none, or it is of another version.
    """
    path = find_newest(folder)
    if path is None:
        raise CheckpointError(f"no usable checkpoint in {folder}; train that stage first")
    return path


def check_same(folder: Path, info: Mapping[str, Any], stage: str, model: STDiTConfig) -> None:
    """See that a checkpoint is one of this stage and network.

    Raises:
        CheckpointError: it is not; both values are named.
    """
    there = stdit_config(build_config(info["config"]), info["stage"], info["vae_scale"])
    pairs = {"stage": (info["stage"], stage)}
    pairs |= {field.name: (getattr(there, field.name), getattr(model, field.name)) for field in fields(STDiTConfig)}
    wrong = [f"{name} {one} there and {other} here" for name, (one, other) in pairs.items() if one != other]
    if wrong:
        raise CheckpointError(
            f"{folder} is not of what is trained here: {', '.join(wrong)}; go on with its own values, or move it away "
            "to start anew"
        )


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
    """A checkpoint's description, the hashes of what sampling reads verified and its weights not loaded yet.

    Args:
        folder: a `step-N` folder, or one that holds `step-N` folders or `checkpoints/` (the newest is taken).

    Raises:
        CheckpointError: see `read_info`.
    """
    folder = Path(folder)
    search = not (folder / INFO).is_file()
    if search:
        folder = newest_checkpoint(folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder)
    info = read_info(folder, verify=not search, only=SAMPLED)  # what was searched for is verified already
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
