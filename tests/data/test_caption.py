"""Captions: each on its own clip, given ones kept, faults retried and recorded, and nothing asked twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opensora.config import CaptionConfig, ExecutorConfig, load_config
from opensora.data import caption, endpoint
from opensora.data.caption import STOPPED
from opensora.data.clip_scores import ClipScorer
from opensora.data.measure import POSITIONS
from opensora.data.shards import read_clip
from opensora.data.video import VideoError, pick_frames, read_frames
from opensora.demo.captioner import caption_exact_match, train_llava
from opensora.demo.shapes import all_scenes, render_clip
from opensora.manifest import GIVEN, Clip, list_parts, part_name, read_manifest, read_part, write_part
from opensora.step import Report, StepError
from tests.conftest import ROOT
from tests.data.caption_server import CaptionServer, Reply, Request, caption_server, see
from tests.data.tiny_clip import build_clip

SEQUENTIAL = ExecutorConfig(kind="sequential", retries=0)
SMOKE = load_config(ROOT / "params.yaml", "smoke").caption


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def scored(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The score step's manifest as if it had dropped nothing: sixteen clips in two parts, half with captions."""
    folder = tmp_path_factory.mktemp("scored") / "score"
    folder.mkdir()
    for path in list_parts(clips / "score"):
        write_part(folder / path.name, [replace(row, kept=True, reason="") for row in read_part(path)])
    return folder


