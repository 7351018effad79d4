"""Generation: the same seed gives the same frames, whatever else is in the batch; nothing is made twice or lost."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora import generation_memory
from opensora.clip_file import read_note
from opensora.config import ConfigError
from opensora.data.video import probe, read_frames
from opensora.generate import (
    RECORD,
    RELEASED_SIZES,
    Pipeline,
    Sampling,
    SeededNoise,
    choose_sampling,
    choose_size,
    generate,
    read_prompts,
)
from opensora.generation_memory import MemoryShort
from opensora.training.checkpoint import Checkpoint, CheckpointError, describe_checkpoint, load_checkpoint
from tests.conftest import ROOT

PROMPTS = ["a red circle moving left", "a blue square moving up", "a green triangle moving down"]
FLOW = Sampling("rectified_flow", 2, 2.0, "full")


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Pipeline:
    return Pipeline.load(checkpoint)


@pytest.fixture(scope="module")
def iddpm(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A checkpoint of a stage trained with IDDPM, beside the same VAE and text encoder."""
    from opensora.config import load_config
    from opensora.models.stdit import STDiT
    from opensora.training.checkpoint import save_checkpoint, stdit_config

    base = tmp_path_factory.mktemp("iddpm")
    shutil.copytree(checkpoint.parents[2] / "demo_models", base / "demo_models")
    changes = ("train_video.objective=iddpm", "model.pred_sigma=true", "evaluate.guidance=3.0", "evaluate.steps=4")
    config = load_config(ROOT / "params.yaml", "smoke", changes)
    torch.manual_seed(0)
    model = STDiT(stdit_config(config, "train_video", 4))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    info = {"vae": "demo_models/vae", "text_encoder": "demo_models/t5", "vae_scale": 4, "stage": "train_video"}
    return save_checkpoint(
        base, step=0, model=model.state_dict(), info=info | {"config": config.model_dump(mode="json")}
    )


def make(checkpoint: Path, out: Path, prompts: list[str], seeds: list[int], **settings: object) -> list[Path]:
    sampling = settings.pop("sampling", FLOW)
    return list(generate(Pipeline.load(checkpoint), prompts, seeds, out, sampling, **settings))  # type: ignore[arg-type]


def sample(pipeline: Pipeline, prompts: list[str], seeds: list[int], sampling: Sampling) -> np.ndarray:
    return pipeline.sample(pipeline.embed(prompts), seeds, sampling)


@pytest.mark.parametrize("sampler", ["rectified_flow", "iddpm", "ddim", "dpm_solver"])
def test_a_video_depends_on_its_seed_and_prompt_not_on_its_batch(checkpoint: Path, iddpm: Path, sampler: str) -> None:
    pipeline = Pipeline.load(checkpoint if sampler == "rectified_flow" else iddpm)
    how = Sampling(sampler, 3, 2.0, "full")  # type: ignore[arg-type]
    together = sample(pipeline, PROMPTS, [5, 6, 7], how)
    assert together.shape == (3, 4, 32, 32, 3)
    assert together.dtype == np.uint8
    alone = sample(pipeline, PROMPTS[1:2], [6], how)
    assert np.abs(alone[0].astype(int) - together[1]).max() <= 1  # another batch, another order of sums
    assert np.array_equal(sample(pipeline, PROMPTS, [5, 6, 7], how), together)
    assert not np.array_equal(sample(pipeline, PROMPTS[1:2], [8], how)[0], together[1])
    assert not np.array_equal(sample(pipeline, PROMPTS[:1], [6], how)[0], together[1])


def test_no_two_steps_or_seeds_share_their_noise() -> None:
    noise = SeededNoise([1, 2], (4, 1, 8, 8))
    draws = [noise[number][row] for number in (-1, 0, 1, 2) for row in range(2)]
    for index, draw in enumerate(draws):
        for other in draws[index + 1 :]:
            assert abs(torch.corrcoef(torch.stack([draw.flatten(), other.flatten()]))[0, 1]) < 0.3
    assert torch.equal(SeededNoise([2], (4, 1, 8, 8))[1][0], noise[1][1])


def test_files_are_named_described_and_not_made_twice(checkpoint: Path, tmp_path: Path) -> None:
    paths = make(checkpoint, tmp_path, PROMPTS[:2], [1, 2], batch_size=2)
    assert [path.name.split("-seed")[0] for path in paths] == ["a-red-circle-moving-left", "a-blue-square-moving-up"]
    assert all(read_frames(path.read_bytes()).shape == (4, 32, 32, 3) for path in paths)
    lines = [json.loads(line) for line in (tmp_path / RECORD).read_text().splitlines()]
    assert [(line["prompt"], line["seed"], line["steps"]) for line in lines] == [(PROMPTS[0], 1, 2), (PROMPTS[1], 2, 2)]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    again = make(checkpoint, tmp_path, PROMPTS[:2], [1, 2])
    assert sorted(again) == sorted(paths)
    assert paths[0].stat().st_mtime_ns == times[0]
    assert paths[1].is_file()


