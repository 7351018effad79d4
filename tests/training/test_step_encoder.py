"""Training straight from clips: the losses are those of training from encoded latents, up to how these are stored."""

import json
from pathlib import Path

import numpy as np
import pytest

from opensora.config import Config, ExecutorConfig, load_config
from opensora.data import encode
from opensora.step import write_json
from opensora.training.stages import Source, run
from tests.conftest import ROOT
from tests.data.made_clips import encode as make_clip
from tests.data.made_clips import write_split

ROUNDING = {"float16": 1e-4, "bfloat16": 1e-3}  # of a loss, relative; a number's is 5e-4 and 4e-3, a loss averages many
WORDS = ["a red circle moving left", "a blue square moving up", "a green triangle moving down", ""]


def config(*overrides: str) -> Config:
    common = (
        "train_video.steps=3",
        "train_video.batch_size=2",
        "train_video.lr=1e-3",
        "encode.sizes=[[32,32],[64,64]]",
    )
    return load_config(ROOT / "params.yaml", "smoke", (*common, *overrides))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of 48x60 pixels, as split and caption leave them."""
    random = np.random.default_rng(0)
    made = []
    for index in range(6):
        still = random.integers(0, 256, (48, 60, 3), np.uint8)
        frames = [np.roll(still, number, 1) for number in range(12)]
        made.append(make_clip(frames, clip_id=f"c{index}", caption=WORDS[index % 4]))
    folder = write_split(tmp_path_factory.mktemp("runs") / "split", [made[:3], made[3:]])
    write_json(folder / "report.json", {"step": "caption"})
    write_json(folder / "fingerprint.json", "made here")
    return folder


def losses(values: Config, source: Source, base: Path) -> list[float]:
    run(values, "train_video", source, None, base / "smoke" / "train_video", base)
    lines = (base / "smoke" / "train_video" / "losses.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def from_clips(clips: Path, vae: Path, text_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    source = Source(clips, clips, vae, text_encoder)
    return losses(config("train_video.data=clips"), source, tmp_path_factory.mktemp("clips"))


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_losses_from_clips_are_those_from_latents(
    clips: Path, vae: Path, text_encoder: Path, from_clips: list[float], tmp_path: Path, stored: str
) -> None:
    values = config(f"encode.store_dtype={stored}")
    executor = ExecutorConfig(kind="sequential")
    encode.run(values.encode, clips, clips, vae, text_encoder, tmp_path / "encode", executor)
    from_latents = losses(values, Source(tmp_path / "encode"), tmp_path)
    assert len(set(from_clips)) == 3
    assert from_clips == pytest.approx(from_latents, rel=ROUNDING[stored])
    assert from_clips != from_latents  # they were stored, and rounded