@pytest.fixture(scope="module")
def bare(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with no caption given and one clip dropped."""
    folder = tmp_path_factory.mktemp("bare") / "score"
    folder.mkdir()
    for path in list_parts(scored):
        rows = [replace(row, caption="", caption_model="") for row in read_part(path)]
        if path.name == part_name(0):
            rows[1] = replace(rows[1], kept=False, reason="static: earlier")
        write_part(folder / path.name, rows)
    assert len(list_parts(folder)) == 2
    return folder


@pytest.fixture(scope="module")
def frames_of(clips: Path, scored: Path) -> dict[str, str]:
    """What the detector sees in each clip."""
    seen = {}
    for row in read_manifest(scored):
        pictures = list(pick_frames(read_clip(clips / "split", row), SMOKE.frame_positions))
        seen[row.clip_id] = see(Request({}, {}, pictures, 0))
    return seen


def config(server: CaptionServer, **changes: object) -> CaptionConfig:
    values = {"backend": "endpoint", "endpoint": server.url, "model": "seer", "concurrency": 2, "retries": 1}
    return SMOKE.model_copy(update=values | changes)


def run(
    settings: CaptionConfig, inputs: Path, clips: Path, output: Path, executor: ExecutorConfig = SEQUENTIAL
) -> tuple[list[Clip], Report]:
    report = caption.run(settings, inputs, clips / "split", None, output, executor)
    rows = read_manifest(output)
    assert [row.clip_id for row in rows] == [row.clip_id for row in read_manifest(inputs)]
    assert report.total == len(rows) == report.kept + sum(report.dropped.values())
    return rows, report


def lines(folder: Path) -> list[dict]:
    """All answers kept below a profile's folder."""
    paths = sorted((folder / ".cache" / "captions").rglob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_every_caption_is_on_its_own_clip_and_given_ones_are_kept(
    clips: Path, scored: Path, tmp_path: Path, frames_of: dict[str, str]
) -> None:
    with caption_server() as server:
        rows, report = run(config(server), scored, clips, tmp_path / "caption")
        assert report == caption.run(config(server), scored, clips / "split", None, tmp_path / "caption", SEQUENTIAL)
    before = {row.clip_id: row.caption for row in read_manifest(scored) if row.caption}
    assert {row.clip_id: row.caption for row in rows if row.caption_model == GIVEN} == before
    generated = [row for row in rows if row.caption_model == "endpoint/seer"]
    assert len(before) == len(generated) == len(server.requests) == len(rows) // 2
    assert {row.caption_prompt for row in generated} == {SMOKE.prompt}
    assert all(row.caption == frames_of[row.clip_id] for row in generated)
    assert caption_exact_match(tmp_path / "caption", clips / "demo_videos" / "truth.json") == 1
    counts = {name: report.metrics[name] for name in ("given", "generated", "asked", "retried")}
    assert counts == {"given": 8, "generated": 8, "asked": 8, "retried": 0}
    assert report.metrics["clips_per_second"] > 0
    assert {path.suffix for path in (tmp_path / "caption").iterdir()} == {".parquet", ".json", ".jsonl"}


def test_any_executor_and_order_of_answers_gives_the_same_bytes(
    bare: Path, clips: Path, tmp_path: Path, frames_of: dict[str, str]
) -> None:
    with caption_server() as server:
        rows, _ = run(config(server, concurrency=1), bare, clips, tmp_path / "one" / "caption")
        wide = config(server, concurrency=5, workers=2)
        run(wide, bare, clips, tmp_path / "two" / "caption", ExecutorConfig(kind="pool"))
    kept = [row for row in rows if row.kept]
    assert len(server.requests) == 2 * len(kept) == 2 * (len(rows) - 1)
    assert all(row.caption == frames_of[row.clip_id] for row in kept)
    for path in list_parts(tmp_path / "one" / "caption"):
        assert path.read_bytes() == (tmp_path / "two" / "caption" / path.name).read_bytes()


def test_bad_answers_are_asked_for_once_more_and_then_recorded(
    bare: Path, clips: Path, tmp_path: Path, frames_of: dict[str, str]
) -> None:
    replies = {
        0: Reply(text=" "),
        2: Reply(text="A long story of", finish="length"),
        3: Reply(text="I'm sorry, I can't."),
        4: Reply(text="It turns. " * 20, finish="length"),
    }
    given: dict[str, Reply] = {}

    def script(request: Request) -> Reply | None:
        if request.is_probe:
            return None
        if request.number - 1 in replies:
            given[request.clip] = replies[request.number - 1]
        relents = given.get(request.clip) is replies[4] and "seed" in request.body
        return None if relents else given.get(request.clip)

    with caption_server(script) as server:
        settings = config(server, concurrency=1, caption_retries=2)
        rows, report = run(settings, bare, clips, tmp_path / "caption")
    assert report.dropped == {"static": 1, "caption empty": 1, "caption cut off": 1, "caption refused": 1}
    assert report.metrics["retried"] == 4
    asked = Counter(server.asked())
    assert [asked[clip] for clip in given] == [3, 3, 3, 2]
    assert all(row.caption == (frames_of[row.clip_id] if row.kept else "") for row in rows)
    reasons = {row.reason for row in rows if row.caption_model and not row.kept}
    assert "caption cut off: raise caption.max_new_tokens" in reasons
    assert "caption refused: I'm sorry, I can't." in reasons


def test_a_request_that_the_server_refuses_drops_its_clip(
    bare: Path, clips: Path, tmp_path: Path, frames_of: dict[str, str]
) -> None:
    with caption_server(lambda request: Reply(400, "bad picture") if request.number == 3 else None) as server:
        rows, report = run(config(server), bare, clips, tmp_path / "caption")
    (failed,) = [row for row in rows if row.reason.startswith("caption")]
    assert failed.reason == "caption failed: HTTP 400 bad picture"
    assert report.dropped == {"static": 1, "caption failed": 1}
    assert len(lines(tmp_path)) == len(server.requests) - 1  # an error is no answer


def test_other_thresholds_prompts_and_limits_ask_what_they_must(bare: Path, clips: Path, tmp_path: Path) -> None:
    """A new manifest, whatever its parts, asks only about clips without an answer."""
    half = tmp_path / "half"
    half.mkdir()
    rows = read_manifest(bare)
    write_part(half / part_name(0), rows[8:])
    cut_off = Reply(text="It begins and", finish="length")
    with caption_server(lambda request: cut_off if request.number in (2, 10, 12) else None) as server:
        settings = config(server, concurrency=1, caption_retries=0)
        run(settings, half, clips, tmp_path / "caption")
        assert len(server.requests) == 8
        again, _ = run(settings, bare, clips, tmp_path / "caption")
        assert len(server.requests) == len(rows) - 1
        moved, _ = run(settings.model_copy(update={"max_bad_share": 0.9}), bare, clips, tmp_path / "caption")
        assert len(server.requests) == len(rows) - 1
        assert moved == again
        # Only the three that reached the limit are asked with a higher one.
        raised, report = run(settings.model_copy(update={"max_new_tokens": 99}), bare, clips, tmp_path / "caption")
        assert len(server.requests) == len(rows) - 1 + 3
        assert report.metrics["asked"] == 3
        assert report.dropped == {"static": 1}
        assert [row.caption for row in raised if row.kept and "begins" not in row.caption]
        run(settings.model_copy(update={"prompt": "and now"}), bare, clips, tmp_path / "caption")
        assert len(server.requests) == 2 * (len(rows) - 1) + 3
    abouts = sorted((tmp_path / ".cache" / "captions").glob("*/about.json"))
    assert {json.loads(path.read_text())["prompt"] for path in abouts} == {SMOKE.prompt, "and now"}


def test_generated_captions_that_fit_too_badly_are_dropped_with_the_reason(
    bare: Path, scored: Path, clips: Path, tmp_path: Path
) -> None:
    model = build_clip(tmp_path / "clip")
    output = tmp_path / "caption"

    def step(server: CaptionServer, inputs: Path, limit: float | None) -> tuple[dict[str, Clip], Report]:
        shutil.rmtree(output, ignore_errors=True)
        report = caption.run(
            config(server), inputs, clips / "split", None, output, SEQUENTIAL, clip=model, min_text_match=limit
        )
        return {row.clip_id: row for row in read_manifest(output)}, report

    with caption_server() as server:
        rows, report = step(server, scored, None)
        told = {name: row for name, row in rows.items() if row.caption_model != GIVEN}
        assert (len(told), report.metrics["generated"], report.kept) == (8, 8, 16)
        scorer = ClipScorer(model)
        for row in told.values():
            frames = pick_frames(read_clip(clips / "split", row), POSITIONS)
            assert row.scores["text_match"] == pytest.approx(scorer.text_match([frames], [row.caption])[0], abs=1e-4)
        limit = sorted(row.scores["text_match"] for row in told.values())[3]
        judged, report = step(server, scored, limit)
        bad = {name for name, row in told.items() if row.scores["text_match"] < limit}
        assert bad
        assert {name for name, row in judged.items() if not row.kept} == bad
        assert all(judged[name].reason.startswith("mismatched: text_match ") for name in bad)
        assert all(judged[name].caption == told[name].caption for name in bad)
        assert (report.dropped, report.kept) == ({"mismatched": len(bad)}, 16 - len(bad))
        assert (report.metrics["given"], report.metrics["generated"]) == (8, 8 - len(bad))
        assert len(server.requests) == 8  # another threshold asks nothing again
        with pytest.raises(
            StepError, match=r"no clip fits its caption \(.*15 mismatched.*; lower score.min_text_match"
        ):
            step(server, bare, 1.1)


CHILD = """
import sys
from pathlib import Path
from opensora.config import CaptionConfig, ExecutorConfig
from opensora.data import caption
values, inputs, shards, output, kind = sys.argv[1:]
config = CaptionConfig.model_validate_json(values)
caption.run(config, Path(inputs), Path(shards), None, Path(output), ExecutorConfig(kind=kind, retries=0))
"""


@pytest.mark.parametrize("kind", ["sequential", "pool"])
def test_a_killed_run_goes_on_and_asks_nothing_twice(
    bare: Path, clips: Path, tmp_path: Path, kind: str, frames_of: dict[str, str]
) -> None:
    """kill -9 while two requests wait for their answers."""
    full, go_on = threading.Event(), threading.Event()

    def script(request: Request) -> None:
        if request.number > 4:
            if request.number == 6:
                full.set()
            go_on.wait(60)

    with caption_server(script) as server:
        settings = config(server, workers=1)
        arguments = [settings.model_dump_json(), str(bare), str(clips / "split"), str(tmp_path / "caption"), kind]
        process = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], cwd=ROOT, start_new_session=True)
        try:
            assert full.wait(60)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the workers too
            process.wait()
        assert len(lines(tmp_path)) == 4
        assert not (tmp_path / "caption").exists()
        open_ones = set(server.asked()[4:])
        go_on.set()
        rows, report = run(settings, bare, clips, tmp_path / "caption")
    assert all(row.caption == frames_of[row.clip_id] for row in rows if row.kept)
    assert report.metrics["asked"] == len(rows) - 1 - 4
    repeated = {clip for clip, count in Counter(server.asked()).items() if count > 1}
    assert repeated == open_ones  # nobody heard their answers


