"""What the frames of a clip say about it: darkness, change, motion, sharpness and a perceptual hash, in one pass.

A clip is looked at eight times a second at sizes of their own, so that clips of different rates and resolutions can be
compared and a long clip takes no more memory than a short one:

    black, brightness, frame_difference   grey frames, at most 128 pixels on the longer side, every 1/8 s
    motion                                pairs of them 1/8 s apart, two pairs a second
    sharpness                             grey frames, at most 256 pixels on the shorter side, every 1/2 s
    perceptual hash                       frames of 32×32 pixels at three positions
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import av
import cv2
import numpy as np

from opensora.data.video import VideoError
from opensora.manifest import Clip

MEASURES = 1  # their version: another one makes every clip be measured anew
SAMPLE_FPS = 8.0  # looks a second
MOTION_FPS = 2.0  # looks a second that sharpness and motion take
SMALL = 128  # pixels of the longer side; smaller frames keep their size
SHARP = 256  # pixels of the shorter side; a blur that is gone at this size is not seen
BLACK = 16  # of 255, darker pixels are black
POSITIONS = (0.2, 0.5, 0.8)  # of the frames that are hashed, and shown to CLIP
HASH_SIDE = 32  # pixels
TINTS = (-20, -6, 6, 20)  # levels of Cr and Cb, none of them where grey pictures lie
# The lowest cosine waves of a picture without its mean, as (row, column).
WAVES = sorted(np.ndindex(11, 11), key=lambda at: (sum(at), at))[1:57]
FLAT = 2.0  # grey levels, standard deviation: the hash of a flatter frame would be noise


@dataclass(frozen=True)
class Measured:
    """What one pass over a clip gave."""

    scores: dict[str, float]
    perceptual_hash: str  # 16 hexadecimal digits; empty for a clip of flat colour
    pictures: np.ndarray | None = None  # uint8 [P, H, W, 3], frames at POSITIONS where they were asked for


def measure_clip(data: bytes, clip: Clip, pictures: bool = False) -> Measured:
    """Decode the mp4 of a clip once, holding a few frames at a time.

    Args:
        clip: its row; frames, fps, width and height must be those of the data.

    Raises:
        VideoError: "unreadable: …", the data is damaged, or not that clip's.
    """
    if clip.frames < 1 or clip.fps <= 0:
        raise VideoError(f"unreadable: the manifest says {clip.frames} frames, {clip.fps:g} a second")
    chosen = [min(clip.frames - 1, int(position * clip.frames)) for position in POSITIONS]
    meter = Meter(clip.fps, clip.frames)
    hashed: dict[int, np.ndarray] = {}
    shown: dict[int, np.ndarray] = {}
    index = -1
    for index, frame in enumerate(decode_clip(data)):
        if (frame.width, frame.height) != (clip.width, clip.height):
            raise VideoError(
                f"unreadable: {frame.width}×{frame.height} pixels, the manifest says {clip.width}×{clip.height}"
            )
        if index % meter.step == 0:
            meter.add(frame.to_ndarray(format="gray"))
        if index in chosen:
            picture = frame.to_ndarray(format="rgb24")
            hashed[index] = cv2.resize(picture, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)
            if pictures:
                shown[index] = picture
    if index + 1 != clip.frames:
        raise VideoError(f"unreadable: {index + 1} frames, the manifest says {clip.frames}")
    scores = {"duration_s": clip.frames / clip.fps, "short_side": float(min(clip.width, clip.height))}
    return Measured(
        scores | meter.scores(),
        perceptual_hash([hashed[index] for index in chosen]),
        np.stack([shown[index] for index in chosen]) if pictures else None,
    )


def decode_clip(data: bytes) -> Iterator[av.VideoFrame]:
    """The frames of a normalised clip, one at a time.

    Raises:
        VideoError: "unreadable: …"
    """
    try:
        with av.open(io.BytesIO(data), "r", format="mp4") as container:  # bytes of any other form are not tried
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # a worker process a core is cheaper than threads
            stream.codec_context.options = {"err_detect": "explode"}  # a damaged picture is no picture
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise VideoError("unreadable: a frame is damaged")
                yield frame
    except av.FFmpegError as error:
        raise VideoError(f"unreadable: {error.strerror or error}") from None
    except IndexError:
        raise VideoError("unreadable: no video stream") from None


@dataclass
class Meter:
    """Sums over the grey frames uint8 [H, W] of a clip that is sampled every `step` frames."""

    fps: float
    frames: int
    count: int = 0
    black: float = 0.0
    brightness: float = 0.0
    difference: float = 0.0
    sharpness: list[float] = field(default_factory=list)
    flows: list[float] = field(default_factory=list)
    before: np.ndarray | None = None  # the last sampled frame, small

    @property
    def step(self) -> int:
        """Frames from look to look: SAMPLE_FPS, but at least two looks a clip."""
        return max(1, min(round(self.fps / SAMPLE_FPS), self.frames - 1))

    @property
    def stride(self) -> int:
        """Looks from one at sharpness and motion to the next."""
        return max(1, round(self.fps / self.step / MOTION_FPS))

    def add(self, grey: np.ndarray) -> None:
        """Take the next sampled frame, at full size."""
        middle = _shrink(grey, SHARP / min(grey.shape))
        small = _shrink(middle, SMALL / max(middle.shape))
        self.black += float((small < BLACK).mean())
        self.brightness += float(small.mean())
        if self.before is not None:
            self.difference += float(cv2.absdiff(small, self.before).mean())
            if self.count % self.stride == 1 % self.stride:
                self.flows.append(flow(self.before, small, self.step / self.fps))
        if self.count % self.stride == 0:
            _, deviation = cv2.meanStdDev(cv2.Laplacian(middle, cv2.CV_16S))
            self.sharpness.append(float(deviation[0, 0] ** 2))
        self.before = small
        self.count += 1

    def scores(self) -> dict[str, float]:
        """The scores of all frames added so far.

        black: share of pixels below BLACK. brightness: mean grey level, 0…255. frame_difference: mean absolute change
        of the grey level from look to look. motion: mean of `flow` from look to look. sharpness: variance of the
        Laplacian (Pech-Pacheco et al. 2000), the median over the clip, so that a short motion blur does not count.
        """
        return {
            "black": self.black / self.count,
            "brightness": self.brightness / self.count,
            "frame_difference": self.difference / max(1, self.count - 1),
            "sharpness": float(np.median(self.sharpness)),
            "motion": float(np.mean(self.flows)) if self.flows else 0.0,
        }


def _shrink(grey: np.ndarray, scale: float) -> np.ndarray:
    """Scaled down by the mean of areas, never up."""
    if scale >= 1:
        return grey
    size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def flow(before: np.ndarray, after: np.ndarray, seconds: float) -> float:
    """Mean length of the optical flow between grey frames [H, W], as a share of their diagonal a second.

    Farnebäck's dense flow (2003). It follows fine texture over about 5 % of the diagonal from frame to frame, so that
    at SAMPLE_FPS it tells speeds up to 0.4 a second; half a second apart it would lose them at 0.1 a second.
    """
    field = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)
    return float(cv2.magnitude(field[..., 0], field[..., 1]).mean() / np.hypot(*before.shape) / seconds)


def perceptual_hash(frames: list[np.ndarray]) -> str:
    """64 bits of small frames uint8 [H, W, 3] at POSITIONS, as 16 hexadecimal digits; empty when all of them are flat.

    Each of 56 bits says whether one of the lowest cosine waves of the grey picture is stronger than the median of its
    frame's (Zauner 2010). The waves are taken from the frames in turn: a still clip has the 56 bits of its picture,
    and clips that pass through the same picture in different directions are told apart. The other bits count how far
    the mean colour is from grey, as waves of grey know no colour.
    """
    bits = np.zeros(len(WAVES), bool)
    flat = True
    colours = [cv2.cvtColor(frame, cv2.COLOR_RGB2YCrCb) for frame in frames]
    for index, colour in enumerate(colours):
        grey = colour[..., 0].astype(np.float32)
        if grey.std() < FLAT:
            continue
        flat = False
        waves = cv2.dct(grey)
        values = np.array([waves[at] for at in WAVES[index :: len(frames)]])
        bits[index :: len(frames)] = values > np.median(values)
    if flat:
        return ""
    tints = np.mean([colour[..., 1:].mean(axis=(0, 1)) for colour in colours], axis=0) - 128
    tinted = tints[:, None] > np.array(TINTS)
    return np.packbits(np.concatenate([bits, tinted.flatten()])).tobytes().hex()
