"""The measures tell a perfect sampler from a wrong one, and the step leaves what the gate, DVC and people read."""

import errno
import gc
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from opensora.config import ConfigError, UserError, load_config
from opensora.data.reuse import link_file
from opensora.demo.shapes import Scene, all_scenes, render_clip
from opensora.evaluate import run
from opensora.evaluation import METRICS_VERSION
from opensora.evaluation.champion import find_champion, read_kept
from opensora.evaluation.hashes import SOURCES, hash_models
from opensora.evaluation.prompts import describe_seeds, evaluation_prompts
from opensora.evaluation.reference import Shape, rendered_reference
from opensora.evaluation.sampling import Row, describe_sample
from opensora.evaluation.scores import follows, measure, prompt_scores
from opensora.metrics.suite import Suite
from opensora.step import Report, StepError
from opensora.tracking.registry import register
from opensora.tracking.store import connect
from opensora.training.checkpoint import read_info
from tests.conftest import ROOT
from tests.small_disk import small_disk
from tests.test_architecture import own_imports

PROMPTS = [scene.caption for scene in all_scenes()]
SUITE = Suite.load(device="cpu")


def rows(shown: Callable[[Scene], Scene], frames: int = 8) -> list[Row]:
    """What a sampler that shows `shown(scene)` for each prompt gets."""
    rng = np.random.default_rng(3)
    return [describe_sample(SUITE, scene.caption, render_clip(shown(scene), frames, 32, rng)) for scene in all_scenes()]


@pytest.fixture(scope="module")
def real() -> dict[str, np.ndarray]:
    """Features of rendered clips."""
    reference = rendered_reference(PROMPTS, Shape(8, 32, 32, 1), {})
    return {
        "randconv": np.array(
            [SUITE.reference(clip.read(None, reference.shape))["randconv"] for clip in reference.clips]
        )
    }


@pytest.fixture(scope="module")
def perfect(real: dict[str, np.ndarray]) -> dict[str, float]:
    return measure(SUITE, PROMPTS, rows(lambda scene: scene), real)


def test_a_perfect_sampler_is_perfect(perfect: dict[str, float]) -> None:
    for name in (
        "prompt_following_seen",
        "prompt_following_held_out",
        "prompt_following",
        "colour",
        "shape",
        "direction",
    ):
        assert perfect[name] == 1


def test_one_wrong_part_is_seen_alone(perfect: dict[str, float]) -> None:
    back = {"left": "right", "right": "left", "up": "down", "down": "up"}
    wrong = measure(SUITE, PROMPTS, rows(lambda scene: Scene(scene.colour, scene.shape, back[scene.direction])), None)
    assert wrong["direction"] == wrong["prompt_following_seen"] == wrong["prompt_following_held_out"] == 0
    assert wrong["colour"] == wrong["shape"] == 1


def test_one_answer_for_all_prompts_scores_as_chance(perfect: dict[str, float], real: dict[str, np.ndarray]) -> None:
    same = measure(SUITE, PROMPTS, rows(lambda scene: all_scenes()[0]), real)
    assert (same["colour"], same["shape"], same["direction"]) == (1 / 4, 1 / 3, 1 / 4)
    assert same["prompt_following"] == 1 / 48
    assert same["fd_randconv"] > 3 * perfect["fd_randconv"]


def test_noise_shows_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    verdict = follows(PROMPTS[0], describe_sample(SUITE, PROMPTS[0], noise))
    assert verdict is not None
    assert not verdict["prompt_following"]


def test_a_picture_has_no_direction() -> None:
    scores = measure(SUITE, PROMPTS, rows(lambda scene: scene, frames=1), None)
    assert "direction" not in scores
    assert scores["prompt_following_seen"] == 1


