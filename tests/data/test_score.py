"""The step: measured once and per part, judged as often as wanted, duplicates across parts, damage recorded."""

import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opensora.config import ExecutorConfig, ScoreConfig
from opensora.data import score
from opensora.data.executor import STATUS
from opensora.data.judge import apply_thresholds, judge
from opensora.manifest import Clip, part_name, read_manifest, read_part, read_table, write_part
from opensora.step import Report, StepError
from opensora.weights import WeightsError
from tests.conftest import ROOT, killed_in_the_end
from tests.data.made_clips import Made, encode, write_split
from tests.data.tiny_clip import build_clip, build_linear_head

EXECUTOR = ExecutorConfig(kind="sequential", retries=0)
ALL = ScoreConfig(min_duration_s=None, min_short_side=None, max_black=None, min_frame_difference=None)
SIZE = (64, 96, 3)


def moving(seed: int, frames: int = 8) -> np.ndarray:
    """A picture of its own that moves."""
    picture = np.kron(np.random.default_rng(seed).integers(30, 220, (8, 12, 1)), np.ones((8, 8, 3))).astype(np.uint8)
    return np.stack([np.roll(picture, 2 * index, axis=1) for index in range(frames)])


def made(name: str, seed: int, **about: str) -> Made:
    return encode(moving(seed), fps=8, clip_id=name, caption=about.get("caption", ""))


@pytest.fixture(scope="module")
def parts() -> list[list[Made]]:
    """Four parts; `d` and `b` are the same picture, `c` is a row that an earlier step dropped, `f` stands still."""
    dropped = (b"", Clip("c", "c.mp4", kept=False, reason="unreadable: no picture in it"))
    again = encode(moving(2), fps=8, crf=30, clip_id="d")
    still = encode([moving(6)[0]] * 8, fps=8, clip_id="f")
    return [[made("a", 1), made("b", 2)], [dropped, again], [made("e", 5), still], [made("g", 7), made("h", 8)]]


@pytest.fixture
def split(parts: list[list[Made]], tmp_path: Path) -> Path:
    return write_split(tmp_path / "split", parts)


def run(split: Path, config: ScoreConfig = ALL, kind: str = "sequential", **models: Path) -> Report:
    return score.run(config, split, split.parent / "score", EXECUTOR.model_copy(update={"kind": kind}), **models)


def rows(split: Path) -> dict[str, Clip]:
    return {clip.clip_id: clip for clip in read_manifest(split.parent / "score")}


def cached(split: Path) -> dict[str, int]:
    folder = split.parent / ".cache" / "score"
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_every_kept_clip_gets_its_columns(split: Path) -> None:
    report = run(split)
    found = rows(split)
    assert list(found) == list("abcdefgh")
    assert set(found["a"].scores) == {
        "duration_s", "short_side", "black", "brightness", "frame_difference", "sharpness", "motion",
    }  # fmt: skip
    assert len(found["a"].perceptual_hash) == 16
    assert found["c"] == Clip("c", "c.mp4", kept=False, reason="unreadable: no picture in it")
    assert (report.total, report.kept, report.dropped) == (8, 7, {"unreadable": 1})
    assert report.metrics["video_s"] == 7
    assert report.metrics["measured"] == 7
    assert report.metrics["clips_per_s"] > 0
    assert (split.parent / "score" / STATUS).is_file()


def test_another_threshold_decodes_nothing(split: Path) -> None:
    run(split)
    for tar in split.glob("*.tar"):
        tar.unlink()
    before = cached(split)
    report = run(split, ALL.model_copy(update={"min_frame_difference": 0.2, "max_duplicate_distance": 6}))
    assert report.dropped == {"unreadable": 1, "static": 1, "duplicate": 1}
    assert report.metrics["measured"] == report.metrics["clips_per_s"] == 0
    assert cached(split) == before
    again = run(split)
    assert (again.kept, again.dropped) == (7, {"unreadable": 1})


def test_only_the_part_that_changed_is_measured_and_old_measures_go(split: Path, parts: list[list[Made]]) -> None:
    run(split)
    before = cached(split)
    write_split(split, [*parts[:2], [made("e", 9)], parts[3]])
    report = run(split)
    after = cached(split)
    assert report.metrics["measured"] == 1
    assert {name.split("-")[1] for name in set(after) ^ set(before)} == {"00002"}
    assert len(after) == 4
    assert all(before[name] == changed for name, changed in after.items() if name in before)


def test_duplicates_are_found_across_parts_among_what_passes(split: Path) -> None:
    near = ALL.model_copy(update={"max_duplicate_distance": 6})
    run(split, near)
    found = rows(split)
    assert found["d"].reason.startswith("duplicate: ")
    assert found["d"].reason.endswith(" bits from b")
    assert all(found[name].kept for name in "abefgh")