def test_a_server_that_dies_stops_every_shard_and_the_next_run_goes_on(
    bare: Path, clips: Path, tmp_path: Path, frames_of: dict[str, str]
) -> None:
    dead = True

    def script(request: Request) -> Reply | None:
        return Reply(None) if dead and len(server.requests) > 3 else None

    executor = ExecutorConfig(kind="sequential", retries=1)
    with caption_server(script) as server:
        settings = config(server)
        with pytest.raises(StepError, match=r"2 of 2 shards failed .*answers no more"):
            run(settings, bare, clips, tmp_path / "caption", executor)
        assert len(lines(tmp_path)) == 3
        assert len(server.requests) <= 3 + 2 * 2  # by the first shard, once
        assert server.probes <= 3
        assert (tmp_path / ".partial" / "caption" / STOPPED).is_file()
        dead = False
        rows, report = run(settings, bare, clips, tmp_path / "caption", executor)
    assert report.metrics["asked"] == len(rows) - 1 - 3
    assert all(row.caption == frames_of[row.clip_id] for row in rows if row.kept)
    assert not (tmp_path / "caption" / STOPPED).exists()


def test_a_server_that_is_down_drops_nothing(bare: Path, clips: Path, tmp_path: Path) -> None:
    with caption_server() as server:
        pass
    with pytest.raises(StepError, match="no captioning server answers at http://127"):
        run(config(server), bare, clips, tmp_path / "caption")
    assert not (tmp_path / "caption").exists()


