"""Samples inside the loop: there at their steps, and training does not notice."""

import shutil
from pathlib import Path

from opensora.clip_file import read_note
from tests.training.runs import config, finish, losses, prepare, same, train

PROMPTS = ("a red circle moving left", "a blue square moving up")


def test_samples_are_made_and_training_does_not_notice(
    encoded: Path, vae: Path, text_encoder: Path, tmp_path: Path
) -> None:
    for name in ("plain", "sampled"):
        shutil.copytree(vae, tmp_path / name / "smoke" / "demo_models" / "vae")
        shutil.copytree(text_encoder, tmp_path / name / "smoke" / "demo_models" / "t5")
    plain = train(config(), encoded, tmp_path / "plain")
    values = config("train_video.sample_every=4", f"train_video.sample_prompts={list(PROMPTS)}")
    sampled = train(values, encoded, tmp_path / "sampled")
    same(plain, sampled)
    assert not (plain / "samples").exists()
    for step in (4, 8):
        folder = sampled / "samples" / f"step-{step:08d}"
        assert sorted(path.name for path in folder.iterdir()) == ["00.mp4", "01.mp4", "frames.png"]
        assert [read_note(folder / f"0{number}.mp4") for number in (0, 1)] == list(PROMPTS)
    first, second = ((sampled / "samples" / f"step-{step:08d}" / "00.mp4").read_bytes() for step in (4, 8))
    assert first != second  # it has learnt something between
    spools = list((tmp_path / "sampled" / "smoke" / ".mlflow").glob("*/train_video/spool.jsonl"))
    assert '"key": "samples"' in spools[0].read_text()


def test_one_of_two_processes_makes_the_samples(encoded: Path, vae: Path, text_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(vae, tmp_path / "demo_models" / "vae")
    shutil.copytree(text_encoder, tmp_path / "demo_models" / "t5")
    values = config(
        "train_video.processes=2", "train_video.sample_every=8", f"train_video.sample_prompts={list(PROMPTS[:1])}"
    )
    work = prepare(values, encoded, tmp_path / "work")
    finish(work)
    assert len(losses(work)) == 8
    assert sorted(path.name for path in (work / "samples" / "step-00000008").iterdir()) == ["00.mp4", "frames.png"]