@pytest.mark.parametrize("form", ["mp4", "gif", "png"])
def test_what_made_a_file_stands_in_its_metadata_and_in_the_record(checkpoint: Path, tmp_path: Path, form: str) -> None:
    (path,) = make(checkpoint, tmp_path, ["ein Kreis, кружок, 円"], [3], form=form, fps=12)
    note = json.loads(read_note(path))
    described = describe_checkpoint(checkpoint)
    expected = {"prompt": "ein Kreis, кружок, 円", "seed": 3, "checkpoint": described.sha256, "fps": 12, "steps": 2}
    assert expected.items() <= note.items()
    assert {"sampler", "guidance", "guidance_mode", "frames", "height", "width", "form", "dtype"} <= set(note)
    assert json.loads((tmp_path / RECORD).read_text()) == note | {"file": path.name}
    if form == "mp4":
        assert probe(path).fps == 12


def test_other_settings_are_other_files(checkpoint: Path, tmp_path: Path) -> None:
    first = make(checkpoint, tmp_path, PROMPTS[:1], [1])
    changes = ({"fps": 4}, {"sampling": Sampling("rectified_flow", 3, 2.0, "full")}, {"form": "gif"})
    others = [make(checkpoint, tmp_path, PROMPTS[:1], [1], **change)[0] for change in changes]
    assert len({*first, *others}) == 4
    long = "a red circle " * 20
    assert len(set(make(checkpoint, tmp_path, [long + "left", long + "right"], [1, 1]))) == 2


