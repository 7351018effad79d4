"""Splitting a 480p video: cutting against one ffmpeg process a clip, and the whole step against real time.

    python -m benchmarks.split VIDEO          # a minute for half a minute of 854x480; wants the program ffmpeg

CPU seconds of all threads and processes, in turn in one run. ffmpeg works as Open-Sora's preparation calls it: `-ss`
behind `-i`, so that spans are exact, x264's preset medium, its CRF of 23 unless another is asked for, a process a clip.
Both write the same spans at the video's own size; our CRF is 18.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.measure import save
from opensora.config import SplitConfig
from opensora.data.cut import Cut, cut_clips
from opensora.data.shots import Scan, find_clips, scan_video

ROUNDS = 3


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of a call, that of the processes it starts included."""

    def now() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(part.ru_utime + part.ru_stime for part in used)

    start = now()
    call()
    return now() - start


def by_ffmpeg(path: Path, scan: Scan, spans: list[tuple[int, int]], folder: Path, crf: int) -> None:
    """A process a clip, each of which decodes from the start of the file."""
    for number, (start, end) in enumerate(spans):
        begin, length = scan.timeline.at(start), scan.timeline.at(end) - scan.timeline.at(start)
        command = ["ffmpeg", "-y", "-loglevel", "error", "-threads", "1", "-i", str(path), "-ss", f"{begin:.6f}"]
        command += ["-t", f"{length:.6f}", "-an", "-c:v", "libx264", "-threads", "1", "-preset", "medium"]
        subprocess.run([*command, "-crf", str(crf), str(folder / f"{number}.mp4")], check=True)


def by_us(path: Path, scan: Scan, spans: list[tuple[int, int]], folder: Path, config: SplitConfig) -> None:
    """One pass for all clips."""
    cuts = [Cut(*span, folder / f"{number}.mp4") for number, span in enumerate(spans)]
    cut_clips(path, scan.timeline, cuts, config, scan.aspect)


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--ffmpeg-crf", type=int, default=23)
    chosen = parser.parse_args()
    if not shutil.which("ffmpeg"):
        sys.exit("this benchmark compares with the program ffmpeg; install it: apt-get install ffmpeg")
    config = SplitConfig(max_clip_s=1000)
    times: dict[str, list[float]] = {"scan": [], "cut": [], "ffmpeg": []}
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = Path(name, "ours"), Path(name, "theirs")
        ours.mkdir()
        theirs.mkdir()
        scan = scan_video(chosen.video, config)
        spans, _ = find_clips(scan, config)
        for _ in range(ROUNDS):
            times["scan"].append(cpu_seconds(lambda: scan_video(chosen.video, config)))
            times["cut"].append(cpu_seconds(lambda: by_us(chosen.video, scan, spans, ours, config)))
            times["ffmpeg"].append(cpu_seconds(lambda: by_ffmpeg(chosen.video, scan, spans, theirs, chosen.ffmpeg_crf)))
        sizes = {"ours": size(ours), "ffmpeg": size(theirs)}
    scanning, cutting, other = (median(times[part]) for part in ("scan", "cut", "ffmpeg"))
    seconds = scan.timeline.at(scan.timeline.frames)
    values = {
        "command": f"python -m benchmarks.split {chosen.video.name} --ffmpeg-crf {chosen.ffmpeg_crf}",
        "video_seconds": round(seconds, 2),
        "clips": len(spans),
        "cpu_seconds": {"scan": round(scanning, 2), "cut": round(cutting, 2), "ffmpeg": round(other, 2)},
        "cutting_times_faster": round(other / cutting, 2),
        "size_over_ffmpegs": round(sizes["ours"] / sizes["ffmpeg"], 3),
        "times_real_time_a_core": round(seconds / (scanning + cutting), 2),
    }
    print(json.dumps(values, indent=2))
    print(save("split-cpu", values))


if __name__ == "__main__":
    main()