def test_other_prompts_are_measured_without_the_detector() -> None:
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    row = describe_sample(SUITE, "a lighthouse", frames)
    names = {"flicker", "dynamic_degree", "motion_smoothness", "flow_degree"}
    assert set(measure(SUITE, ["a lighthouse"], [row], None)) == names == set(prompt_scores(["a lighthouse"], [row])[0])


TINY = ("evaluate.batch_size=1", "evaluate.prompts=[a red circle moving up, a dog, a blue square moving left, a cat]")
ARGUMENTS = {"extra": {"caption_exact_match": 0.5}, "seconds": {"split": 2.0}, "peak_memory_mib": 7.0}


def evaluate(base: Path, *settings: str) -> Report:
    """The step on the stage below `base`, which lies in the root of all results."""
    config = load_config(ROOT / "params.yaml", "smoke", (*TINY, *settings))
    return run(config, {"train_video": base / "train_video"}, base / "evaluate", base.parent, **ARGUMENTS)


def results(base: Path, *without: str) -> dict:
    """metrics.json and scores.json together."""
    both = [json.loads((base / "evaluate" / name).read_text()) for name in ("metrics.json", "scores.json")]
    return {name: value for part in both for name, value in part.items() if name not in without}


@pytest.fixture(scope="module")
def first(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a profile with a stage, evaluated while there was no champion."""
    base = tmp_path_factory.mktemp("first") / "smoke"
    shutil.copytree(checkpoint.parents[2], base)
    evaluate(base)
    return base


def test_the_step_leaves_metrics_scores_gallery_and_samples(first: Path) -> None:
    metrics, folder = json.loads((first / "evaluate" / "metrics.json").read_text()), first / "evaluate"
    assert metrics["caption_exact_match"] == 0.5
    assert metrics["seconds"] == {"split": 2.0}
    assert metrics["metrics_version"] == METRICS_VERSION
    assert (metrics["fd_extractor"], metrics["samples_per_stage"]) == ("randconv", 4)
    assert (metrics["seeds"], metrics["reference_clips"]) == ("1000-1003", 48)
    assert 0 <= metrics["prompt_following_seen"] <= 1
    (newest,) = (first / "train_video" / "checkpoints").glob("step-*")
    assert metrics["checkpoint_sha256"] == read_info(newest)["sha256"]
    assert metrics["models_sha256"] == hash_models(read_info(newest), newest, first / "other")
    assert metrics["absent"]["fvd_videomae"] == "evaluate.videomae is not set"
    scores = json.loads((folder / "scores.json").read_text())
    of_stage = scores["stages"]["train_video"]
    assert (len(of_stage), scores["seeds"], scores["prompts"][1]) == (4, [1000, 1001, 1002, 1003], "a dog")
    assert np.mean([row["flicker"] for row in of_stage]) == pytest.approx(metrics["train_video_flicker"])
    assert ["prompt_following" in row for row in of_stage] == [True, False, True, False]
    assert len(list((folder / "samples" / "train_video").glob("*.mp4"))) == 4
    for name in ("frames.png", "gallery.html", "plots/scores.csv"):
        assert (folder / name).is_file()
    assert not (folder / "champion.json").exists()
    assert evaluate(first) == Report(**json.loads((folder / "report.json").read_text()))  # a repeat does nothing


def test_another_vae_is_another_evaluation(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(first.parent, tmp_path, dirs_exist_ok=True)
    base = tmp_path / "smoke"
    monkeypatch.setattr("opensora.evaluate.measure_all", _refuse)
    evaluate(base)  # nothing to do
    (weights,) = (base / "demo_models" / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(StepError, match="generates"):
        evaluate(base)
    (newest,) = (base / "train_video" / "checkpoints").glob("step-*")
    before, now = results(first)["models_sha256"], hash_models(read_info(newest), newest, tmp_path)
    assert [before[name] == now[name] for name in ("vae", "text_encoder")] == [False, True]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "metrics.json").unlink(),
        lambda folder: (folder / "scores.json").write_text("{"),
        lambda folder: (folder / "samples" / "train_video" / "003.mp4").unlink(),
    ],
    ids=["metrics.json lost", "scores.json damaged", "a clip lost"],
)
def test_an_evaluation_that_lost_something_is_not_done(
    first: Path, tmp_path: Path, spoil: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(first.parent, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / "smoke" / "evaluate")
    monkeypatch.setattr("opensora.evaluate.measure_all", _refuse)
    with pytest.raises(StepError, match="generates"):
        evaluate(tmp_path / "smoke")


def _refuse(*_: object) -> None:
    raise StepError("generates")


def test_a_clip_damaged_in_place_is_generated_again(first: Path, tmp_path: Path) -> None:
    """The name in `samples/` and that in `.cache/` are of one file."""
    shutil.copytree(first.parent, tmp_path, dirs_exist_ok=True)
    base = tmp_path / "smoke"
    clip = base / "evaluate" / "samples" / "train_video" / "000.mp4"
    (kept,) = [path for path in (base / ".cache").rglob("*.mp4") if path.read_bytes() == clip.read_bytes()]
    link_file(kept, clip)
    before = states(base / ".cache" / "evaluate")
    clip.write_bytes(b"no clip")
    evaluate(base)
    assert results(base) == results(first)
    for path in (first / "evaluate" / "samples" / "train_video").iterdir():
        assert (base / path.relative_to(first)).read_bytes() == path.read_bytes()
    after = states(base / ".cache" / "evaluate")
    assert {path for path in before if after[path] != before[path]} == {kept, kept.with_suffix(".json")}


def test_a_stage_without_a_usable_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    base = tmp_path / "smoke"
    shutil.copytree(checkpoint.parents[2], base)
    (base / "train_video" / "checkpoints" / checkpoint.name / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no usable checkpoint"):
        evaluate(base)


def test_a_killed_run_ends_as_one_never_stopped(checkpoint: Path, first: Path, tmp_path: Path) -> None:
    base = tmp_path / "smoke"
    shutil.copytree(checkpoint.parents[2], base)
    shutil.copy(first.parent / "mlflow.db", tmp_path)  # a kill while MLflow makes its tables is not the matter here
    command = f"from tests.test_evaluate import *; evaluate(Path({str(base)!r}))"
    process = subprocess.Popen([sys.executable, "-c", f"{command} if __name__ == '__main__' else None"], cwd=ROOT)
    kept = base / ".cache" / "evaluate"
    try:
        limit = time.monotonic() + 120
        while not list(kept.glob("*/*.json")):
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < limit
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait(60)
    made = states(kept)
    assert made
    assert not (base / "evaluate").exists()
    evaluate(base)
    assert results(base) == results(first)
    assert made.items() <= states(kept).items()  # what was there is not made again
    for clip in (first / "evaluate" / "samples").rglob("*.mp4"):
        assert (base / clip.relative_to(first)).read_bytes() == clip.read_bytes()


def states(folder: Path) -> dict[Path, tuple[int, int]]:
    """Of every row and the clip that lies before it: what tells one file from another of the same name."""
    files = [path for row in folder.glob("*/*.json") for path in (row, row.with_suffix(".mp4"))]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def second(first: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile whose candidate differs from the champion, which is `first`; it has no evaluation of its own."""
    import torch
    from safetensors.torch import load_file

    from opensora.training.checkpoint import save_checkpoint

    base = tmp_path_factory.mktemp("second") / "smoke"
    shutil.copytree(checkpoint.parents[2], base)
    place = base / "train_video" / "checkpoints"
    model, ema = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "ema"))
    torch.manual_seed(1)
    for state in (model, ema):
        state["final_layer.linear.weight"] += 0.05 * torch.randn_like(state["final_layer.linear.weight"])
    info = read_info(checkpoint)
    kept = {name: info[name] for name in ("config", "stage", "vae", "text_encoder", "vae_scale")}
    save_checkpoint(place, step=2, model=model, ema=ema, optimizer={}, rng={}, info=kept)
    shutil.copy(first.parent / "mlflow.db", base.parent)
    _promote(base.parent, first / "train_video" / "checkpoints" / checkpoint.name)
    evaluate(base)
    return base


