"""Shots and clips: exact spans, normalised files, rotation, and what a real trailer holds."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import av
import numpy as np
import pytest

from opensora.config import DownloadConfig, ExecutorConfig, SplitConfig
from opensora.data import download, split
from opensora.data.shards import read_clip
from opensora.data.video import read_frames
from opensora.data.workers import Outcome
from opensora.manifest import GIVEN, Clip, part_name, read_manifest, write_part
from tests.conftest import ROOT
from tests.shared import shared
from tests.small_disk import small_disk

EXECUTOR = ExecutorConfig(kind="sequential")
CONFIG = SplitConfig(given_spans=False, max_short_side=64, shard_mib=1, max_clip_s=100)


def colours(path: Path, shots: list[int], fps: int = 10, side: int = 64) -> Path:
    """A video whose shots are plain greys with a bright block; frame `i` carries its number in its first rows."""
    head = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=head) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "1", "x264-params": "log=0", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = side, side * 3 // 4, "yuv420p"
        number = 0
        for index, length in enumerate(shots):
            for _ in range(length):
                frame = np.full((side * 3 // 4, side, 3), 40 if index % 2 else 200, np.uint8)
                for bit in range(8):
                    frame[:16, bit * 8 : bit * 8 + 8] = 255 * (number >> bit & 1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                number += 1
        container.mux(stream.encode(None))
    return path


def numbers(frames: np.ndarray) -> list[int]:
    return [sum(int(frame[8, bit * 8 + 4, 0] > 127) << bit for bit in range(8)) for frame in frames]


def pack(source: Path, tmp_path: Path, config: SplitConfig = CONFIG) -> list[Clip]:
    download.run(DownloadConfig(max_bad_share=0.9), str(source), tmp_path / "download", EXECUTOR)
    split.run(config, tmp_path / "download", tmp_path / "split", EXECUTOR)
    return read_manifest(tmp_path / "split")


def test_shots_are_cut_to_the_frame(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    colours(tmp_path / "in" / "a.mp4", [20, 13, 25])
    captions = [{"start_s": 2.0, "end_s": 3.3, "caption": "the dark one"}]
    (tmp_path / "in" / "a.captions.json").write_text(json.dumps(captions))
    clips = pack(tmp_path / "in", tmp_path)
    shown = [numbers(read_frames(read_clip(tmp_path / "split", clip))) for clip in clips]
    assert shown == [list(range(20)), list(range(20, 33)), list(range(33, 58))]
    assert [clip.frames for clip in clips] == [20, 13, 25]
    assert [(clip.caption, clip.caption_model) for clip in clips] == [("", ""), ("the dark one", GIVEN), ("", "")]
    assert len({clip.clip_id for clip in clips}) == 3


def test_long_shots_are_cut_into_even_parts(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    colours(tmp_path / "in" / "a.mp4", [30])
    clips = pack(tmp_path / "in", tmp_path, CONFIG.model_copy(update={"max_clip_s": 1.0}))
    assert [clip.frames for clip in clips] == [10, 10, 10]


def test_clips_are_normalised(tmp_path: Path) -> None:
    clips = pack(shared("videos"), tmp_path, CONFIG.model_copy(update={"max_clip_s": 15}))
    by_source: dict[str, list[Clip]] = {}
    for clip in clips:
        by_source.setdefault(Path(clip.source).name, []).append(clip)
    counts = {name: len(rows) for name, rows in by_source.items()}
    assert counts["sintel_10_shots.mp4"] == 10
    assert counts["nasa_two_streams.mp4"] == 3
    assert counts["bunny_audio.mp4"] == counts["bunny_vfr.mp4"] == counts["bunny_vp9.webm"] == 1
    assert all(not row.kept and row.reason for name, rows in by_source.items() for row in rows if "bad_" in name)
    assert by_source["hevc_small.mp4"][0].frames == 10
    for clip in clips:
        if clip.kept:
            (tmp_path / "clip.mp4").write_bytes(read_clip(tmp_path / "split", clip))
            with av.open(str(tmp_path / "clip.mp4")) as container:
                assert len(container.streams) == 1  # no audio
                stream = container.streams.video[0]
                assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
                assert stream.average_rate == stream.base_rate
                assert min(stream.width, stream.height) <= 64
                keys = [i for i, p in enumerate(container.demux(stream)) if p.is_keyframe]
            assert max(np.diff([*keys, clip.frames])) <= CONFIG.gop
            assert len(read_frames(read_clip(tmp_path / "split", clip))) == clip.frames


def test_the_executor_does_not_change_a_byte(clips: Path, tmp_path: Path) -> None:
    from opensora.config import load_config

    config = load_config(ROOT / "params.yaml", "smoke").split
    shutil.copytree(clips / "videos", tmp_path / "videos")
    split.run(config, clips / "download", tmp_path / "split", EXECUTOR)
    for path in sorted((clips / "split").glob("*.[tp]a*")):
        assert path.read_bytes() == (tmp_path / "split" / path.name).read_bytes()


def test_a_stopped_run_goes_on_with_the_videos_that_are_left(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def stop_at_the_third(function, job, timeout_s):  # type: ignore[no-untyped-def]
        begun.append(job.video.clip_id)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return Outcome(0, function(job))

    shutil.copytree(clips / "download", tmp_path / "download")
    shutil.copytree(clips / "videos", tmp_path / "videos")
    monkeypatch.setattr(split, "call_isolated", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        split.run(CONFIG, tmp_path / "download", tmp_path / "split", EXECUTOR)
    assert not (tmp_path / "split").exists()
    split.run(CONFIG, tmp_path / "download", tmp_path / "split", EXECUTOR)
    assert len(begun) == 3 + 2  # four videos: two were kept, the third was begun twice
    assert len(read_manifest(tmp_path / "split")) == 16


def test_given_spans_are_the_clips(tmp_path: Path) -> None:
    colours(tmp_path / "a.mp4", [20, 13, 25])
    spans = [(0.5, 1.5, "one"), (1.0, 3.0, "two overlaps"), (0.5, 1.5, "one again"), (9.0, 12.0, "past the end")]
    lines = [{"path": "a.mp4", "start_s": a, "end_s": b, "caption": text} for a, b, text in spans]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    clips = pack(tmp_path / "list.jsonl", tmp_path, CONFIG.model_copy(update={"given_spans": True}))
    kept = [clip for clip in clips if clip.kept]
    assert [(clip.start_frame, clip.end_frame, clip.caption) for clip in kept] == [
        (5, 15, "one"),
        (10, 30, "two overlaps"),
    ]
    assert [clip.reason.split(":")[0] for clip in clips if not clip.kept] == ["outside"]
    shown = [numbers(read_frames(read_clip(tmp_path / "split", clip))) for clip in kept]
    assert shown == [list(range(5, 15)), list(range(10, 30))]
    assert len({clip.clip_id for clip in clips}) == 3


def test_a_source_that_changed_or_is_gone_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, length in {"a": 20, "b": 21, "c": 22}.items():
        colours(tmp_path / "in" / f"{name}.mp4", [length])
    download.run(DownloadConfig(), str(tmp_path / "in"), tmp_path / "download", EXECUTOR)
    colours(tmp_path / "in" / "a.mp4", [30])
    (tmp_path / "in" / "b.mp4").unlink()
    split.run(CONFIG, tmp_path / "download", tmp_path / "split", EXECUTOR)
    assert [clip.reason.split(":")[0] for clip in read_manifest(tmp_path / "split")] == ["changed", "missing", ""]


def test_names_of_any_letters(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    names = ["a b.mp4", 'it\'s "quoted".mp4', "two\nlines.mp4", "видео-日本.mp4", "a:b%20.mp4", "-x.mp4"]
    for number, name in enumerate(names):
        colours(tmp_path / "in" / name, [10 + number])
    clips = pack(tmp_path / "in", tmp_path)
    assert sorted(Path(clip.source).name for clip in clips if clip.kept) == sorted(names)


def test_a_decoder_that_hangs_or_dies_costs_its_video_alone(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def odd(function, job, timeout_s):  # type: ignore[no-untyped-def]
        done.append(job)
        if len(done) == 1:
            return Outcome(0, failure=f"timeout: no result after {timeout_s:g} s")
        return Outcome(0, function(job))

    shutil.copytree(clips / "download", tmp_path / "download")
    shutil.copytree(clips / "videos", tmp_path / "videos")
    monkeypatch.setattr(split, "call_isolated", odd)
    report = split.run(CONFIG, tmp_path / "download", tmp_path / "split", EXECUTOR)
    assert report.dropped == {"timeout": 1}
    assert report.kept == 12  # three videos of four shots


def split_together(job: split.Job) -> int:
    """Splits a video when another process is at the next one."""
    job.path.with_suffix(".begun").touch()
    deadline = time.monotonic() + 60
    while len(list(job.path.parent.glob("*.begun"))) < 2:
        assert time.monotonic() < deadline, "nobody came"
        time.sleep(0.01)
    return split.split_video(job)


def test_one_shard_keeps_all_workers_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        colours(tmp_path / "in" / f"{number}.mp4", [20, 21 + number])
    clips = pack(tmp_path / "in", tmp_path)
    expected = contents(tmp_path / "split")
    split.run(CONFIG, tmp_path / "download", tmp_path / "pool", ExecutorConfig())
    assert contents(tmp_path / "pool") == expected
    monkeypatch.setattr(split, "split_video", split_together)
    (tmp_path / "again").mkdir()
    inputs = tmp_path / "download" / part_name(0)
    split.split_shard(split.Task(CONFIG, inputs, tmp_path, None, tmp_path / "again" / part_name(0), processes=2))
    assert read_manifest(tmp_path / "again") == clips


def split_or_hang(job: split.Job) -> int:
    """Hangs at the video "hangs.mp4", after leaving the number of its process."""
    if Path(job.video.source).name == "hangs.mp4":
        job.path.with_suffix(".pid").write_text(str(os.getpid()))
        time.sleep(600)
    return split.split_video(job)


def test_a_video_past_its_time_limit_is_recorded_and_its_worker_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    colours(tmp_path / "in" / "a.mp4", [20])
    colours(tmp_path / "in" / "hangs.mp4", [21])
    monkeypatch.setattr(split, "split_video", split_or_hang)
    clips = pack(tmp_path / "in", tmp_path, CONFIG.model_copy(update={"video_timeout_s": 30.0}))
    assert [(Path(clip.source).name, clip.reason) for clip in clips] == [
        ("a.mp4", ""),
        ("hangs.mp4", "timeout: no result after 30 s"),
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "in" / "hangs.pid").read_text()), 0)


@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])
def test_a_truncated_video_keeps_its_good_part_and_says_what_is_lost(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    colours(path, [20, 25, 30])
    with av.open(str(path)) as container:
        places = sorted(packet.pos for packet in container.demux(video=0) if packet.pos)
    path.write_bytes(path.read_bytes()[: places[40]])
    clips = pack(tmp_path / "in", tmp_path)
    *kept, last = clips
    assert [(clip.start_frame, clip.end_frame, clip.reason) for clip in kept] == [(0, 20, ""), (20, 40, "")]
    shown = [numbers(read_frames(read_clip(tmp_path / "split", clip))) for clip in kept]
    assert shown == [list(range(20)), list(range(20, 40))]
    assert (last.kept, last.source, last.reason) == (False, str(path), "truncated: decoded 4.0 of 7.5 s")
    assert (last.start_s, last.end_s) == pytest.approx((4.0, 7.5))
    assert len({clip.clip_id for clip in clips}) == 3


def test_given_spans_of_a_truncated_video(tmp_path: Path) -> None:
    path = colours(tmp_path / "a.mp4", [75])
    with av.open(str(path)) as container:
        places = sorted(packet.pos for packet in container.demux(video=0) if packet.pos)
    path.write_bytes(path.read_bytes()[: places[40]])
    lines = [{"path": "a.mp4", "start_s": a, "end_s": b, "caption": "x"} for a, b in [(1, 2), (3, 5), (6, 7)]]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    clips = pack(tmp_path / "list.jsonl", tmp_path, CONFIG.model_copy(update={"given_spans": True}))
    said = "truncated: decoded 4.0 of 7.5 s"
    assert [(clip.start_s, clip.end_s, clip.reason) for clip in clips] == [
        (1, 2, ""),
        (3, 5, said),
        (6, 7, said),
        (pytest.approx(4), pytest.approx(7.5), said),
    ]


def test_given_spans_over_a_change_of_size_are_told(tmp_path: Path) -> None:
    data = b"".join(colours(tmp_path / f"{n}.ts", [20], side=side).read_bytes() for n, side in enumerate((64, 128)))
    (tmp_path / "a.ts").write_bytes(data)
    lines = [{"path": "a.ts", "start_s": a, "end_s": b, "caption": "x"} for a, b in [(0, 1), (1, 3), (2.5, 4)]]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    clips = pack(tmp_path / "list.jsonl", tmp_path, CONFIG.model_copy(update={"given_spans": True}))
    found = sorted((clip.start_s, clip.width, clip.reason) for clip in clips)
    assert found == [(0, 64, ""), (1, 64, "mixed: the size of its frames changes"), (2.5, 86, "")]


def parts(folder: Path, videos: list[Path]) -> Path:
    """A finished download step with a part a video."""
    folder.mkdir()
    for index, path in enumerate(videos):
        digest = sha256(path.read_bytes()).hexdigest()
        write_part(folder / part_name(index), [Clip(digest[:16], str(path), digest, path=str(path), fps=10.0)])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a step that do not tell of times."""
    return {path.name: path.read_bytes() for path in folder.glob("*.[tp]a*")}


