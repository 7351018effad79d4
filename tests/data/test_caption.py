"""Captions: each on its own clip, given ones kept, cut-off and empty ones recorded, a stopped run goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from opensora.config import CaptionConfig, ExecutorConfig, load_config
from opensora.data import caption
from opensora.data.caption import CUT_OFF, Captioner, pick_frames
from opensora.demo.captioner import caption_exact_match, train_llava
from opensora.demo.shapes import all_scenes, detect, render_clip
from opensora.manifest import GIVEN, Clip, list_parts, read_manifest, read_part, write_part
from opensora.step import StepError
from tests.conftest import ROOT

EXECUTOR = ExecutorConfig(kind="sequential", retries=0)
CONFIG = load_config(ROOT / "params.yaml", "smoke").caption


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA that has hardly learnt anything."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    rng = np.random.default_rng(0)
    pairs = [(render_clip(scene, 3, 32, rng), scene.caption) for scene in all_scenes()[:4]]
    train_llava(folder, pairs, prompt=CONFIG.prompt, steps=1, seed=0)
    return folder


class Seer:
    """Stands where LLaVA stands and says what the detector sees, so that a mixed-up clip would show."""

    said = 0

    def __init__(self, folder: Path, config: CaptionConfig) -> None:
        self.config = config

    def __call__(self, clips: list[np.ndarray]) -> list[str]:
        Seer.said += len(clips)
        seen = [detect(frames) for frames in clips]
        return [f"a {d.colour} {d.shape} moving {d.direction}" for d in seen]


@pytest.fixture
def seer(monkeypatch: pytest.MonkeyPatch) -> type[Seer]:
    monkeypatch.setattr(caption, "Captioner", Seer)
    Seer.said = 0
    return Seer


def run(clips: Path, model: Path, output: Path, **changes: object) -> list[Clip]:
    config = CONFIG.model_copy(update={"batch_size": 3, **changes})
    caption.run(config, clips / "score", clips / "split", model, output, EXECUTOR)
    return read_manifest(output)


def test_every_caption_is_on_its_own_clip(clips: Path, llava: Path, tmp_path: Path, seer: type[Seer]) -> None:
    rows = run(clips, llava, tmp_path / "caption")
    assert seer.said == sum(row.caption_model == "llava" for row in rows) == len(rows) // 2
    assert caption_exact_match(tmp_path / "caption", clips / "demo_videos" / "truth.json") == 1
    before = {row.clip_id: row.caption for row in read_manifest(clips / "score") if row.caption}
    given = {row.clip_id: row.caption for row in rows if row.caption_model == GIVEN}
    assert given == before
    assert len(given) == len(rows) // 2
    assert {row.caption_prompt for row in rows if row.caption_model == "llava"} == {CONFIG.prompt}


def test_a_stopped_run_goes_on_after_its_last_whole_line(
    clips: Path, llava: Path, tmp_path: Path, seer: type[Seer], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(clips, llava, tmp_path / "whole")

    class Stops(Seer):
        def __call__(self, batch: list[np.ndarray]) -> list[str]:
            if Seer.said >= 6:
                raise KeyboardInterrupt
            return super().__call__(batch)

    Seer.said = 0
    monkeypatch.setattr(caption, "Captioner", Stops)
    with pytest.raises(KeyboardInterrupt):
        run(clips, llava, tmp_path / "caption")
    lines = tmp_path / ".partial" / "caption" / "captions-00000.jsonl"
    lines.write_text(lines.read_text()[:-9])  # the last line is torn
    done = len(lines.read_text().splitlines()) - 1
    Seer.said = 0
    monkeypatch.setattr(caption, "Captioner", Seer)
    assert run(clips, llava, tmp_path / "caption") == whole
    assert Seer.said == len(whole) // 2 - done


def test_cut_off_and_empty_captions_are_dropped_with_their_reason(
    clips: Path, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(Seer):
        def __call__(self, batch: list[np.ndarray]) -> list[str]:
            return ["", "a long story" + CUT_OFF, "a red circle"][: len(batch)]

    monkeypatch.setattr(caption, "Captioner", Odd)
    rows = run(clips, llava, tmp_path / "caption")
    dropped = {row.reason.split(":")[0] for row in rows if not row.kept}
    assert dropped == {"caption empty", "caption cut off"}
    assert all(row.kept == (row.caption in ("a red circle",) or row.caption_model == GIVEN) for row in rows)


def test_the_real_model_marks_what_reached_the_limit(clips: Path, llava: Path) -> None:
    rng = np.random.default_rng(1)
    frames = [render_clip(scene, 3, 32, rng) for scene in all_scenes()[:3]]
    texts = Captioner(llava, CONFIG.model_copy(update={"max_new_tokens": 1}))(frames)
    assert all(text.endswith(CUT_OFF) for text in texts)
    longer = Captioner(llava, CONFIG.model_copy(update={"max_new_tokens": 20}))
    assert longer(frames) == [longer([one])[0] for one in frames]  # a batch says what single clips say


def test_a_chain_without_any_caption_stops(clips: Path, llava: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    shutil.copytree(clips / "score", tmp_path / "score")
    for path in list_parts(tmp_path / "score"):
        write_part(path, [replace(row, caption="", caption_model="") for row in read_part(path)])
    config = CONFIG.model_copy(update={"max_new_tokens": 1})
    with pytest.raises(StepError, match=r"raise|max_new_tokens"):
        caption.run(config, tmp_path / "score", clips / "split", llava, tmp_path / "caption", EXECUTOR)
    assert not (tmp_path / "caption").exists()


def test_frames_are_picked_by_position(clips: Path) -> None:
    from opensora.data.shards import read_clip
    from opensora.data.video import read_frames

    clip = read_manifest(clips / "score")[0]
    data = read_clip(clips / "split", clip)
    frames = read_frames(data)
    picked = pick_frames(data, (0.0, 0.5, 1.0))
    assert np.array_equal(picked, frames[[0, len(frames) // 2, len(frames) - 1]])


def test_captions_are_one_json_a_line(clips: Path, llava: Path, tmp_path: Path, seer: type[Seer]) -> None:
    folder = tmp_path / "lines"
    folder.mkdir()
    rows = [row for row in read_manifest(clips / "score") if not row.caption][:2]
    known = caption._caption(rows, clips / "split", Seer(llava, CONFIG), folder / "lines.jsonl")
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    assert {line["clip_id"]: line["caption"] for line in lines} == known
