"""Decoding video with PyAV: its frames and their times, which of them are damaged, and whether it is whole."""

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from opensora.data.clip_reader import cover_size, cut_centre
from opensora.data.clock import Clock, Slots
from opensora.data.container import VideoError, declared_length, nominal_rate, open_video
from opensora.data.damage import Damage

NARROW = 256  # pixels; with AVX-512 x264's macroblock tree reads past narrower rows
DEFAULT_FPS = 25.0  # where a file does not say
COPY_OPAQUE = 1 << 7  # FFmpeg's AV_CODEC_FLAG_COPY_OPAQUE
MISSING_FRAMES, MISSING_S = 2.5, 0.1  # so much may be missing at the end, as heads are rounded


class TruncatedError(VideoError):
    """A video ends before its file says, or cannot be read further; raised after its last frame."""

    def __init__(self, decoded_s: float, declared_s: float, why: str = "") -> None:
        self.decoded_s, self.declared_s = decoded_s, max(decoded_s, declared_s)
        of = f" of {declared_s:.1f}" if declared_s > 0 else ""
        super().__init__(f"truncated: decoded {decoded_s:.1f}{of} s" + (f", then {why}" if why else ""))


@dataclass(frozen=True)
class Probe:
    """What the head of a video tells."""

    width: int  # pixels, after rotation
    height: int
    fps: float  # average
    frames: int  # as the container says; 0 when it does not
    duration_s: float


@dataclass(frozen=True)
class Picture:
    """One decoded frame as it is stored: not turned, its pixels of any form."""

    index: int  # in order of display
    seconds: float  # from the first frame
    frame: av.VideoFrame
    intact: bool  # False: it, or a frame that it is built on, does not decode


def probe(path: Path) -> Probe:
    """Look at a video's head and decode its first frames.

    Raises:
        VideoError: "empty", "unreadable", "not a video" or "too large".
    """
    with open_video(path) as (container, stream):
        found = []
        for picture in _Decoder(container, stream).run():
            found.append(picture)
            if len(found) == 2:
                break
        if len(found) < 2:
            raise VideoError("not a video: fewer than two frames")
        width, height = found[0].frame.width, found[0].frame.height
        if turns(found[0].frame) % 2:
            width, height = height, width
        duration = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        duration = duration or (container.duration or 0) / av.time_base
        return Probe(width, height, float(nominal_rate(stream)), stream.frames, duration)


def turns(frame: av.VideoFrame) -> int:
    """Quarter turns, counter-clockwise, that bring a frame upright."""
    return round((frame.rotation or 0) / 90) % 4


def pictures(path: Path) -> Iterator[Picture]:
    """All frames of a video in order of display, as long as it can be read.

    Frames before the first key frame are not shown, as by any player. One that does not decode, and all that follow it
    up to the next key frame, are not intact.

    Raises:
        VideoError: as `open_video`, and "unreadable" when no frame decodes.
        TruncatedError: after the last frame, when the file cannot be read further or its head says that it is longer.
    """
    with open_video(path) as (container, stream):
        yield from _Decoder(container, stream).run()


