"""Reading normalised clips at the size that they are used at: every frame for encoding, a few for training.

Both scale with FFmpeg's bicubic filter, so that training from clips sees what the encode step saw.

Shapes: `T` frames, `H`, `W` frame size.
"""

import io
import logging
from collections.abc import Iterator, Sequence
from functools import cache

import av
import numpy as np
from av.video.reformatter import VideoReformatter

log = logging.getLogger(__name__)
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


def scaled_frames(data: bytes, sizes: Sequence[Size]) -> Iterator[list[np.ndarray]]:
    """Every frame of a clip, uint8 [height, width, 3] at each size: scaled to cover it, then cut at the centre.

    Raises:
        ClipError: it does not decode.
    """
    scalers = [VideoReformatter() for _ in sizes]  # one a size, as each keeps its filter
    try:
        with av.open(io.BytesIO(data), "r") as container:
            for frame in container.decode(video=0):
                made = []
                for scaler, size in zip(scalers, sizes, strict=True):
                    height, width = cover_size((frame.height, frame.width), size)
                    pixels = scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
                    made.append(cut_centre(pixels, size))
                yield made
    except (av.FFmpegError, IndexError) as error:  # IndexError: no video stream
        raise ClipError(getattr(error, "strerror", None) or str(error)) from error


def read_crop(data: bytes, indices: range, source: Size, size: Size) -> np.ndarray:
    """Frames of a normalised clip, uint8 [T, H, W, 3]: scaled to cover `size`, then cut at the centre.

    decord scales in the decoder, before the colours are converted; where it cannot be imported, PyAV does the same.

    Args:
        data: the mp4.
        indices: frames, rising.
        source: height and width of the clip.
        size: height and width wanted.

    Raises:
        ClipError: it does not decode, or has fewer frames.
    """
    height, width = cover_size(source, size)
    read = _read_decord if has_decord() else _read_pyav
    return cut_centre(read(data, indices, height, width), size)


@cache
def has_decord() -> bool:
    """Whether decord can be imported; said once where it cannot."""
    try:
        import decord  # noqa: F401
    except (ImportError, OSError) as error:
        log.warning("clips are read with PyAV, as decord cannot be imported (%s)", error)
        return False
    return True


def _read_decord(data: bytes, indices: range, height: int, width: int) -> np.ndarray:
    from decord import DECORDError, VideoReader

    try:
        # One thread: a loader worker has one core, and more cost processor time for frames that nobody asked for.
        reader = VideoReader(io.BytesIO(data), width=width, height=height, num_threads=1)
        if len(reader) <= indices[-1]:
            raise ClipError(f"it has {len(reader)} frames, and number {indices[-1]} was asked for")
        return reader.get_batch(list(indices)).asnumpy()
    except DECORDError as error:
        raise ClipError(str(error).strip().splitlines()[-1]) from error


def _read_pyav(data: bytes, indices: range, height: int, width: int) -> np.ndarray:
    wanted = set(indices)
    scaler = VideoReformatter()
    frames = []
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
            if len(times) <= indices[-1]:
                raise ClipError(f"it has {len(times)} frames, and number {indices[-1]} was asked for")
            number = {time: index for index, time in enumerate(times)}
            container.seek(times[indices[0]], stream=stream)  # to the key frame before it
            for frame in container.decode(stream):
                index = number[frame.pts or 0]
                if index in wanted:
                    frames.append(scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC").to_ndarray())
                if index >= indices[-1]:
                    break
    except av.FFmpegError as error:
        raise ClipError(error.strerror or str(error)) from error
    if len(frames) != len(indices):
        raise ClipError(f"{len(frames)} of {len(indices)} frames decode")
    return np.stack(frames)