def test_no_server_is_needed_when_every_clip_has_a_caption(clips: Path, scored: Path, tmp_path: Path) -> None:
    (tmp_path / "score").mkdir()
    rows = [replace(row, caption="a cat", caption_model=GIVEN) for row in read_manifest(scored)]
    write_part(tmp_path / "score" / part_name(0), rows)
    with caption_server() as server:
        pass
    captioned, report = run(config(server), tmp_path / "score", clips, tmp_path / "caption")
    assert captioned == rows
    assert report.metrics == {"given": 16, "generated": 0, "asked": 0, "retried": 0}


def test_too_many_clips_without_a_caption_fail_the_step_with_the_reasons(
    bare: Path, clips: Path, tmp_path: Path
) -> None:
    ill = True

    def script(request: Request) -> Reply | None:
        return Reply(400, "oops") if ill and request.number % 2 and not request.is_probe else None

    with caption_server(script) as server:
        settings = config(server, max_bad_share=0.3)
        with pytest.raises(StepError, match=r"8 of 15 clips got no caption.*max_bad_share=0\.3 \(8 caption failed\)"):
            run(settings, bare, clips, tmp_path / "caption")
        assert not (tmp_path / "caption").exists()
        ill = False
        _, report = run(settings, bare, clips, tmp_path / "caption")
    assert report.dropped == {"static": 1}
    assert report.metrics["asked"] == 8


