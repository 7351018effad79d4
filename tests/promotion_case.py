"""What a promotion starts from, made by hand: checkpoints of a last stage and their evaluations."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from opensora.clip_file import write_clip
from opensora.config import Gate, Primary, PromoteConfig
from opensora.evaluation import METRICS_VERSION
from opensora.evaluation.records import hash_models
from opensora.step import CACHE, write_json
from opensora.training.checkpoint import read_info, save_checkpoint

GATES = PromoteConfig(gates=(Gate(metric="following", floor=0.5, tolerance=0.1),))
BETTER = GATES.model_copy(update={"primary": Primary(score="follows")})
PROMPTS = 24
LINEAGE = {"git_commit": "c0ffee", "git_dirty": "false", "data_revision": "data-1"}
# How it was measured; numbers of two models compare where all of it is equal.
BASIS = {"metrics_version": METRICS_VERSION, "samples_per_stage": PROMPTS, "fd_extractor": "randconv"}
BASIS |= {
    "shape": "4x32x32, interval 1",
    "extractors": "randconv",
    "distances": {"fd_randconv": {"n": PROMPTS}},
    "evaluation_sha256": "e",
}


def make_candidate(base: Path, checkpoint: Path, shift: float, lineage: Mapping[str, str] | None = None) -> str:
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
    kept["lineage"] = LINEAGE if lineage is None else lineage
    return read_info(save_checkpoint(train / "checkpoints", step=1, model=state, info=kept))["sha256"]


def make_evaluation(base: Path, sha256: str, right: int, **changes: object) -> Path:
    """Leave what `evaluate` leaves of a candidate that follows `right` of the prompts."""
    folder = base / "evaluate"
    shutil.rmtree(folder, ignore_errors=True)
    samples = folder / "samples" / "train_video"
    samples.mkdir(parents=True)
    write_clip(samples / "000", np.zeros((4, 32, 32, 3), np.uint8), 8)
    (checkpoint,) = (base / "train_video" / "checkpoints").iterdir()
    models = hash_models(read_info(checkpoint, verify=False), checkpoint, base / CACHE)
    metrics = BASIS | {"following": right / PROMPTS, "checkpoint_sha256": sha256, "models_sha256": models, "absent": {}}
    write_json(folder / "metrics.json", metrics | changes)
    scores = [{"follows": int(number < right)} for number in range(PROMPTS)]
    prompts, seeds = [f"prompt {number}" for number in range(PROMPTS)], list(range(PROMPTS))
    stages = {"train_video": scores}
    scores_record = {"metrics_version": METRICS_VERSION, "prompts": prompts, "seeds": seeds, "stages": stages}
    write_json(folder / "scores.json", scores_record)
    return folder


def make_beside(base: Path, version: str, sha256: str, right: int, **changes: object) -> None:
    """Leave what `evaluate` finds of the champion beside the candidate."""
    metrics = BASIS | {"following": right / PROMPTS} | changes
    scores = [{"follows": int(number < right)} for number in range(PROMPTS)]
    found = {"version": version, "sha256": sha256, "metrics": metrics, "scores": scores}
    write_json(base / "evaluate" / "champion.json", found)


def change_json(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)
