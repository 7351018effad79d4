"""Random training reads of normalised clips: ours against decord as it comes.

    python -m benchmarks.reads VIDEO          # half a minute

A read is 16 frames at interval 3 from a random place of a random clip, at 256x256, from the clip's bytes: the same
reads of the same clips for both, in turn, in CPU seconds of all threads. decord as it comes decodes at the clip's size
with its own number of threads, and the frames are scaled afterwards.
"""

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.measure import alternate, save
from opensora.config import SplitConfig
from opensora.data.clip_reader import read_crop
from opensora.data.cut import Cut, cut_clips
from opensora.data.shots import find_clips, scan_video
from opensora.data.video import resize_cover

FRAMES, INTERVAL, SIZE = 16, 3, (256, 256)
READS = 40
Read = tuple[bytes, tuple[int, int], range]  # a clip, its height and width, the frames


def draw(video: Path, folder: Path) -> list[Read]:
    """Random reads of the clips that `split` makes of a video."""
    config = SplitConfig(max_clip_s=5)
    scan = scan_video(video, config)
    span = (FRAMES - 1) * INTERVAL + 1
    cuts = [Cut(*clip, folder / f"{clip[0]}.mp4") for clip in find_clips(scan, config)[0] if clip[1] - clip[0] >= span]
    written = cut_clips(video, scan.timeline, cuts, config, scan.aspect)
    rng = np.random.default_rng(0)
    reads = []
    for _ in range(READS):
        cut = cuts[rng.integers(len(cuts))]
        about = written[cut]
        start = int(rng.integers(about.frames - span + 1))
        reads.append((cut.path.read_bytes(), (about.height, about.width), range(start, start + span, INTERVAL)))
    return reads


def by_decord(read: Read) -> np.ndarray:
    """decord as it comes."""
    from decord import VideoReader

    data, _, indices = read
    return resize_cover(VideoReader(io.BytesIO(data)).get_batch(list(indices)).asnumpy(), SIZE)


def by_us(read: Read) -> np.ndarray:
    """The reader of `ClipDataset`."""
    data, _, indices = read
    return read_crop(data, indices, SIZE)


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    video = parser.parse_args().video
    with tempfile.TemporaryDirectory() as name:
        reads = draw(video, Path(name))
    difference = float(np.abs(by_decord(reads[0]).astype(int) - by_us(reads[0])).mean())

    def all_of(how: Callable[[Read], np.ndarray]) -> Callable[[], None]:
        return lambda: [how(read) for read in reads] and None

    times = alternate({"decord": all_of(by_decord), "ours": all_of(by_us)}, rounds=3)
    values = {
        "command": f"python -m benchmarks.reads {video.name}",
        "milliseconds_a_read": {how: round(1000 * value / READS, 1) for how, value in times.items()},
        "times_faster": round(times["decord"] / times["ours"], 2),
        "mean_difference_levels": round(difference, 2),
    }
    print(json.dumps(values, indent=2))
    print(save("reads-cpu", values))


if __name__ == "__main__":
    main()