def test_a_clip_that_does_not_decode_is_dropped_and_a_missing_shard_stops(
    bare: Path, clips: Path, tmp_path: Path
) -> None:
    shutil.copytree(clips / "split", tmp_path / "split")
    row = read_manifest(bare)[0]
    with (tmp_path / "split" / row.shard).open("r+b") as handle:
        handle.seek(row.offset)
        handle.write(bytes(row.size))
    with caption_server() as server:
        rows, report = run(config(server), bare, tmp_path, tmp_path / "caption")
        assert report.dropped == {"static": 1, "unreadable": 1}
        assert rows[0].reason.startswith("unreadable: ")
        assert len(server.requests) == len(rows) - 2
        last = read_manifest(bare)[-1]
        (tmp_path / "split" / last.shard).unlink()
        with pytest.raises(StepError, match=f"{last.shard} .*is missing; run `opensora split`"):
            run(config(server, prompt="other"), bare, tmp_path, tmp_path / "caption")


def test_llava_captions_through_the_same_step(clips: Path, scored: Path, tmp_path: Path) -> None:
    """A model that has learnt nothing and may say one word: every clip is dropped, and that fails the step."""
    rng = np.random.default_rng(0)
    pairs = [(render_clip(scene, 3, 32, rng), scene.caption) for scene in all_scenes()[:4]]
    train_llava(tmp_path / "llava", pairs, prompt=SMOKE.prompt, steps=0, seed=0)
    settings = SMOKE.model_copy(update={"max_new_tokens": 1, "batch_size": 3, "max_bad_share": 1.0})

    def captioned(settings: CaptionConfig) -> Report:
        return caption.run(settings, scored, clips / "split", tmp_path / "llava", tmp_path / "caption", SEQUENTIAL)

    report = captioned(settings)
    assert sum(report.dropped.values()) == 8
    assert set(report.dropped) <= {"caption cut off", "caption empty"}
    assert (report.metrics["asked"], report.metrics["retried"]) == (8, 8)
    assert report.metrics["seconds_per_clip_per_gpu"] > 0
    rows = read_manifest(tmp_path / "caption")
    assert {row.caption_model for row in rows} == {GIVEN, "llava/llava"}
    assert len(lines(tmp_path)) == 16
    with pytest.raises(StepError, match=r"8 of 8 clips got no caption.*caption cut off.*max_new_tokens"):
        captioned(settings.model_copy(update={"max_bad_share": 0.5}))
    assert len(lines(tmp_path)) == 16
    train_llava(tmp_path / "llava", pairs, prompt=SMOKE.prompt, steps=0, seed=1)  # the same files, other weights
    captioned(settings)
    assert len(lines(tmp_path)) == 32


def test_frames_are_picked_by_position_and_exact(clips: Path, scored: Path) -> None:
    clip = read_manifest(scored)[0]
    data = read_clip(clips / "split", clip)
    frames = read_frames(data)
    picked = pick_frames(data, (0.0, 0.5, 1.0, 0.2, 0.2))
    at = [0, len(frames) // 2, len(frames) - 1, len(frames) // 5, len(frames) // 5]
    assert np.array_equal(picked, frames[at])


@pytest.mark.parametrize("count", [1, 2, 29, 30, 31, 95])
def test_frames_are_exact_over_key_frames(count: int) -> None:
    import io
    from fractions import Fraction

    from opensora.data.cut import ClipWriter

    rng = np.random.default_rng(count)
    writer = ClipWriter(buffer := io.BytesIO(), 64, 48, Fraction(30000, 1001), 18, 30)
    for frame in rng.integers(0, 255, (count, 6, 8, 3), dtype=np.uint8):
        writer.add_rgb(np.kron(frame, np.ones((8, 8, 1), np.uint8)))
    writer.finish()
    data = buffer.getvalue()
    frames, positions = read_frames(data), (0.99, 0.2, 0.5, 0.8, 0.34)
    assert np.array_equal(pick_frames(data, positions), frames[[int(position * count) for position in positions]])


@pytest.mark.parametrize("data", [b"", b"no video" * 99], ids=["empty", "text"])
def test_bytes_that_are_no_clip(data: bytes) -> None:
    with pytest.raises(VideoError, match="unreadable: "):
        pick_frames(data, (0.5,))
