"""How the data steps grow: two worker processes against one, and the memory of ten times as many clips.

    python -m benchmarks.data_steps pool        # four minutes on two CPU cores that do nothing else
    python -m benchmarks.data_steps memory [--clips 10000]        # ten minutes

The pool is timed by the clock, as what is measured is two cores: the whole command `opensora split` on forty 480p
videos, with `split.workers` of 1 and of 2. Of memory's clips only the number counts, so that they are tiny.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from opensora.config import EncodeConfig, ExecutorConfig, ScoreConfig, SplitConfig
from opensora.data import encode, score, split
from opensora.data.cut import ClipWriter
from opensora.data.shards import ShardWriter
from opensora.data.video import probe
from opensora.manifest import Clip, part_name, write_part

PART_CLIPS = 100
PART_VIDEOS = 10
SHOTS = 10  # a video
WORDS = ("a", "red", "circle")
POOL_VIDEOS, POOL_SHARD = 40, 2  # videos to split, and of them in a shard: as many shards as keep both workers busy
ROUNDS = 3


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


def pool(folder: Path) -> dict[str, object]:
    """Wall time of the command `opensora split` on 480p videos with one worker and with two, in turn."""
    (folder / "videos").mkdir()
    for index in range(POOL_VIDEOS):
        video(folder / "videos" / f"{index}.mp4", 4, 60, 480, 854, index)
    opensora = [sys.executable, "-m", "opensora.cli"]
    where = ["--profile", "single_gpu", "--workdir", str(folder / "runs")]
    source = [f"--set=download.source={folder / 'videos'}", f"--set=download.shard_videos={POOL_SHARD}"]
    subprocess.run([*opensora, "download", *where, *source], check=True)
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for workers, seconds in times.items():
            shutil.rmtree(folder / "runs" / "single_gpu" / "split", ignore_errors=True)
            start = time.monotonic()
            subprocess.run([*opensora, "split", *where, *source, f"--set=split.workers={workers}"], check=True)
            seconds.append(time.monotonic() - start)
    one, two = median(times[1]), median(times[2])
    return {
        "command": "python -m benchmarks.data_steps pool",
        "videos": POOL_VIDEOS,
        "seconds_one": round(one, 2),
        "seconds_two": round(two, 2),
        "ratio": round(one / two, 2),
        "rounds": {str(workers): [round(value, 2) for value in values] for workers, values in times.items()},
    }


def memory(folder: Path, clips: int) -> dict[str, object]:
    """Peak MiB of all processes of each step for a tenth of the clips and for all of them."""
    few, many = peaks(folder, clips // 10), peaks(folder, clips)
    return {
        "command": f"python -m benchmarks.data_steps memory --clips {clips}",
        "clips": [clips // 10, clips],
        "peak_mib": {step: [few[step], many[step]] for step in many},
        "growth": {step: round(many[step] / few[step], 3) for step in many},
    }


def peaks(folder: Path, clips: int) -> dict[str, float]:
    """Peak MiB of all processes of each step, with two workers."""
    import torch  # here, since every worker imports this file's head

    from opensora.demo.autoencoder import build_vae
    from opensora.demo.text_encoder import build_text_encoder

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
    found = {"split": split.run(SplitConfig(), inputs, base / "split", executor).peak_memory_mib}
    shutil.rmtree(base / "split")
    rows = captioned(base / "split", one.read_bytes(), clips)
    lax = ScoreConfig(min_short_side=None)
    found["score"] = score.run(lax, rows, base / "score", executor).peak_memory_mib
    sizes = EncodeConfig(sizes=((32, 32),), max_tokens=8, workers=2)
    report = encode.run(sizes, rows, rows, folder / "vae", folder / "t5", base / "encode", executor)
    found["encode"] = report.peak_memory_mib
    shutil.rmtree(base)
    return {name: round(value, 1) for name, value in found.items()}


def main() -> None:
    """Measure one of the two and save it."""
    from benchmarks.measure import save  # imports torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pool", "memory"))
    parser.add_argument("--clips", type=int, default=10_000, help="of memory")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        values = pool(Path(name)) if chosen.what == "pool" else memory(Path(name), chosen.clips)
    print(json.dumps(values, indent=2))
    print(save(f"data-steps-{chosen.what}-cpu", values))


if __name__ == "__main__":
    main()
