"""Decoding and writing video with PyAV: first video stream, rotation applied, exact times."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

IMAGE_CODECS = {"png", "mjpeg", "gif", "webp", "bmp", "tiff"}  # pictures that call themselves videos

NARROW = 256  # pixels; with AVX-512 x264's macroblock tree reads past narrower rows


class VideoError(ValueError):
    """A file is no usable video; the message starts with a reason and a colon."""


@dataclass(frozen=True)
class Probe:
    """What the head of a video tells."""

    width: int  # pixels, after rotation
    height: int
    fps: float  # average
    frames: int  # as the container says; 0 when it does not
    duration_s: float


def probe(path: Path) -> Probe:
    """Look at a video's head and decode its first frames.

    Raises:
        VideoError: "empty", "unreadable" or "not a video".
    """
    if path.stat().st_size == 0:
        raise VideoError("empty: the file has no bytes")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError("not a video: no video stream")
            stream = container.streams.video[0]
            codec = stream.codec_context.name
            if codec in IMAGE_CODECS:
                raise VideoError(f"not a video: a picture ({codec}) under a video's name")
            shapes = []
            for frame in container.decode(stream):
                shapes.append(_upright(frame).shape)
                if len(shapes) == 2:
                    break
            if len(shapes) < 2:
                raise VideoError("not a video: fewer than two frames")
            duration = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
            duration = duration or (container.duration or 0) / av.time_base
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            return Probe(shapes[0][1], shapes[0][0], fps, stream.frames, duration)
    except av.FFmpegError as error:
        raise VideoError(f"unreadable: {error.strerror or error}") from None


def decode(path: Path) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds, frame uint8 [H, W, 3]) of the first video stream, upright, from its first frame at 0.

    Raises:
        VideoError: "truncated" when it decodes at the head and fails later, "unreadable" when it never decodes.
    """
    first: float | None = None
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                if frame.time is None:
                    continue
                first = frame.time if first is None else first
                yield frame.time - first, _upright(frame)
    except av.FFmpegError as error:
        kind = "unreadable" if first is None else "truncated"
        raise VideoError(f"{kind}: {error.strerror or error}") from None


def _upright(frame: av.VideoFrame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round((frame.rotation or 0) / 90) % 4  # counter-clockwise
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def x264_params(width: int) -> str:
    """Parameters under which the same frames give the same bytes in every run."""
    return "log=0:no-mbtree=1" if width < NARROW else "log=0"


class ClipWriter:
    """Encodes one normalised clip: H.264, yuv420p, constant rate, short GOP, no audio, no edit list."""

    def __init__(self, width: int, height: int, fps: Fraction, crf: int, gop: int, note: str = "") -> None:
        self.buffer = io.BytesIO()
        self.frames = 0
        self.container = av.open(self.buffer, "w", format="mp4")
        if note:
            self.container.metadata["comment"] = note
        options = {"crf": str(crf), "preset": "veryfast", "x264-params": x264_params(width)}
        self.stream = self.container.add_stream("libx264", rate=fps, options=options)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        self.stream.codec_context.gop_size = gop
        self.stream.codec_context.max_b_frames = 0  # no reordering, so no edit list
        self.stream.codec_context.thread_count = 1  # the same bytes on every machine

    def add(self, pixels: np.ndarray) -> None:
        """Append one frame uint8 [H, W, 3], scaled down where it is larger."""
        size = (self.stream.width, self.stream.height)
        if (pixels.shape[1], pixels.shape[0]) != size:
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        self.frames += 1

    def finish(self) -> bytes:
        """Flush and return the mp4."""
        self.container.mux(self.stream.encode(None))
        self.container.close()
        return self.buffer.getvalue()


def read_frames(data: bytes, indices: Sequence[int] | None = None) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of a normalised clip; `indices` picks some, in ascending order."""
    wanted = None if indices is None else set(indices)
    frames = []
    with av.open(io.BytesIO(data), "r") as container:
        for index, frame in enumerate(container.decode(video=0)):
            if wanted is None or index in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
    picked = np.stack(frames)
    if indices is None:
        return picked
    order = sorted(wanted or ())
    return picked[[order.index(index) for index in indices]]


def resize_cover(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [T, H, W, 3] -> [T, height, width, 3]: scaled until it covers the size, then cut at the centre."""
    rows, columns = frames.shape[1:3]
    scale = max(height / rows, width / columns)
    size = (max(width, round(columns * scale)), max(height, round(rows * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    if size != (columns, rows):
        frames = np.stack([cv2.resize(frame, size, interpolation=how) for frame in frames])
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


def read_frames_at(data: bytes, positions: Sequence[float], size: int) -> np.ndarray:
    """Square frames uint8 [P, size, size, 3] at positions 0…1 of a normalised clip."""
    frames = read_frames(data)
    chosen = [min(len(frames) - 1, int(position * len(frames))) for position in positions]
    return resize_cover(frames[chosen], size, size)
