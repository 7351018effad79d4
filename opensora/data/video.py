"""Opening and decoding video with PyAV: which stream is the video, its frames and their times, what is damaged."""

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from opensora.data.clip_reader import cover_size, cut_centre

PICTURE_CODECS = {"png", "apng", "gif", "webp", "bmp", "tiff", "jpegls", "jpeg2000", "ppm", "svg"}
PLAYLISTS = {"hls", "dash", "concat", "imf", "sdp", "rtsp"}  # they name other files, which would be opened too
MAX_PIXELS = 1 << 26  # of a frame: twice 8K; a larger one takes a gigabyte to decode
MAX_FPS = 240.0
MAX_GAP_S = 10.0  # from one frame to the next; more is a jump of the clock, as in joined broadcasts
SAME_S = 1e-6  # by which a frame whose time is not past the one before it follows that one
NARROW = 256  # pixels; with AVX-512 x264's macroblock tree reads past narrower rows
DEFAULT_FPS = 25.0  # where a file does not say


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


@dataclass(frozen=True)
class Picture:
    """One decoded frame as it is stored: not turned, its pixels of any form."""

    index: int  # in order of display
    seconds: float  # from the first frame
    frame: av.VideoFrame
    intact: bool  # False: it, or a frame that it is built on, does not decode


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its first video stream that is no cover picture; one thread, and nothing but this file is opened.

    Raises:
        VideoError: "empty", "unreadable", "not a video" or "too large".
    """
    if path.stat().st_size == 0:
        raise VideoError("empty: the file has no bytes")
    limits = {"max_pixels": str(MAX_PIXELS), "protocol_whitelist": "file"}
    try:
        # An absolute path, since FFmpeg reads "a:b.mp4" as a protocol.
        with av.open(str(path.absolute()), options=limits, metadata_errors="replace") as container:
            stream = _pick(container)
            context = stream.codec_context
            if context.width * context.height > MAX_PIXELS:
                raise VideoError(f"too large: {context.width}x{context.height} pixels, at most {MAX_PIXELS} in all")
            context.thread_count = 1
            context.options = {"max_pixels": limits["max_pixels"]}
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(f"unreadable: {error.strerror or error}") from None


def _pick(container: InputContainer) -> VideoStream:
    form = container.format.name
    if form.split(",")[0] in PLAYLISTS:
        raise VideoError(f"not a video: a list of files ({form})")
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise VideoError("not a video: no video stream")
    context = streams[0].codec_context
    if context is None:
        raise VideoError("unreadable: nothing here decodes its codec")
    if context.name in PICTURE_CODECS or form.endswith("_pipe") or form == "image2":
        raise VideoError(f"not a video: a picture ({context.name}) under a video's name")
    return streams[0]


def probe(path: Path) -> Probe:
    """Look at a video's head and decode its first frames.

    Raises:
        VideoError: "empty", "unreadable", "not a video" or "too large".
    """
    with open_video(path) as (container, stream):
        found = []
        for picture in _decoded(container, stream):
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


def nominal_rate(stream: VideoStream) -> Fraction:
    """Frames a second as the file says, on the average; 0 when it does not."""
    rate = stream.average_rate or stream.guessed_rate or Fraction(0)
    return Fraction(rate.numerator, rate.denominator) if rate.denominator else Fraction(0)


def turns(frame: av.VideoFrame) -> int:
    """Quarter turns, counter-clockwise, that bring a frame upright."""
    return round((frame.rotation or 0) / 90) % 4


def pictures(path: Path) -> Iterator[Picture]:
    """All frames of a video in order of display, as long as it can be read.

    Frames before the first key frame are not shown, as by any player. One that does not decode, and all that follow it
    up to the next key frame, are not intact.

    Raises:
        VideoError: as `open_video`, "unreadable" when no frame decodes, and after the last frame that could be read
            "truncated" when the file breaks off.
    """
    with open_video(path) as (container, stream):
        empty = True
        for picture in _decoded(container, stream):
            empty = False
            yield picture
        if empty:
            raise VideoError("unreadable: no frame decodes")


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[Picture]:
    clock = _Clock(float(nominal_rate(stream)) or DEFAULT_FPS)
    damage = _Damage()
    count = 0
    broken: VideoError | None = None
    packets = container.demux(stream)
    while broken is None:
        try:
            packet = next(packets, None)
            if packet is None:
                return
        except av.FFmpegError as error:
            broken = VideoError(f"truncated: {error.strerror or error}")
            packet = None
        try:
            frames = packet.decode() if packet else stream.codec_context.decode(None)
        except av.FFmpegError:
            if packet is not None and count:
                damage.at(packet.pts if packet.pts is not None else packet.dts)
            continue
        for frame in frames:
            intact = damage.passes(frame)
            yield Picture(count, clock.tell(frame), frame, intact)
            count += 1
    raise broken


class _Damage:
    """Which frames are built on something that did not decode, by their times in the file's unit."""

    def __init__(self) -> None:
        self.since: int | None = None
        self.latest = 0

    def at(self, pts: int | None) -> None:
        """Something of that time does not decode; without a time all is damaged that comes out from now on."""
        pts = -(1 << 62) if pts is None else pts
        self.since = pts if self.since is None else min(self.since, pts)
        self.latest = max(self.latest, pts)

    def passes(self, frame: av.VideoFrame) -> bool:
        """Whether a frame is intact; a key frame after the damage ends it."""
        pts = frame.pts if frame.pts is not None else self.latest + 1
        if frame.is_corrupt:
            self.at(pts)
        if self.since is None:
            return True
        if frame.key_frame and pts > self.latest:
            self.since, self.latest = None, 0
            return True
        return pts < self.since


class _Clock:
    """Times of frames in seconds from the first, always rising, whatever the file's timestamps are."""

    def __init__(self, fps: float) -> None:
        self.step = 1 / min(fps, MAX_FPS)
        self.offset = 0.0
        self.last: float | None = None

    def tell(self, frame: av.VideoFrame) -> float:
        """The time of the next frame.

        One without a timestamp, or after a jump of the clock, follows by the usual step; one that is not past the frame
        before it follows at once.
        """
        stamp = frame.time
        if self.last is None:
            self.offset, self.last = stamp or 0.0, 0.0
            return 0.0
        following = self.last + self.step
        seconds = following if stamp is None else stamp - self.offset
        if stamp is not None and abs(seconds - self.last) > MAX_GAP_S:
            self.offset, seconds = stamp - following, following
        self.last = max(seconds, self.last + SAME_S)
        return self.last


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