class _Decoder:
    """Decodes one stream from beginning to end."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.container, self.stream = container, stream
        self.clock = Clock(float(nominal_rate(stream)) or DEFAULT_FPS)
        self.slots = Slots() if container.format.name == "avi" else None
        self.damage = Damage()
        self.length = declared_length(container, stream)
        self.end_s = self.length.start_s  # of what came out so far, in the file's own time
        self.number = self.count = 0  # packets and frames so far
        self.key_seen = False
        stream.codec_context.flags |= COPY_OPAQUE  # frames carry the number of their packet

    def run(self) -> Iterator[Picture]:
        """The frames; errors as in `pictures`."""
        length, broken = self.length, ""
        packets = self.container.demux() if length.of_all else self.container.demux(self.stream)
        try:
            for packet in packets:
                if packet.stream.index == self.stream.index:
                    yield from self._shown(packet)
                elif packet.pts is not None and packet.time_base:
                    self.end_s = max(self.end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        except av.FFmpegError as error:
            broken = error.strerror or str(error)
            yield from self._shown(None)
        if not self.count:
            raise VideoError("unreadable: no frame decodes")
        if broken or length.end_s - self.end_s > max(MISSING_FRAMES * self.clock.step, MISSING_S):
            raise TruncatedError(self.end_s - length.start_s, length.end_s - length.start_s, broken)

    def _shown(self, packet: Packet | None) -> Iterator[Picture]:
        """The frames that come out after one more packet of the stream; after None, the last ones."""
        number = self.number
        self.number += 1
        if packet is not None:
            packet.opaque = number
            self.key_seen |= packet.is_keyframe
            if packet.is_corrupt:  # a part of it is missing
                self.damage.at(number)
            if self.slots:
                self.slots.put(number, packet.dts, packet.time_base)
        try:
            frames = packet.decode() if packet is not None else self.stream.codec_context.decode(None)
        except av.FFmpegError:
            if self.key_seen or self.count:  # before the first key frame nothing can decode
                self.damage.at(number)
            return
        for frame in frames:
            origin = frame.opaque if isinstance(frame.opaque, int) else number
            stamp = self.slots.take(origin, frame.key_frame) if self.slots else frame.time
            lasts = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else self.clock.step
            self.end_s = max(self.end_s, (stamp or 0.0) + lasts)
            intact = self.damage.passes(origin, frame.key_frame, frame.is_corrupt)
            yield Picture(self.count, self.clock.tell(stamp, intact), frame, intact)
            self.count += 1


def decode(path: Path) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds, frame uint8 [H, W, 3]) of a video, upright, from its first frame at 0.

    Raises:
        VideoError: as `pictures`, and "damaged" at a frame that does not decode.
    """
    for picture in pictures(path):
        if not picture.intact:
            raise VideoError(f"damaged: the frame at {picture.seconds:.3f} s does not decode")
        pixels = picture.frame.to_ndarray(format="rgb24")
        yield picture.seconds, np.ascontiguousarray(np.rot90(pixels, turns(picture.frame)))


def x264_params(width: int) -> str:
    """Parameters under which the same frames give the same bytes in every run."""
    return "log=0:no-mbtree=1" if width < NARROW else "log=0"


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


def pick_frames(data: bytes, positions: Sequence[float]) -> np.ndarray:
    """Frames uint8 [P, H, W, 3] of a normalised clip at positions 0…1; only what leads to them is decoded.

    Raises:
        VideoError: "unreadable".
    """
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the clips are read by several threads
            packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream)]
            times = sorted(pts for pts, _ in packets if pts is not None)
            keys = sorted(pts for pts, is_key in packets if is_key and pts is not None)
            wanted = [times[min(len(times) - 1, int(position * len(times)))] for position in positions]
            found, last_key = {}, None
            for moment in sorted(set(wanted)):
                key = keys[bisect_right(keys, moment) - 1]
                if key != last_key:
                    container.seek(moment, stream=stream)
                    frames, last_key = container.decode(stream), key
                frame = next(frame for frame in frames if frame.pts is not None and frame.pts >= moment)
                found[moment] = frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise VideoError(f"unreadable: {error.strerror or error}") from None
    except (IndexError, StopIteration):
        raise VideoError("unreadable: no video stream, or fewer frames than its head says") from None
    return np.stack([found[moment] for moment in wanted])


def read_frames_at(data: bytes, positions: Sequence[float], size: int) -> np.ndarray:
    """Square frames uint8 [P, size, size, 3] at positions 0…1 of a normalised clip; errors as in `pick_frames`."""
    return resize_cover(pick_frames(data, positions), (size, size))


def resize_cover(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [T, H, W, 3] -> [T, height, width, 3]: scaled until it covers the size, then cut at the centre."""
    source = frames.shape[1], frames.shape[2]
    scaled = cover_size(source, size)
    if scaled != source:
        how = cv2.INTER_AREA if scaled[0] <= source[0] and scaled[1] <= source[1] else cv2.INTER_CUBIC
        frames = np.stack([cv2.resize(frame, scaled[::-1], interpolation=how) for frame in frames])
    return cut_centre(frames, size)
