"""Shots: as PySceneDetect finds them, transitions trimmed, long shots by stride, nothing lost without a word."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from opensora.config import SplitConfig
from opensora.data.cut import ClipWriter
from opensora.data.shots import Scan, find_clips, intact_runs, scan_video, stretches, trim
from opensora.data.timeline import measure_timeline
from tests.shared import shared

CONFIG = SplitConfig()
FPS = 24


def texture(seed: int, shift: int = 0) -> np.ndarray:
    """A picture of coarse blocks, float [96, 128, 3], moved sideways."""
    blocks = np.random.default_rng(seed).integers(30, 225, (12, 16, 3))
    return np.roll(np.kron(blocks, np.ones((8, 8, 1))), shift, axis=1)


def shot(seed: int, frames: int, speed: int = 0) -> list[np.ndarray]:
    return [texture(seed, speed * number) for number in range(frames)]


def dissolve(before: np.ndarray, after: np.ndarray, frames: int) -> list[np.ndarray]:
    return [before + (after - before) * (number + 1) / (frames + 1) for number in range(frames)]


def write(path: Path, frames: list[np.ndarray]) -> Path:
    writer = ClipWriter(path, 128, 96, Fraction(FPS), crf=10, gop=30)
    for frame in frames:
        writer.add_rgb(frame.round().astype(np.uint8))
    writer.finish()
    return path


@pytest.mark.parametrize("detector", ["content", "adaptive"])
@pytest.mark.parametrize("name", ["sintel_10_shots.mp4", "nasa_two_streams.mp4", "bunny_audio.mp4"])
def test_the_shots_are_pyscenedetects(name: str, detector: str) -> None:
    from scenedetect import AdaptiveDetector, ContentDetector, detect

    path = shared(f"videos/{name}")
    config = CONFIG.model_copy(update={"detector": detector})
    scan = scan_video(path, config)
    theirs = (ContentDetector if detector == "content" else AdaptiveDetector)(
        min_scene_len=round(0.625 * float(scan.timeline.rate))
    )
    expected = [(start.frame_num, end.frame_num) for start, end in detect(str(path), theirs, start_in_scene=True)]
    assert scan.shots == expected
    if "sintel" in name:
        assert len(scan.shots) == 10


def test_a_portrait_video_is_looked_at_as_pyscenedetect_does(tmp_path: Path) -> None:
    from scenedetect import ContentDetector, SceneManager, StatsManager, open_video

    tall = [np.kron(np.rot90(frame), np.ones((5, 4, 1))) for frame in shot(1, 8, speed=3) + shot(2, 8, speed=1)]
    writer = ClipWriter(tmp_path / "a.mp4", 384, 640, Fraction(FPS), crf=10, gop=30)
    for frame in tall:
        writer.add_rgb(frame.astype(np.uint8))
    writer.finish()
    scan = scan_video(tmp_path / "a.mp4", CONFIG)
    manager = SceneManager(StatsManager())
    manager.add_detector(ContentDetector())
    manager.detect_scenes(open_video(str(tmp_path / "a.mp4"), backend="pyav"))
    assert manager.stats_manager
    theirs = [manager.stats_manager.get_metrics(number, ["content_val"])[0] for number in range(1, 16)]
    assert scan.change[1:] == pytest.approx(theirs, abs=0.02)


def test_hard_cuts_lose_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", shot(1, 30) + shot(2, 25, speed=3) + shot(3, 20))
    assert find_clips(scan_video(path, CONFIG), CONFIG) == ([(0, 30), (30, 55), (55, 75)], [])


def test_frames_of_a_dissolve_are_trimmed(tmp_path: Path) -> None:
    first, second = shot(1, 40), shot(2, 40)
    between = dissolve(first[-1], second[0], 6)
    path = write(tmp_path / "a.mp4", first + between + second)
    scan = scan_video(path, CONFIG.model_copy(update={"threshold": 6.0}))  # at 27 a dissolve is no cut
    clips, _ = find_clips(scan, CONFIG)
    mixed = set(range(40, 46))
    assert len(clips) == 2
    assert all(not mixed & set(range(*clip)) for clip in clips)
    assert sum(end - start for start, end in clips) >= 76  # and hardly more than them
    untrimmed, _ = find_clips(scan, CONFIG.model_copy(update={"trim_transitions": False}))
    assert untrimmed == scan.shots


def test_motion_beside_a_hard_cut_is_not_trimmed(tmp_path: Path) -> None:
    moves, rests = shot(2, 12, speed=5), [texture(2, 55)] * 50
    path = write(tmp_path / "a.mp4", shot(1, 30) + moves + rests + moves[::-1] + shot(3, 30))
    scan = scan_video(path, CONFIG)
    assert find_clips(scan, CONFIG) == ([(0, 30), (30, 104), (104, 134)], [])


def test_fades_and_black_are_trimmed(tmp_path: Path) -> None:
    picture, black = texture(1), np.zeros((96, 128, 3))
    frames = [black] * 4 + dissolve(black, picture, 6) + [picture] * 50 + dissolve(picture, black, 6) + [black] * 4
    config = CONFIG.model_copy(update={"threshold": 250.0})  # one shot, whatever happens in it
    ((start, end),), _ = find_clips(scan_video(write(tmp_path / "a.mp4", frames), config), config)
    assert 10 <= start <= 11
    assert 59 <= end <= 60


def test_a_shot_of_which_little_is_left_is_not_trimmed(tmp_path: Path) -> None:
    scan = scan_video(write(tmp_path / "a.mp4", [np.zeros((96, 128, 3))] * 20), CONFIG)
    assert trim((0, 20), scan, 15) == (0, 20)  # black: the scores will say so


def made(count: int, broken: range = range(0)) -> Scan:
    intact = np.ones(count, bool)
    intact[list(broken)] = False
    timeline = measure_timeline(np.arange(count) / FPS, Fraction(FPS))
    return Scan(
        timeline,
        Fraction(1),
        intact,
        change=np.zeros(count, np.float32),
        level=np.full(count, 100, np.float32),
        bend=np.full(count, np.inf, np.float32),
        shots=[(0, count)],
    )


def test_long_shots_are_cut_by_stride() -> None:
    assert list(stretches((10, 100), 200, None)) == [(10, 100)]
    assert list(stretches((0, 100), 40, None)) == [(0, 33), (33, 67), (67, 100)]
    assert list(stretches((0, 100), 40, 25)) == [(0, 40), (25, 65), (50, 90), (60, 100)]
    assert list(stretches((0, 100), 50, 50)) == [(0, 50), (50, 100)]
    config = CONFIG.model_copy(update={"max_clip_s": 2.0, "stride_s": 1.0})
    clips, lost = find_clips(made(5 * FPS), config)
    assert clips == [(0, 48), (24, 72), (48, 96), (72, 120)]
    assert not lost


def test_damaged_frames_are_left_out_and_told() -> None:
    scan = made(100, range(40, 45))
    assert intact_runs((0, 100), scan.intact) == [(0, 40), (45, 100)]
    assert find_clips(scan, CONFIG) == ([(0, 40), (45, 100)], [(0, 100)])
    assert find_clips(made(20, range(5, 15)), CONFIG) == ([], [(0, 20)])
