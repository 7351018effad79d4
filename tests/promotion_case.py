"""What a promotion starts from, made by hand: checkpoints of a last stage and their evaluations."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from opensora.clip_file import write_clip
from opensora.config import Gate, Primary, PromoteConfig
from opensora.step import write_json
from opensora.training.checkpoint import read_info, save_checkpoint

GATES = PromoteConfig(gates=(Gate(metric="following", floor=0.5, tolerance=0.1),))
BETTER = GATES.model_copy(update={"primary": Primary(score="follows")})
PROMPTS = 24


def make_candidate(base: Path, checkpoint: Path, shift: float) -> str:
    """Put a checkpoint whose first weight is moved by `shift` in the place of the last stage; returns its sha256."""
    info = read_info(checkpoint)
    train = base / info["stage"]
    shutil.rmtree(train, ignore_errors=True)
    for name in ("vae", "text_encoder"):
        shutil.copytree(checkpoint.parents[2] / info[name], base / info[name], dirs_exist_ok=True)
    state = load_file(checkpoint / "model.safetensors")
    first = min(state)
    state[first] = state[first] + shift
    kept = {name: info[name] for name in ("config", "stage", "vae", "text_encoder", "vae_scale")}
    return read_info(save_checkpoint(train / "checkpoints", step=1, model=state, info=kept))["sha256"]


def make_evaluation(base: Path, sha256: str, right: int, **changes: object) -> Path:
    """Leave what `evaluate` leaves of a candidate that follows `right` of the prompts."""
    folder = base / "evaluate"
    shutil.rmtree(folder, ignore_errors=True)
    samples = folder / "samples" / "train_video"
    samples.mkdir(parents=True)
    write_clip(samples / "000", np.zeros((4, 32, 32, 3), np.uint8), 8)
    metrics = {"following": right / PROMPTS, "metrics_version": 1, "fd_extractor": "randconv"}
    metrics |= {"samples_per_stage": PROMPTS, "checkpoint_sha256": sha256, "absent": {}}
    write_json(folder / "metrics.json", metrics | changes)
    scores = [{"follows": int(number < right)} for number in range(PROMPTS)]
    prompts, seeds = [f"prompt {number}" for number in range(PROMPTS)], list(range(PROMPTS))
    stages = {"train_video": scores}
    write_json(folder / "scores.json", {"metrics_version": 1, "prompts": prompts, "seeds": seeds, "stages": stages})
    return folder


def change_json(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)
