"""Encoding: latents and text of every kept clip, readable by key, whole shards, resumable."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from opensora.config import EncodeConfig, ExecutorConfig, load_config
from opensora.data import encode
from opensora.data.encode import group_clips, resize_cover
from opensora.data.shards import read_clip
from opensora.data.video import read_frames
from opensora.manifest import Clip, kept_clips, part_name, read_manifest, write_part
from opensora.models.text import TextEncoder
from opensora.models.vae import FrameVAE
from opensora.step import StepError
from tests.conftest import ROOT

EXECUTOR = ExecutorConfig(kind="sequential", retries=0)
CONFIG = load_config(ROOT / "params.yaml", "smoke").encode.model_copy(update={"workers": 1})


@pytest.fixture(scope="module")
def captioned(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips with captions, one of them dropped."""
    folder = tmp_path_factory.mktemp("caption")
    rows = read_manifest(clips / "score")[:4]
    rows = [replace(row, caption="a red circle moving left" if n else "a square") for n, row in enumerate(rows)]
    rows[3] = replace(rows[3], kept=False, reason="dark")
    write_part(folder / part_name(0), rows)
    return folder


@pytest.fixture(scope="module")
def encoded(
    clips: Path, captioned: Path, vae: Path, text_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("encoded") / "encode"
    report = encode.run(CONFIG, captioned, clips / "split", vae, text_encoder, output, EXECUTOR)
    assert (report.total, report.kept, report.dropped) == (4, 3, {"dark": 1})
    return output


def test_latents_are_those_of_the_frames(encoded: Path, clips: Path, vae: Path, text_encoder: Path) -> None:
    rows = read_manifest(encoded)
    assert not rows[3].latent_shard
    model, text = FrameVAE(vae), TextEncoder(text_encoder)
    for row in kept_clips(rows):
        frames = read_frames(read_clip(clips / "split", row))
        with safe_open(str(encoded / row.latent_shard), "pt") as shard:
            for height, width in CONFIG.sizes:
                mean, deviation = model.encode(resize_cover(frames, height, width))
                for name, expected in (("mean", mean), ("std", deviation)):
                    found = shard.get_tensor(f"{row.clip_id}/{height}x{width}/{name}")
                    assert found.shape == (row.frames, 4, height // 4, width // 4)
                    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=2e-3)
            embedding, mask = text.encode([row.caption], CONFIG.max_tokens)
            found = shard.get_tensor(f"{row.clip_id}/text").float()
            torch.testing.assert_close(found, embedding[0, : int(mask.sum())], atol=2e-3, rtol=2e-3)


def test_a_stopped_run_encodes_only_what_is_missing(
    encoded: Path, clips: Path, captioned: Path, vae: Path, text_encoder: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"shard_mib": 1, "sizes": ((384, 384), (32, 32))})
    rows = read_manifest(captioned)
    assert len(group_clips(kept_clips(rows), config)) > 1
    hurt = tmp_path / "split"
    hurt.mkdir()
    with pytest.raises(StepError, match="1 of 1 shards failed"):
        encode.run(config, captioned, hurt, vae, text_encoder, tmp_path / "encode", EXECUTOR)
    assert not (tmp_path / "encode").exists()
    work = tmp_path / ".partial" / "encode"
    assert not list(work.glob("*.safetensors"))
    encode.run(config, captioned, clips / "split", vae, text_encoder, tmp_path / "encode", EXECUTOR)
    assert len(list((tmp_path / "encode").glob("*.safetensors"))) > 1
    assert not list((tmp_path / "encode").glob("*.part"))


def test_groups_keep_order_and_fill_up() -> None:
    config = EncodeConfig(sizes=((64, 64),), shard_mib=1)
    rows = [Clip(str(n), "x", frames=16) for n in range(100)]
    groups = group_clips(rows, config)
    assert [clip for group in groups for clip in group] == rows
    assert len(groups[0]) > 1
    assert len({len(group) for group in groups[:-1]}) == 1
