"""What `opensora plan` foretells is the peak that a GPU's own allocator counted in the kept benchmark."""

import json

import pytest

from opensora.config import load_config
from opensora.gpus import GIB
from opensora.training_memory import training_memory
from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "gpu-nvidia-h200.json"
# Compiled blocks keep somewhat less than the plan counts; it has no formula for what a compiler joins.
STEPS = {
    name: figures
    for name, figures in json.loads(RESULTS.read_text())["steps"].items()
    if name.startswith("stdit ") and " eager " in name
}


@pytest.mark.parametrize("name", STEPS)
def test_peak_of_the_full_model(name: str) -> None:
    _, size, recompute = name.split()[:3]
    frames, height, _ = (int(number) for number in size.split("x"))
    stage = "train_video" if height == 256 else "train_highres"
    values = {
        "frames": frames,
        "batch_size": STEPS[name]["batch"],
        "activation_checkpointing": recompute,
    }
    changes = tuple(f"{stage}.{key}={value}" for key, value in values.items())
    config = load_config(ROOT / "params.yaml", "single_gpu", changes)
    train = getattr(config, stage)
    foretold = training_memory(config, train, train).peak / GIB
    assert foretold == pytest.approx(STEPS[name]["peak_gib"], rel=0.03)
