"""Reading normalised clips at the size that they are used at: every frame for encoding, a few for training.

Both go through one decoder and one filter, so that training from clips sees the pixels that the encode step saw.

Shapes: `T` frames, `H`, `W` frame size.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

Size = tuple[int, int]  # height and width, pixels


class ClipError(ValueError):
    """A clip does not decode, or not to the frames that are asked for."""


def cover_size(source: Size, size: Size) -> Size:
    """Height and width of `source` scaled, its aspect kept, until it covers `size`."""
    scale = max(size[0] / source[0], size[1] / source[1])
    return max(size[0], round(source[0] * scale)), max(size[1], round(source[1] * scale))


def cut_centre(frames: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [..., H, W, 3] -> [..., height, width, 3]."""
    top, left = (frames.shape[-3] - size[0]) // 2, (frames.shape[-2] - size[1]) // 2
    return np.ascontiguousarray(frames[..., top : top + size[0], left : left + size[1], :])


class _Scaler:
    """Frames at one size, by FFmpeg's bicubic filter; the filter is kept from frame to frame."""

    def __init__(self, size: Size) -> None:
        self.size, self._filter = size, VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [height, width, 3]: scaled to cover the size, then cut at the centre."""
        height, width = cover_size((frame.height, frame.width), self.size)
        # One thread: a loader worker has one core, and so has an encoding worker beside its model.
        scaled = self._filter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
        return cut_centre(scaled.to_ndarray(), self.size)


@contextmanager
def _opened(data: bytes) -> Iterator[InputContainer]:
    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.video:
                raise ClipError("it holds no video")
            container.streams.video[0].codec_context.thread_count = 1
            yield container
    except av.FFmpegError as error:
        raise ClipError(error.strerror or str(error)) from error


def scaled_frames(data: bytes, sizes: Sequence[Size]) -> Iterator[list[np.ndarray]]:
    """Every frame of a clip, uint8 [height, width, 3] at each size.

    Raises:
        ClipError: it does not decode.
    """
    scalers = [_Scaler(size) for size in sizes]
    with _opened(data) as container:
        for frame in container.decode(video=0):
            yield [scaler(frame) for scaler in scalers]


def read_crop(data: bytes, indices: range, size: Size) -> np.ndarray:
    """Frames of a normalised clip, uint8 [T, height, width, 3]; of the others, those after a key frame are decoded.

    Args:
        data: the mp4.
        indices: frames, rising.

    Raises:
        ClipError: it does not decode, or has fewer frames.
    """
    scaler, frames = _Scaler(size), []
    with _opened(data) as container:
        stream = container.streams.video[0]
        times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        if len(times) <= indices[-1]:
            raise ClipError(f"it has {len(times)} frames, and number {indices[-1]} was asked for")
        wanted = {times[index] for index in indices}
        container.seek(times[indices[0]], stream=stream)  # to the key frame before it
        for frame in container.decode(stream):
            if frame.pts in wanted:
                frames.append(scaler(frame))
            if frame.pts is not None and frame.pts >= times[indices[-1]]:
                break
    if len(frames) != len(indices):
        raise ClipError(f"{len(frames)} of {len(indices)} frames decode")
    return np.stack(frames)