def test_what_a_threshold_drops_is_no_original_and_flat_clips_are_like_nothing(tmp_path: Path) -> None:
    rows = [("a", 0.0, "00"), ("b", 1.0, "01"), ("c", 1.0, ""), ("d", 1.0, "03"), ("e", 1.0, ""), ("f", 1.0, "01")]
    clips = [Clip(name, "x", scores={"motion": motion}, perceptual_hash=end and end * 8) for name, motion, end in rows]
    write_part(tmp_path / part_name(0), clips[:4])
    write_part(tmp_path / part_name(1), clips[4:])
    sources = [tmp_path / part_name(index) for index in range(2)]
    (tmp_path / "judged").mkdir()
    judged = [tmp_path / "judged" / path.name for path in sources]
    verdict = judge(ALL.model_copy(update={"min_motion": 0.5, "max_duplicate_distance": 8}), sources, judged)
    found = read_manifest(tmp_path / "judged")
    assert [clip.reason for clip in found] == [
        "still: motion 0 < 0.5", "", "", "duplicate: 8 bits from b", "", "duplicate: 0 bits from b",
    ]  # fmt: skip
    assert verdict.tally.kept == 3
    assert verdict.tally.dropped == {"still": 1, "duplicate": 2}


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("min_duration_s", 2.0, "short: duration_s 1 < 2"),
        ("min_short_side", 100, "small: short_side 64 < 100"),
        ("max_black", 0.1, "black: black 0.2 > 0.1"),
        ("min_brightness", 50, "dark: brightness 40 < 50"),
        ("max_brightness", 30, "bright: brightness 40 > 30"),
        ("min_frame_difference", 3.5, "static: frame_difference 3 < 3.5"),
        ("min_motion", 0.1, "still: motion 0.05 < 0.1"),
        ("max_motion", 0.01, "restless: motion 0.05 > 0.01"),
        ("min_sharpness", 200, "blurred: sharpness 100 < 200"),
        ("min_aesthetic", 5, "unaesthetic: aesthetic 4.5 < 5"),
        ("min_text_match", 0.25, "mismatched: text_match 0.2 < 0.25"),
    ],
)
def test_each_threshold_has_its_reason(tmp_path: Path, limit: str, value: float, reason: str) -> None:
    scores = {
        "duration_s": 1.0,
        "short_side": 64.0,
        "black": 0.2,
        "brightness": 40.0,
        "frame_difference": 3.0,
        "motion": 0.05,
        "sharpness": 100.0,
        "aesthetic": 4.5,
        "text_match": 0.2,
    }
    name = reason.split()[1]
    lacks = {key: number for key, number in scores.items() if key != name}
    earlier = Clip("d", "x", kept=False, reason="dead link: 404", scores=scores)
    full = Clip("a", "x", scores=scores, caption="a square")
    clips = [full, replace(full, scores=lacks), replace(full, scores=scores | {name: float("nan")}), earlier]
    write_part(tmp_path / part_name(0), clips)
    table = read_table(tmp_path / part_name(0))
    judged = apply_thresholds(table, ALL.model_copy(update={limit: value}))
    missing = f"{reason.split(':')[0]}: {name} is missing"
    assert judged["reason"].to_pylist() == [reason, missing, missing, "dead link: 404"]
    assert not any(judged["kept"].to_pylist())
    exact = apply_thresholds(table, ALL.model_copy(update={limit: scores[name]}))
    assert exact["kept"].to_pylist() == [True, False, False, False]
    assert apply_thresholds(table, ALL)["kept"].to_pylist() == [True, True, True, False]


def test_clips_without_a_caption_are_not_judged_by_text(tmp_path: Path) -> None:
    write_part(tmp_path / part_name(0), [Clip("a", "x"), Clip("b", "x", caption="a word")])
    judged = apply_thresholds(read_table(tmp_path / part_name(0)), ALL.model_copy(update={"min_text_match": 0.2}))
    assert judged["kept"].to_pylist() == [True, False]


def test_any_executor_gives_the_same_bytes(split: Path, parts: list[list[Made]], tmp_path: Path) -> None:
    config = ALL.model_copy(update={"max_duplicate_distance": 6, "min_frame_difference": 0.2})
    run(split, config)
    other = write_split(tmp_path / "other" / "split", parts)
    run(other, config, kind="pool")
    for index in range(len(parts)):
        one, two = (folder.parent / "score" / part_name(index) for folder in (split, other))
        assert one.read_bytes() == two.read_bytes()


def test_a_damaged_clip_is_a_row_and_is_tried_again(split: Path) -> None:
    bad = read_part(split / part_name(3))
    whole = (split / bad[0].shard).read_bytes()
    broken = bytearray(whole)
    broken[bad[0].offset : bad[0].offset + bad[0].size] = bytes(bad[0].size)
    (split / bad[0].shard).write_bytes(bytes(broken[: bad[1].offset + 10]))
    first = read_part(split / part_name(0))
    write_part(split / part_name(0), [replace(first[0], offset=first[0].offset + 100), first[1]])
    report = run(split)
    found = rows(split)
    assert report.dropped == {"unreadable": 4}
    assert found["h"].reason == f"unreadable: its shard {bad[1].shard} ends before it does"
    for name in "agh":
        assert found[name].reason.startswith("unreadable: ")
        assert not found[name].kept
        assert found[name].scores == {}
    # The shard is mended: the next judging, for whatever reason, looks at its part again.
    (split / bad[0].shard).write_bytes(whole)
    report = run(split, ALL.model_copy(update={"max_black": 0.99}))
    assert report.dropped == {"unreadable": 2}
    assert report.metrics["measured"] == 3  # g, h, and b beside a, which is still damaged