def test_the_same_seed_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    (first,), (second,) = (make(checkpoint, tmp_path / name, PROMPTS[:1], [3]) for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_a_line_that_a_kill_cut_off_is_made_again_and_swallows_nothing(checkpoint: Path, tmp_path: Path) -> None:
    paths = make(checkpoint, tmp_path, PROMPTS[:2], [1, 2])
    record = tmp_path / RECORD
    record.write_text(record.read_text()[:-30])
    assert make(checkpoint, tmp_path, PROMPTS[:2], [1, 2]) == paths
    times = [path.stat().st_mtime_ns for path in paths]
    assert sorted(make(checkpoint, tmp_path, PROMPTS[:2], [1, 2])) == sorted(paths)
    assert [path.stat().st_mtime_ns for path in paths] == times


def test_a_killed_run_goes_on_with_what_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a red circle moving left {number}\n" for number in range(6)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "opensora.cli", "generate", "--checkpoint", str(checkpoint), "--steps", "60"]
    command += ["--prompts-file", str(prompts), "--out", str(out), "--text-cache", str(tmp_path / "text")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None and not (out / RECORD).is_file():
                time.sleep(0.01)
        finally:
            process.kill()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    kept = {json.loads(line)["file"] for line in (out / RECORD).read_text().splitlines()}
    assert 1 <= len(kept) < 6
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert len(done.stdout.splitlines()) == 6
    assert all(read_frames(Path(line).read_bytes()).shape == (4, 32, 32, 3) for line in done.stdout.splitlines())
    assert all((out / name).stat().st_mtime_ns == before[name] for name in kept)
    assert not list(out.glob("*.part"))


def test_defaults_are_those_of_evaluation(checkpoint: Path, iddpm: Path) -> None:
    flow, noise = describe_checkpoint(checkpoint), describe_checkpoint(iddpm)
    assert choose_sampling(flow) == Sampling("rectified_flow", 2, 4.0, "full")
    assert choose_sampling(noise) == Sampling("iddpm", 4, 3.0, "v1")
    assert choose_sampling(noise, "dpm_solver") == Sampling("dpm_solver", 20, 3.0, "full")
    assert choose_sampling(noise, "ddim", 7, 1.5, "full") == Sampling("ddim", 7, 1.5, "full")


def test_samplers_that_do_not_fit_are_refused(checkpoint: Path, iddpm: Path) -> None:
    with pytest.raises(ConfigError, match="iddpm does not sample a model trained with rectified_flow"):
        choose_sampling(describe_checkpoint(checkpoint), "iddpm")
    with pytest.raises(ConfigError, match="choose iddpm or ddim or dpm_solver"):
        choose_sampling(describe_checkpoint(iddpm), "rectified_flow")
    for steps in (1, 1001):
        with pytest.raises(ConfigError, match=f"--steps {steps}: ddim takes 2 to 1000"):
            choose_sampling(describe_checkpoint(iddpm), "ddim", steps)


def test_any_size(checkpoint: Path, tmp_path: Path) -> None:
    described = describe_checkpoint(checkpoint)
    changes = choose_size(described.train, 4, frames=7, height=64, width=36)
    assert changes["space_scale"] == pytest.approx(described.train.space_scale * (64 * 36 / 32**2) ** 0.5)
    pipeline = Pipeline(described.changed(changes))
    (path,) = generate(pipeline, PROMPTS[:1], [1], tmp_path, FLOW)
    assert read_frames(path.read_bytes()).shape == (7, 64, 36, 3)
    (picture,) = generate(Pipeline(described.changed({"frames": 1})), PROMPTS[:1], [1], tmp_path, FLOW)
    assert picture.suffix == ".png"


def test_released_sizes(checkpoint: Path) -> None:
    train = describe_checkpoint(checkpoint).train
    for name, (expected, _) in RELEASED_SIZES.items():
        assert choose_size(train, 8, name) == expected
        assert name == f"{expected['frames']}x{expected['height']}x{expected['width']}"
    assert choose_size(train, 8, "64x512x512", frames=32)["frames"] == 32
    with pytest.raises(ConfigError, match="unknown profile '16x256'"):
        choose_size(train, 8, "16x256")


@pytest.mark.parametrize(("value", "message"), [(250, "nearest are 248 and 256"), (3, "nearest are 8 and 16")])
def test_sizes_that_do_not_divide_name_the_nearest(checkpoint: Path, value: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_size(describe_checkpoint(checkpoint).train, 8, height=value)


def test_too_little_memory_is_said_before_anything_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_memory, "free_memory", lambda device: 0.9 * generation_memory.GIB)
    pipeline = Pipeline(describe_checkpoint(checkpoint).changed({"frames": 20_000}))
    with pytest.raises(MemoryShort, match=r"it would fit with --batch-size 1 --dtype bfloat16 --frames \d+"):
        next(iter(generate(pipeline, PROMPTS[:1], [1], tmp_path, FLOW)))
    assert (pipeline._model, pipeline._vae) == (None, None)


def test_bf16_is_near_float32(checkpoint: Path) -> None:
    described = describe_checkpoint(checkpoint)
    exact, low = (sample(Pipeline(described, dtype=t), PROMPTS, [1, 2, 3], FLOW) for t in ("float32", "bfloat16"))
    assert np.abs(exact.astype(int) - low).mean() < 3


def test_micro_batches_of_the_vae_leave_no_seam_between_frames(pipeline: Pipeline) -> None:
    latents = torch.randn(1, 4, 9, 8, 8)
    whole = pipeline.vae.decode(latents, micro_batch=9).astype(int)
    for size in (1, 2, 4):
        assert np.abs(pipeline.vae.decode(latents, micro_batch=size) - whole).max() <= 1


def test_a_long_prompt_is_cut_with_a_warning(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        (path,) = make(checkpoint, tmp_path, ["a red circle moving left " * 400], [1])
    assert "tokens, and 8 are read" in caplog.text
    assert len(path.name) < 120


def test_a_text_encoder_without_a_tokenizer_is_named(checkpoint: Path, tmp_path: Path) -> None:
    from opensora.weights import WeightsError

    described = describe_checkpoint(checkpoint)
    shutil.copytree(described.text_encoder, tmp_path / "t5")
    for path in (tmp_path / "t5").glob("*token*"):
        path.unlink()
    pipeline = Pipeline(described, text_encoder=tmp_path / "t5")
    with pytest.raises(WeightsError, match="has no tokenizer"):
        next(iter(generate(pipeline, PROMPTS[:1], [1], tmp_path, FLOW)))


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# scenes\nfirst\n\nsecond\t77\nthird\n")
    assert read_prompts(path, 10) == [("first", 10), ("second", 77), ("third", 12)]
    path.write_text("first\tsoon\n")
    with pytest.raises(ConfigError, match="line 1: the seed 'soon'"):
        read_prompts(path, 0)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(path, 0)


def test_the_project_s_prompts_are_whole_and_have_seeds_of_their_own() -> None:
    pairs = read_prompts(ROOT / "prompts" / "scenes.txt", -1)
    assert len(pairs) >= 20
    assert len({text for text, _ in pairs}) == len({seed for _, seed in pairs}) == len(pairs)
    assert min(seed for _, seed in pairs) > 0


def test_a_checkpoint_that_is_damaged_or_does_not_fit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "smoke" / "train_video" / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, copy)
    with pytest.raises(CheckpointError, match="needs demo_models/vae"):
        Pipeline.load(copy)
    other = describe_checkpoint(copy)
    wide = other.config.model.model_copy(update={"mlp_ratio": 2.0})
    changed = Checkpoint(
        copy, other.config.model_copy(update={"model": wide}), other.stage, other.step, other.sha256, other.info
    )
    with pytest.raises(CheckpointError, match=r"mlp\.fc1\.weight is \[128, 32\], expected \[64, 32\]"):
        load_checkpoint(changed)
    with (copy / "ema.safetensors").open("r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"hurt")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors has another sha256"):
        Pipeline.load(copy)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        Pipeline.load(tmp_path)