def _promote(root: Path, folder: Path, **more: str) -> None:
    tags = {"checkpoint.uri": str(folder), "checkpoint.sha256": read_info(folder)["sha256"]} | more
    version = register(root, "opensora-smoke", folder, tags)
    connect(root).set_registered_model_alias("opensora-smoke", "champion", version)


def test_a_champion_without_an_evaluation_generates_the_same_prompts(first: Path, second: Path) -> None:
    champion = json.loads((second / "evaluate" / "champion.json").read_text())
    own, candidate = results(first), results(second)
    assert champion["scores"] == own["stages"]["train_video"] != candidate["stages"]["train_video"]
    assert champion["metrics"]["train_video_flicker"] == own["train_video_flicker"]
    assert champion["metrics"]["prompt_following_seen"] == own["prompt_following_seen"]
    assert champion["metrics"]["evaluation_sha256"] == own["evaluation_sha256"] == candidate["evaluation_sha256"]
    assert candidate["champion_sha256"] == champion["sha256"]
    of = candidate["distances"]["fd_randconv"]
    assert of == {"extractor": "randconv", "sha256": "seed 20240318", "n": 4, "reference_n": 48}
    assert champion["metrics"]["distances"] == candidate["distances"]
    assert champion["metrics"]["shape"] == candidate["shape"] == "4x32x32, interval 1"
    page = (second / "evaluate" / "gallery.html").read_text()
    assert page.count("<figcaption>champion version 1</figcaption>") == 4


