"""How the data steps grow: two processes against one, and the memory of ten times as many clips.

    python -m benchmarks.data_steps [--clips 10000]

Ten minutes on two CPU cores that do nothing else. Clips are tiny, since memory must not follow their number, whatever
their size; the pool is timed on 480p video, by the clock, as what is measured is two cores.
"""

import argparse
import json
import shutil
import tempfile
import time
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import save
from opensora.config import EncodeConfig, ExecutorConfig, ScoreConfig, SplitConfig
from opensora.data import encode, score, split
from opensora.data.cut import ClipWriter
from opensora.data.shards import ShardWriter
from opensora.data.video import probe
from opensora.demo.autoencoder import build_vae
from opensora.demo.text_encoder import build_text_encoder
from opensora.manifest import Clip, part_name, write_part

PART_CLIPS = 100
PART_VIDEOS = 10
SHOTS = 10  # a video
WORDS = ("a", "red", "circle")


def moving(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """A textured picture that moves, uint8 [T, H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]
    return np.stack([np.roll(picture, 2 * index, axis=1) for index in range(frames)])


def video(path: Path, shots: int, frames: int, height: int, width: int, seed: int) -> Clip:
    """Write a video of hard-cut shots; its row."""
    writer = ClipWriter(path, width, height, Fraction(24), crf=18, gop=30)
    for shot in range(shots):
        for frame in moving(frames, height, width, seed * shots + shot):
            writer.add_rgb(frame)
    writer.finish()
    digest = sha256(path.read_bytes()).hexdigest()
    about = probe(path)
    return Clip(digest[:16], str(path), digest, path=str(path), fps=about.fps, width=width, height=height)


def downloaded(folder: Path, videos: list[Clip]) -> Path:
    """A finished download step of these videos; those that come again are other videos of the same content."""
    folder.mkdir(parents=True)
    for index, start in enumerate(range(0, len(videos), PART_VIDEOS)):
        write_part(folder / part_name(index), videos[start : start + PART_VIDEOS])
    return folder


def captioned(folder: Path, data: bytes, count: int) -> Path:
    """A finished caption step of `count` clips that all hold the same bytes, its shards beside the manifest."""
    folder.mkdir(parents=True)
    for index in range(count // PART_CLIPS):
        writer = ShardWriter(folder, index, 512)
        rows = []
        for place in range(PART_CLIPS):
            name = f"{index:08d}{place:08d}"
            shard, offset, size = writer.add(name, data, {})
            about: dict[str, Any] = {"frames": 8, "end_frame": 8, "end_s": 1.0, "fps": 8.0, "width": 32, "height": 32}
            about |= {"shard": shard, "offset": offset, "size": size}
            rows.append(Clip(name, "x", caption=" ".join(WORDS), caption_model="m", **about))
        writer.close()
        write_part(folder / part_name(index), rows)
    return folder


def pool_ratio(folder: Path) -> dict[str, object]:
    """Wall time of splitting 480p videos with one process and with two, in turn."""
    path = folder / "480p.mp4"
    videos = [video(folder / f"480p-{index}.mp4", 4, 60, 480, 854, index) for index in range(8)]
    path.unlink(missing_ok=True)
    inputs = downloaded(folder / "pool" / "download", videos)
    for part in inputs.glob("*.parquet"):
        part.unlink()
    for index, clip in enumerate(videos):
        write_part(inputs / part_name(index), [clip])
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for workers in (1, 2):
            shutil.rmtree(folder / "pool" / "split", ignore_errors=True)
            start = time.monotonic()
            split.run(SplitConfig(workers=workers), inputs, folder / "pool" / "split", ExecutorConfig())
            times[workers].append(time.monotonic() - start)
    one, two = (sorted(times[workers])[1] for workers in (1, 2))
    return {"seconds_one": round(one, 2), "seconds_two": round(two, 2), "ratio": round(one / two, 2)}


def memory(folder: Path, clips: int) -> dict[str, float]:
    """Peak MiB of all processes of a step, with two workers."""
    small = folder / "small.mp4"
    row = video(small, SHOTS, 16, 64, 64, 1)
    one = folder / "one.mp4"
    video(one, 1, 8, 32, 32, 1)
    torch.manual_seed(0)
    if not (folder / "vae").exists():
        build_vae().save_pretrained(folder / "vae")
        build_text_encoder(folder / "t5", list(WORDS), seed=0)
    base = folder / str(clips)
    executor = ExecutorConfig()
    videos = [
        Clip(f"{index:016d}", f"{small}?{index}", row.source_sha256, path=str(small), fps=24.0, width=64, height=64)
        for index in range(clips // SHOTS)
    ]
    inputs = downloaded(base / "download", videos)
    peaks = {"split": split.run(SplitConfig(), inputs, base / "split", executor).peak_memory_mib}
    shutil.rmtree(base / "split")
    rows = captioned(base / "split", one.read_bytes(), clips)
    lax = ScoreConfig(min_short_side=None)
    peaks["score"] = score.run(lax, rows, base / "score", executor).peak_memory_mib
    sizes = EncodeConfig(sizes=((32, 32),), max_tokens=8, workers=2)
    report = encode.run(sizes, rows, rows, folder / "vae", folder / "t5", base / "encode", executor)
    peaks["encode"] = report.peak_memory_mib
    shutil.rmtree(base)
    return {name: round(value, 1) for name, value in peaks.items()}


def main() -> None:
    """Measure both and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=10_000)
    clips = parser.parse_args().clips
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = pool_ratio(folder)
        print(json.dumps(pool), flush=True)
        few, many = memory(folder, clips // 10), memory(folder, clips)
    values = {
        "command": f"python -m benchmarks.data_steps --clips {clips}",
        "pool_of_two_over_one": pool,
        "clips": [clips // 10, clips],
        "peak_mib": {step: [few[step], many[step]] for step in many},
        "growth": {step: round(many[step] / few[step], 3) for step in many},
    }
    print(json.dumps(values, indent=2))
    print(save("data-steps-cpu", values))


if __name__ == "__main__":
    main()
