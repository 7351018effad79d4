"""The embedded world is whole, repeatable, cut where it says, and shows no held-out scene."""

import csv
import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pytest
from scenedetect import ContentDetector, SceneManager, open_video

from opensora.config import DemoConfig
from opensora.demo.shapes import Detection, detect, held_out_scenes, parse_caption
from opensora.demo.videos import MANIFEST_COLUMNS, run, write_world

VIDEOS, SHOTS, FRAMES, FPS = 4, 5, 16, 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, videos=VIDEOS, shots_per_video=SHOTS, shot_frames=FRAMES, size=64, fps=FPS, seed=1)
    return folder


def truth_of(folder: Path) -> dict[str, list[dict[str, object]]]:
    return json.loads((folder / "truth.json").read_text())


def test_list_and_captions(world: Path) -> None:
    with (world / "manifest.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert tuple(rows[0]) == MANIFEST_COLUMNS
    assert [row["url"] for row in rows] == list(truth_of(world))
    for number, row in enumerate(rows):
        assert hashlib.sha256((world / row["url"]).read_bytes()).hexdigest() == row["sha256"]
        assert bool(row["caption_path"]) == (number % 2 == 0)
        if row["caption_path"]:
            given = json.loads((world / row["caption_path"]).read_text())
            spans = truth_of(world)[row["url"]]
            assert given == [{key: span[key] for key in ("start_s", "end_s", "caption")} for span in spans]
    assert not list(world.glob("*.part"))


def test_shots_show_what_the_truth_says(world: Path) -> None:
    for name, spans in truth_of(world).items():
        with av.open(str(world / name)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert len(frames) == SHOTS * FRAMES
        for index, span in enumerate(spans):
            scene = parse_caption(str(span["caption"]))
            assert scene is not None
            assert scene not in held_out_scenes()
            seen = detect(frames[index * FRAMES : (index + 1) * FRAMES])
            assert seen == Detection(scene.colour, scene.shape, scene.direction)


def test_scene_detector_finds_every_cut(world: Path) -> None:
    for name, spans in truth_of(world).items():
        manager = SceneManager()
        manager.add_detector(ContentDetector(threshold=27, min_scene_len=5))
        manager.detect_scenes(open_video(str(world / name)))
        assert [start.seconds for start, _ in manager.get_scene_list()] == [span["start_s"] for span in spans]


def test_same_seed_same_bytes(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path, videos=VIDEOS, shots_per_video=SHOTS, shot_frames=FRAMES, size=64, fps=FPS, seed=1)
    assert (tmp_path / "manifest.csv").read_bytes() == (world / "manifest.csv").read_bytes()


def test_step_is_done_once(tmp_path: Path) -> None:
    config = DemoConfig(videos=1, shots_per_video=2)
    report = run(config, tmp_path / "demo_videos")
    assert (report.total, report.kept) == (1, 1)
    before = (tmp_path / "demo_videos" / "video_0000.mp4").stat().st_mtime_ns
    run(config, tmp_path / "demo_videos")
    assert (tmp_path / "demo_videos" / "video_0000.mp4").stat().st_mtime_ns == before


def test_odd_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even"):
        write_world(tmp_path, videos=1, shots_per_video=1, shot_frames=4, size=33, fps=8, seed=0)