PROGRAM = """
import sys
from pathlib import Path
from opensora.config import ExecutorConfig, SplitConfig
from opensora.data import split
if __name__ == "__main__":
    config = SplitConfig(given_spans=False, max_short_side=64, shard_mib=1, max_clip_s=100)
    split.run(config, Path(sys.argv[1], "download"), Path(sys.argv[1], "split"), ExecutorConfig())
"""


def test_a_run_that_is_killed_and_goes_on_gives_the_same_bytes(tmp_path: Path) -> None:
    videos = [colours(tmp_path / f"{number}.mp4", [60, 61 + number]) for number in range(6)]
    for base in ("never", "killed"):
        (tmp_path / base).mkdir()
        parts(tmp_path / base / "download", videos)
    split.run(CONFIG, tmp_path / "never" / "download", tmp_path / "never" / "split", EXECUTOR)
    expected = contents(tmp_path / "never" / "split")

    (tmp_path / "program.py").write_text(PROGRAM)
    output = tmp_path / "killed" / "split"
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "killed")]
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "killed" / ".partial").glob("split/manifest-*.parquet")):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.kill()
        assert child.wait(60) == -signal.SIGKILL
        deadline = time.monotonic() + 60
        while is_alive(child.pid):
            assert time.monotonic() < deadline, "a worker outlived the run"
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert not output.exists()
    done = contents(tmp_path / "killed" / ".partial" / "split")
    assert 0 < len([name for name in done if name.endswith(".parquet")]) < len(videos)
    assert all(expected[name] == data for name, data in done.items() if name.endswith(".parquet"))

    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=120)
    assert contents(output) == expected
    assert [clip.frames for clip in read_manifest(output)] == [
        length for number in range(6) for length in (60, 61 + number)
    ]


def is_alive(group: int) -> bool:
    """Whether a process of that group is at work, zombies apart."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_no_more_stops_the_step(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    full = Outcome(0, failure=str(OSError(number, os.strerror(number))), error_number=number)
    asked = []
    monkeypatch.setattr(split, "call_isolated", lambda *_: asked.append(1) or full)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        split.run(CONFIG, clips / "download", tmp_path / "split", EXECUTOR)
    assert caught.value.errno == number
    assert len(asked) == 1  # neither the next video nor the next shard
    assert not (tmp_path / "split").exists()


def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "96k") as small:
        videos = [colours(tmp_path / f"{number}.mp4", [20, 21 + number]) for number in range(6)]
        inputs = parts(tmp_path / "download", videos)
        with pytest.raises(OSError, match="No space left"):
            split.run(CONFIG, inputs, small / "split", EXECUTOR)
        assert not (small / "split").exists()
        subprocess.run(["mount", "-o", "remount,size=32m", str(small)], check=True)
        split.run(CONFIG, inputs, small / "split", EXECUTOR)
        split.run(CONFIG, inputs, tmp_path / "split", EXECUTOR)
        assert contents(small / "split") == contents(tmp_path / "split")
