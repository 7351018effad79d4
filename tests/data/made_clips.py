"""Clips made of arrays, in the form in which the split step writes them."""

import io
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from opensora.data.shards import ShardWriter
from opensora.manifest import Clip, part_name, write_part

Made = tuple[bytes, Clip]


def encode(frames: Sequence[np.ndarray], fps: float = 24, crf: int = 18, clip_id: str = "a", caption: str = "") -> Made:
    """The mp4 of frames uint8 [H, W, 3], and its row."""
    height, width = frames[0].shape[:2]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": str(crf), "preset": "veryfast", "x264-params": "log=0:no-mbtree=1"}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 30, 0
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    clip = Clip(clip_id, f"{clip_id}.mp4", frames=len(frames), fps=fps, width=width, height=height, caption=caption)
    return buffer.getvalue(), clip


def write_split(folder: Path, parts: Sequence[Sequence[Made]]) -> Path:
    """A split step's folder of these clips; a clip without data is a row dropped earlier."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, made in enumerate(parts):
        writer = ShardWriter(folder, index, 100)
        rows = []
        for data, clip in made:
            if data:
                shard, offset, size = writer.add(clip.clip_id, data, {})
                clip = replace(clip, shard=shard, offset=offset, size=size)
            rows.append(clip)
        writer.close()
        write_part(folder / part_name(index), rows)
    return folder
