"""What the gate costs on 64 prompts beside the generation of their videos.

    python -m benchmarks.gate        # half a minute on two CPU cores; benchmarks/results/gate.json

A step `promote` as it is run: the files of the candidate and of the champion are hashed, VAE and text encoder with
them, a clip is decoded, every check is made with a paired interval over the prompts, the report is written, and where
the candidate passes its files are copied, a version is registered in SQLite and the alias moves, half a second of
which is the lock's wait. Wall time, in a process that has imported what it needs. Checkpoint and models are small:
reading and copying large ones goes at the speed of the disk and of sha256.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import save
from opensora.clip_file import write_clip
from opensora.config import Gate, Primary, PromoteConfig, load_config
from opensora.evaluation import METRICS_VERSION
from opensora.evaluation.hashes import hash_models
from opensora.models.stdit import STDiT
from opensora.promote import preview, run
from opensora.promotion.paired import paired_interval
from opensora.step import write_json
from opensora.tracking.lineage import lineage
from opensora.tracking.store import connect
from opensora.training.checkpoint import read_info, save_checkpoint, stdit_config

PROMPTS = 64
STAGE = "train_highres"
MODELS = {"vae": 950_000, "t5": 270_000}  # bytes, as of the tiny ones of the embedded world
CONFIG = PromoteConfig(
    gates=(Gate(metric="following", floor=0.5, tolerance=0.1), Gate(metric="fd", direction="lower", floor=90.0)),
    primary=Primary(score="follows"),
)


def candidate(base: Path, seed: int, right: int) -> None:
    """An untrained checkpoint of the profile `demo`, and what `evaluate` leaves of 64 prompts."""
    config = load_config(Path("params.yaml"), "demo")
    torch.manual_seed(seed)
    state = STDiT(stdit_config(config, STAGE, 4)).state_dict()
    for name, size in MODELS.items():
        folder = base / "demo_models" / name
        folder.mkdir(parents=True, exist_ok=True)
        if seed == 1:  # all candidates have the same
            (folder / "model.safetensors").write_bytes(np.random.default_rng(seed).bytes(size))
    info = {"config": config.model_dump(mode="json"), "stage": STAGE, "vae_scale": 4}
    info |= {"vae": "demo_models/vae", "text_encoder": "demo_models/t5"}
    info["lineage"] = lineage() | {"data_revision": "benchmark"}
    folder = save_checkpoint(base / STAGE / "checkpoints", step=700, model=state, ema=state, info=info)
    evaluate = base / "evaluate"
    samples = evaluate / "samples" / STAGE
    samples.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(seed).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    for number in range(PROMPTS):
        write_clip(samples / f"{number:03d}", frames, 8)
    metrics = {"following": right / PROMPTS, "fd": 10.0, "metrics_version": METRICS_VERSION, "fd_extractor": "randconv"}
    metrics |= {
        "samples_per_stage": PROMPTS,
        "shape": "4x32x32, interval 1",
        "extractors": "randconv",
        "distances": {},
        "evaluation_sha256": "e",
    }
    metrics |= {"checkpoint_sha256": read_info(folder)["sha256"], "models_sha256": hash_models(info, folder, base)}
    write_json(evaluate / "metrics.json", metrics)
    scores = [{"follows": int(number < right)} for number in range(PROMPTS)]
    prompts, seeds = [f"prompt {number}" for number in range(PROMPTS)], list(range(PROMPTS))
    stages = {STAGE: scores}
    record = {"metrics_version": METRICS_VERSION, "prompts": prompts, "seeds": seeds, "stages": stages}
    write_json(evaluate / "scores.json", record)


def timed(call: object, *arguments: object) -> float:
    """Wall seconds."""
    start = time.perf_counter()
    call(*arguments)  # type: ignore[operator]
    return round(time.perf_counter() - start, 3)


def main() -> None:
    """Measure, print and keep it."""
    torch.set_num_threads(1)
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        connect(root).search_registered_models()  # a new database is migrated, once
        inputs = (root / "demo" / "evaluate", root / "demo" / STAGE)
        for name, seed, right in (("first model", 1, 40), ("refused", 2, 42), ("accepted", 3, 60)):
            candidate(root / "demo", seed, right)
            if name != "first model":
                figures[f"judgement alone, {name}"] = timed(preview, CONFIG, "demo", *inputs, root)
            figures[f"promote, {name}"] = timed(run, CONFIG, "demo", *inputs, root, root / "demo" / "promote")
            verdict = json.loads((root / "demo" / "promote" / "gate.json").read_text())["verdict"]
            assert (verdict == "rejected") == (name == "refused"), verdict
    figures["paired interval"] = timed(paired_interval, np.linspace(-1, 1, PROMPTS))
    for name, value in figures.items():
        print(f"{name:<30} {value:.3f} s", flush=True)
    print(save("gate", {"command": "python -m benchmarks.gate", "prompts": PROMPTS, "seconds": figures}))


if __name__ == "__main__":
    main()