def test_a_champions_own_evaluation_is_taken_if_it_was_made_alike(first: Path, second: Path, tmp_path: Path) -> None:
    found, own = results(first), tmp_path / "evaluation"
    shutil.copytree(first / "evaluate", own)
    kept = read_kept(own, "train_video", 32, found["evaluation_sha256"], tmp_path / "work")
    assert kept is not None
    generated = json.loads((second / "evaluate" / "champion.json").read_text())
    assert kept.scores == generated["scores"]
    assert kept.metrics["flicker"] == generated["metrics"]["train_video_flicker"]
    assert kept.distances == generated["metrics"]["distances"]
    clip = Path("samples", "champion", "003.mp4")
    assert kept.files[3] == str(clip)
    assert (tmp_path / "work" / clip).read_bytes() == (second / "evaluate" / clip).read_bytes()

    assert read_kept(own, "train_video", 32, "other prompts", tmp_path / "other") is None
    for spoil in (
        lambda: (own / "samples" / "train_video" / "003.mp4").unlink(),
        lambda: (own / "scores.json").write_text("{"),
        lambda: (own / "metrics.json").write_text("{}"),
    ):
        spoil()
        assert read_kept(own, "train_video", 32, found["evaluation_sha256"], tmp_path / "work") is None


def test_a_champion_that_cannot_be_loaded_is_said(
    second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_champion(tmp_path / "empty", "opensora-smoke", tmp_path) is None
    shutil.copytree(second.parent, tmp_path, dirs_exist_ok=True)
    moved = tmp_path / "moved"
    shutil.copytree(next((second / "train_video" / "checkpoints").glob("step-*")), moved)
    _promote(tmp_path, moved)
    (moved / "ema.safetensors").write_bytes(b"")
    found = find_champion(tmp_path, "opensora-smoke", tmp_path)
    assert found is not None
    assert (found.version, found.checkpoint) == ("2", None)
    assert "ema.safetensors" in found.unavailable
    shutil.rmtree(moved)
    found = find_champion(tmp_path, "opensora-smoke", tmp_path)
    assert found is not None
    assert "holds no checkpoint any more" in found.unavailable
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    found = find_champion(tmp_path, "opensora-smoke", tmp_path)
    assert found is not None
    assert "cannot be asked" in found.unavailable


def test_another_champion_costs_its_own_clips_alone(second: Path, first: Path, tmp_path: Path) -> None:
    """Also one that could not generate, as soon as it can."""
    from safetensors.torch import load_file

    from opensora.training.checkpoint import save_checkpoint

    shutil.copytree(second.parent, tmp_path / "runs")
    base, other = tmp_path / "runs" / "smoke", tmp_path / "other"
    shutil.copytree(first, other)
    (old,) = (other / "train_video" / "checkpoints").glob("step-*")
    info = read_info(old)
    state = load_file(old / "ema.safetensors")
    state[min(state)] += 1
    about = {name: info[name] for name in ("config", "stage", "vae", "text_encoder", "vae_scale")}
    _promote(
        base.parent,
        save_checkpoint(old.parent, step=9, model=load_file(old / "model.safetensors"), ema=state, info=about),
    )
    vae = other / "demo_models" / "vae" / "diffusion_pytorch_model.safetensors"
    whole, before = vae.read_bytes(), states(base / ".cache" / "evaluate")
    vae.write_bytes(whole[: len(whole) // 2])
    evaluate(base)
    assert "vae" in results(base)["champion_unavailable"]
    assert not (base / "evaluate" / "champion.json").exists()

    vae.write_bytes(whole)
    evaluate(base)
    assert "champion_unavailable" not in results(base)
    assert json.loads((base / "evaluate" / "champion.json").read_text())["version"] == "2"
    after = states(base / ".cache" / "evaluate")
    assert len(before) == 2 * 2 * len(results(base)["prompts"])  # of the candidate and of the champion before
    assert before.items() < after.items()
    kept = {inode for inode, _ in before.values()}
    assert {path.stat().st_ino for path in (base / "evaluate" / "samples" / "train_video").iterdir()} <= kept


def test_a_champion_with_another_vae_is_not_measured(second: Path, first: Path, tmp_path: Path) -> None:
    """What it would make is another model's: nothing of it is left that somebody could take for the champion's."""
    shutil.copytree(second.parent, tmp_path / "runs")
    shutil.copytree(first, other := tmp_path / "other")
    base, (folder,) = tmp_path / "runs" / "smoke", (other / "train_video" / "checkpoints").glob("step-*")
    models = {f"{name}.sha256": value for name, value in hash_models(read_info(folder), folder, tmp_path).items()}
    _promote(base.parent, folder, **models)
    vae = other / "demo_models" / "vae" / "diffusion_pytorch_model.safetensors"
    whole = vae.read_bytes()
    vae.write_bytes(whole[:-64] + bytes(64))
    evaluate(base)
    now = hash_models(read_info(folder), folder, tmp_path)["vae"]
    reason = f"{vae.parent} has sha256 {now[:12]}, and the version was registered with vae {models['vae.sha256'][:12]}"
    assert reason in results(base)["champion_unavailable"]
    assert not (base / "evaluate" / "champion.json").exists()

    vae.write_bytes(whole)
    evaluate(base)
    assert "champion_unavailable" not in results(base)
    champions = [json.loads((place / "evaluate" / "champion.json").read_text()) for place in (base, second)]
    assert [found["version"] for found in champions] == ["2", "1"]
    assert champions[0]["scores"] == champions[1]["scores"]


def test_after_a_roll_back_the_candidate_is_compared_with_the_champion(second: Path, tmp_path: Path) -> None:
    """Also where it was evaluated by other settings while it was the champion itself."""
    shutil.copytree(second.parent, tmp_path, dirs_exist_ok=True)
    base = tmp_path / "smoke"
    beside = base / "evaluate" / "champion.json"
    _promote(tmp_path, next((base / "train_video" / "checkpoints").glob("step-*2")))
    evaluate(base, "evaluate.reference_clips=9")
    assert json.loads(beside.read_text())["version"] == "2"
    connect(tmp_path).set_registered_model_alias("opensora-smoke", "champion", "1")
    evaluate(base, "evaluate.reference_clips=9")
    assert json.loads(beside.read_text())["version"] == "1"


def test_a_full_disk_is_nobodys_fault(checkpoint: Path, first: Path, tmp_path: Path) -> None:
    base = tmp_path / "smoke"
    shutil.copytree(checkpoint.parents[2], base)
    shutil.copy(first.parent / "mlflow.db", tmp_path)
    with small_disk(base / ".cache", "24k"), pytest.raises(OSError, match="No space left") as caught:
        evaluate(base)
    assert caught.value.errno == errno.ENOSPC
    assert not (base / "evaluate").exists()
    del caught  # its frames hold the lock of the folder
    gc.collect()
    evaluate(base)
    assert results(base) == results(first)


def test_a_candidate_that_became_champion_is_not_evaluated_again(second: Path, tmp_path: Path) -> None:
    shutil.copytree(second.parent, tmp_path, dirs_exist_ok=True)
    base = tmp_path / "smoke"
    before = (base / "evaluate" / "report.json").stat().st_mtime_ns
    _promote(tmp_path, next((base / "train_video" / "checkpoints").glob("step-*2")))
    evaluate(base)
    assert (base / "evaluate" / "report.json").stat().st_mtime_ns == before


def test_dvc_knows_the_code_that_makes_the_numbers() -> None:
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["evaluate"]["deps"]
    own = [
        ROOT / path for path in deps if path.startswith(("opensora/evaluat", "opensora/gallery", "opensora/metrics"))
    ]
    files = [file for path in own for file in ([path] if path.is_file() else path.glob("*.py"))]
    used = {name for file in files for name in own_imports(file)}
    # What decides where things lie and who makes them, and no number.
    plain = {
        "config",
        "progress",
        "step",
        "weights",
        "data.gpu",
        "data.reuse",
        "data.shards",
        "data.video",
        "data.workers",
    }
    left = {name for name in used - plain if not name.startswith(("tracking.", "training."))}
    assert {"demo.shapes", "clip_file", "generate", "metrics.motion"} <= left
    lacking = [
        name
        for name in left
        if not any(dep in (path, f"{path}.py") for dep in deps for path in paths_of(f"opensora.{name}"))
    ]
    assert lacking == []
    kept_by = [f"opensora/{name}" for name in SOURCES]  # what `evaluate` itself looks at
    assert [path for path in kept_by if not any(path == dep or path.startswith(f"{dep}/") for dep in deps)] == []


def paths_of(module: str) -> list[str]:
    """A module and the packages it is in, as paths."""
    parts = module.split(".")
    return ["/".join(parts[:count]) for count in range(2, len(parts) + 1)]


def test_prompts_come_from_the_configuration_and_its_file(tmp_path: Path) -> None:
    config = load_config(ROOT / "params.yaml", "smoke").evaluate
    (tmp_path / "scenes.txt").write_text("# two\na river\t5\na field\n")
    both = config.model_copy(update={"prompts": ("a cat",), "prompts_file": str(tmp_path / "scenes.txt")})
    assert evaluation_prompts(both) == [("a cat", 1000), ("a river", 5), ("a field", 1002)]
    assert len(evaluation_prompts(config.model_copy(update={"prompts": ()}))) == 48
    with pytest.raises(ConfigError, match=r"no prompts file at none\.txt"):
        evaluation_prompts(config.model_copy(update={"prompts_file": "none.txt"}))
    released = load_config(ROOT / "params.yaml", "h800").evaluate
    assert (ROOT / released.prompts_file).is_file()
    assert (describe_seeds([3, 4, 5]), describe_seeds([3, 5]), describe_seeds([3])) == ("3-5", "3, 5", "3")