def test_a_missing_shard_stops_the_step(split: Path) -> None:
    (split / "clips-00002-00.tar").unlink()
    with pytest.raises(
        StepError, match=r"manifest-00002.*clips-00002-00\.tar.* is missing; run `opensora split` again"
    ):
        run(split)
    assert len([name for name in cached(split) if name.endswith(".parquet")]) == 3


def test_nothing_left_is_an_error(split: Path) -> None:
    with pytest.raises(StepError, match=r"no clip passes the thresholds .*7 short"):
        run(split, ALL.model_copy(update={"min_duration_s": 100.0}))
    assert not (split.parent / "score").exists()


PROGRAM = """
import sys
from pathlib import Path
from tests.data.test_score import run
if __name__ == "__main__":
    run(Path(sys.argv[1]), kind="pool")
"""


def test_a_killed_run_goes_on_where_it_was(split: Path, tmp_path: Path) -> None:
    run(split)
    expected = read_manifest(tmp_path / "score")
    shutil.rmtree(tmp_path / "score")
    shutil.rmtree(tmp_path / ".cache")
    tar = split / "clips-00003-00.tar"
    tar.rename(tmp_path / "aside")
    os.mkfifo(tar)  # whoever opens it waits for ever
    (tmp_path / "program.py").write_text(PROGRAM)
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(split)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    cache = tmp_path / ".cache" / "score"
    deadline = time.monotonic() + 240
    with killed_in_the_end(child):
        while len(list(cache.glob("*.parquet"))) < 3:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "score").exists()
    before = cached(split)
    tar.unlink()
    (tmp_path / "aside").rename(tar)
    report = run(split)
    assert report.metrics["measured"] == 2
    assert read_manifest(tmp_path / "score") == expected
    assert all(cached(split)[name] == when for name, when in before.items() if name.endswith(".parquet"))


def test_clip_adds_its_columns_and_its_files_decide(split: Path, tmp_path: Path) -> None:
    first = read_part(split / part_name(0))
    write_part(split / part_name(0), [replace(first[0], caption="a red square"), first[1]])
    clip = build_clip(tmp_path / "clip")
    head = build_linear_head(tmp_path / "head.pth")
    report = run(split, ALL.model_copy(update={"min_text_match": -1.0, "min_aesthetic": -100.0}), clip=clip, head=head)
    found = rows(split)
    assert report.kept == 7
    assert -1 <= found["a"].scores["text_match"] <= 1
    assert all("text_match" not in found[name].scores for name in "bdefgh")
    assert all(2 < found[name].scores["aesthetic"] < 6 for name in "abdefgh")
    assert run(split, ALL.model_copy(update={"max_black": 1.0}), clip=clip, head=head).metrics["measured"] == 0
    (clip / "README.md").write_text("about it")
    assert run(split, clip=clip, head=head).metrics["measured"] == 0
    assert run(split, clip=clip).metrics["measured"] == 7


def test_thresholds_without_their_model_are_errors(split: Path, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"name its folder in score\.clip"):
        run(split, ALL.model_copy(update={"min_text_match": 0.2}))
    with pytest.raises(StepError, match=r"name its file in score\.aesthetic_head"):
        run(split, ALL.model_copy(update={"min_aesthetic": 5.0}), clip=tmp_path)
    with pytest.raises(WeightsError, match="is no folder"):
        run(split, clip=tmp_path / "nowhere")


def test_judging_many_clips_takes_no_more_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sources = []
    for part in range(40):
        hashes = rng.integers(0, 2**64, 250, dtype=np.uint64)
        clips = [
            Clip(
                f"{part}-{row}", "x", scores={"motion": row % 2}, perceptual_hash=f"{value:016x}", caption="word " * 20
            )
            for row, value in enumerate(hashes)
        ]
        sources.append(tmp_path / part_name(part))
        write_part(sources[-1], clips)
    (tmp_path / "judged").mkdir()
    config = ALL.model_copy(update={"min_motion": 0.5, "max_duplicate_distance": 2})
    peaks = []
    for count in (4, 40):
        tracemalloc.start()
        verdict = judge(config, sources[:count], [tmp_path / "judged" / path.name for path in sources[:count]])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (verdict.tally.total, verdict.tally.kept) == (250 * count, 125 * count)
    assert peaks[1] < peaks[0] + 36 * 250 * 100  # some numbers a clip, not its row


def test_the_embedded_world_passes(clips: Path) -> None:
    assert all(clip.kept for clip in read_manifest(clips / "score"))
    assert len(read_manifest(clips / "score")) == 16
