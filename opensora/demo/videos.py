"""The step `demo_videos`: multi-shot H.264 videos of coloured shapes, their list, and captions for half of them.

Beside the videos a folder holds `manifest.csv` (url, sha256, licence, caption_path), `<name>.captions.json` for every
second video, and `truth.json` with the scene of every shot, which only measures captions and trains nothing.
"""

import csv
import hashlib
import multiprocessing
from dataclasses import asdict
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np

from opensora.config import DemoConfig
from opensora.data.video import x264_params
from opensora.demo.shapes import Scene, all_scenes, held_out_scenes, render_clip
from opensora.process import shielded
from opensora.step import Report, StepFolder, fingerprint, read_report, write_json

LICENCE = "CC0-1.0"
MANIFEST_COLUMNS = ("url", "sha256", "licence", "caption_path")
CRF = "18"  # x264 quality; finer than the shapes' edges need
MIN_CUT = 36.0  # mean HSV change between shots; ContentDetector's threshold is 27
TRIES = 40  # drawings of a shot before the clearest cut so far is taken
PROCESSES = 2
SEED = 0

Shot = tuple[Scene, np.ndarray]


def run(config: DemoConfig, output: Path) -> Report:
    """Render the embedded world that `config` describes into `output`."""
    folder = StepFolder(output, fingerprint("demo_videos", config.model_dump(), SEED))
    if folder.is_done():
        return read_report(output)
    write_world(
        folder.open(),
        videos=config.videos,
        shots_per_video=config.shots_per_video,
        shot_frames=config.shot_frames,
        size=config.size,
        fps=config.fps,
        seed=SEED,
    )
    return folder.finish(Report("demo_videos", total=config.videos, kept=config.videos))


def write_world(
    folder: Path, *, videos: int, shots_per_video: int, shot_frames: int, size: int, fps: int, seed: int
) -> None:
    """Write `videos` videos of hard-cut shots, their list, captions and truth into `folder`.

    The same arguments give the same bytes. Held-out scenes are never shown. The list is written last, so a folder
    with a list is whole.

    Args:
        shot_frames: frames a shot.
        size: pixels, width and height; even, as yuv420p wants.
        fps: frames a second.

    Raises:
        ValueError: the size is odd.
    """
    if size % 2:
        raise ValueError(f"size must be even for yuv420p, got {size}; use {size + 1}")
    folder.mkdir(parents=True, exist_ok=True)
    write = partial(_write_numbered, folder, shots=shots_per_video, frames=shot_frames, size=size, fps=fps, seed=seed)
    processes = min(PROCESSES, videos)
    if processes > 1 and not multiprocessing.current_process().daemon:
        with shielded():
            pool = multiprocessing.get_context("spawn").Pool(processes)
        with pool:
            written = pool.map(write, range(videos), chunksize=4)
    else:
        written = [write(number) for number in range(videos)]

    write_json(folder / "truth.json", {row["url"]: spans for row, spans in written})
    part = folder / "manifest.csv.part"
    with part.open("w", newline="") as handle:
        table = csv.DictWriter(handle, MANIFEST_COLUMNS)
        table.writeheader()
        table.writerows(row for row, _ in written)
    part.replace(folder / "manifest.csv")


def _write_numbered(
    folder: Path, number: int, *, shots: int, frames: int, size: int, fps: int, seed: int
) -> tuple[dict[str, str], list[dict[str, object]]]:
    """One video and, if its number is even, its captions: its row of the list and the truth about its shots."""
    cv2.setNumThreads(1)
    name = f"video_{number:04d}"
    cut = _shots(number, shots, frames, size, seed)
    path = folder / f"{name}.mp4"
    part = path.with_suffix(".part")
    _encode(part, np.concatenate([clip for _, clip in cut]), fps)
    part.replace(path)
    spans = [{"start_s": index * frames / fps, "end_s": (index + 1) * frames / fps} for index in range(shots)]
    captions = ""
    if number % 2 == 0:
        captions = f"{name}.captions.json"
        given = [{**span, "caption": scene.caption} for span, (scene, _) in zip(spans, cut, strict=True)]
        write_json(folder / captions, given)
    truth: list[dict[str, object]] = [
        {**span, **asdict(scene), "caption": scene.caption} for span, (scene, _) in zip(spans, cut, strict=True)
    ]
    row = {
        "url": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "licence": LICENCE,
        "caption_path": captions,
    }
    return row, truth


def _shots(number: int, shots: int, frames: int, size: int, seed: int) -> list[Shot]:
    """The shots of video `number`; scenes are dealt like cards, so that all come equally often over the videos."""
    deck = [scene for scene in all_scenes() if scene not in held_out_scenes()]
    rng = np.random.default_rng([seed, number])
    drawn: list[Shot] = []
    for index in range(shots):
        turn, card = divmod(number * shots + index, len(deck))
        scene = deck[np.random.default_rng([seed, turn, len(deck)]).permutation(len(deck))[card]]
        drawn.append(_clear_cut(scene, drawn[-1] if drawn else None, frames, size, rng))
    return drawn


def _clear_cut(scene: Scene, before: Shot | None, frames: int, size: int, rng: np.random.Generator) -> Shot:
    """`scene` drawn until it differs clearly from the frame before; a scene of the same colour is recoloured."""
    if before is not None and before[0].colour == scene.colour:
        others = [
            other
            for other in all_scenes()
            if (other.shape, other.direction) == (scene.shape, scene.direction)
            and other.colour != scene.colour
            and other not in held_out_scenes()
        ]
        scene = others[int(rng.integers(len(others)))]
    best: np.ndarray | None = None
    best_score = -1.0
    for _ in range(1 if before is None else TRIES):
        clip = render_clip(scene, frames, size, rng)
        score = MIN_CUT if before is None else content_change(before[1][-1], clip[0])
        if score > best_score:
            best, best_score = clip, score
        if best_score >= MIN_CUT:
            break
    assert best is not None
    return scene, best


def content_change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean absolute change of hue, saturation and value between RGB frames [H, W, 3], as PySceneDetect counts it."""
    one, two = (cv2.cvtColor(frame, cv2.COLOR_RGB2HSV).astype(np.int16) for frame in (before, after))
    return float(np.abs(one - two).mean())


def _encode(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write uint8 [T, H, W, 3] as an H.264 mp4; one thread, so that the bytes are always the same."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": CRF, "preset": "fast", "x264-params": x264_params(stream.width)}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
