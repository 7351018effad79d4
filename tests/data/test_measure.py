"""Measures: what each of them sees, whatever the size and the rate; damage is told; long clips take no memory."""

import tracemalloc
from dataclasses import replace

import cv2
import numpy as np
import pytest

from opensora.data.measure import measure_clip
from opensora.data.video import VideoError
from tests.data.made_clips import encode

RNG = np.random.default_rng(0)
LAYERS = [cv2.GaussianBlur(RNG.normal(0, sigma, (288, 1024)), (0, 0), sigma) for sigma in (2, 4, 8, 16, 32)]
DETAIL = cv2.normalize(np.sum(LAYERS, axis=0), None, 20, 235, cv2.NORM_MINMAX)  # of all sizes, as real pictures have
WIDE = np.repeat(DETAIL.astype(np.uint8)[..., None], 3, axis=2)
GREY = np.full((64, 96, 3), 128, np.uint8)


def pan(speed: float, fps: float = 24, size: tuple[int, int] = (512, 288), seconds: float = 1.5) -> list[np.ndarray]:
    """Texture that moves to the left, by `speed` diagonals a second."""
    frames = []
    for index in range(round(seconds * fps)):
        shift = speed * np.hypot(512, 288) * index / fps
        move = np.array([[1, 0, -shift], [0, 1, 0]], np.float32)
        frame = cv2.warpAffine(WIDE, move, (512, 288), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        frames.append(cv2.resize(frame, size, interpolation=cv2.INTER_AREA))
    return frames


def scores(frames: list[np.ndarray], fps: float = 24) -> dict[str, float]:
    return measure_clip(*encode(frames, fps)).scores


def hash_of(frames: list[np.ndarray], fps: float = 24, crf: int = 18) -> str:
    return measure_clip(*encode(frames, fps, crf)).perceptual_hash


def bits_apart(one: str, two: str) -> int:
    return (int(one, 16) ^ int(two, 16)).bit_count()


@pytest.fixture(scope="module")
def moving() -> dict[str, float]:
    return scores(pan(0.1))


def test_duration_and_size() -> None:
    found = scores([GREY] * 36)
    assert found["duration_s"] == 1.5
    assert found["short_side"] == 64


def test_black_and_brightness(moving: dict[str, float]) -> None:
    black, white, half = GREY * 0, np.full_like(GREY, 255), GREY.copy()
    half[:, :48] = 0
    assert scores([black] * 8)["black"] == 1
    assert scores([half] * 8)["black"] == pytest.approx(0.5, abs=0.03)
    assert scores([black] * 8)["brightness"] == pytest.approx(0, abs=2)
    assert scores([white] * 8)["brightness"] == pytest.approx(255, abs=2)
    assert moving["black"] < 0.01
    assert moving["brightness"] == pytest.approx(WIDE.mean(), abs=8)


def test_a_still_picture_is_static_even_with_grain(moving: dict[str, float]) -> None:
    still = WIDE[:, :512]
    grain = [np.clip(still + RNG.normal(0, 2, still.shape), 0, 255).astype(np.uint8) for _ in range(24)]
    assert scores([still] * 24)["frame_difference"] < 0.1
    assert scores(grain)["frame_difference"] < 0.2 < scores(pan(0.002))["frame_difference"]
    assert moving["frame_difference"] > 5
    assert scores(grain)["motion"] < 1e-3


def test_a_blurred_picture_is_less_sharp() -> None:
    fine = RNG.integers(0, 255, (288, 512, 3), dtype=np.uint8)
    found = [
        scores([cv2.GaussianBlur(fine, (0, 0), sigma) if sigma else fine] * 4)["sharpness"] for sigma in (0, 1, 2, 4)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 10 * found[2] > 100 * found[3] / 10
    assert scores([GREY] * 4)["sharpness"] < 1


@pytest.mark.parametrize("speed", [0.005, 0.03, 0.1, 0.3])
def test_motion_is_the_speed_of_a_pan(speed: float) -> None:
    assert scores(pan(speed))["motion"] == pytest.approx(speed, rel=0.15)


@pytest.mark.parametrize(("fps", "size"), [(12, (512, 288)), (60, (512, 288)), (24, (910, 512)), (24, (456, 256))])
def test_rate_and_resolution_change_little(fps: int, size: tuple[int, int], moving: dict[str, float]) -> None:
    found = scores(pan(0.1, fps, size), fps)
    for name, tolerance in {"motion": 0.1, "frame_difference": 0.35, "sharpness": 0.35, "brightness": 0.03}.items():
        assert found[name] == pytest.approx(moving[name], rel=tolerance), name


def test_the_shortest_clips_are_measured() -> None:
    assert scores(pan(0.1, seconds=2 / 24))["motion"] == pytest.approx(0.1, rel=0.2)
    one = scores([GREY])
    assert (one["frame_difference"], one["motion"]) == (0, 0)


def test_the_hash_outlives_encoding_size_and_brightness() -> None:
    first = hash_of(pan(0.1))
    assert len(first) == 16
    darker = [(frame * 0.8 + 15).astype(np.uint8) for frame in pan(0.1)]
    for other in (hash_of(pan(0.1), crf=35), hash_of(pan(0.1, size=(256, 144))), hash_of(darker)):
        assert bits_apart(first, other) <= 4
    turned = [np.ascontiguousarray(frame[::-1]) for frame in pan(0.1)]
    assert bits_apart(first, hash_of(turned)) > 16


def test_the_hash_tells_directions_apart() -> None:
    frames = pan(0.2)[:-1]  # an odd number: forwards and backwards they share the frame in the middle
    assert bits_apart(hash_of(frames), hash_of(frames[::-1])) > 8


def test_flat_frames_have_no_hash_of_noise() -> None:
    assert hash_of([GREY] * 12) == ""
    noisy = [np.clip(GREY + RNG.normal(0, 3, GREY.shape), 0, 255).astype(np.uint8) for _ in range(12)]
    assert hash_of(noisy) == ""
    from_black = [GREY * 0] * 8 + pan(0.1, size=(96, 64))[:16]
    bits = f"{int(hash_of(from_black), 16):064b}"
    assert set(bits[:56:3]) == {"0"}  # of the first frame, which is black
    assert set(bits[1:56:3]) == set(bits[2:56:3]) == {"0", "1"}


def test_the_hash_sees_colour() -> None:
    def square(*colour: int) -> list[np.ndarray]:
        frame = np.full((64, 96, 3), 40, np.uint8)
        frame[16:48, 32:64] = colour
        return [frame] * 12

    red, blue, grey = (hash_of(square(*colour)) for colour in ((200, 60, 60), (60, 60, 255), (100, 100, 100)))
    assert bits_apart(red, blue) >= 3
    assert grey[-2:] == "cc"  # above −20 and −6, below 6 and 20


def test_frames_for_clip_are_those_at_the_positions() -> None:
    frames = [np.full((64, 96, 3), 10 * index, np.uint8) for index in range(20)]
    data, clip = encode(frames, crf=1)
    pictures = measure_clip(data, clip, pictures=True).pictures
    assert pictures is not None
    assert pictures.shape == (3, 64, 96, 3)
    assert pictures.mean(axis=(1, 2, 3)) == pytest.approx([40, 100, 160], abs=3)
    assert measure_clip(data, clip).pictures is None


def test_damage_is_told() -> None:
    data, clip = encode(pan(0.1, size=(256, 144)))
    flipped = bytearray(data)
    middle = len(data) // 2
    flipped[middle : middle + 400] = RNG.bytes(400)
    for broken in (b"", b"\0" * 900, RNG.bytes(5000), data[: len(data) // 2], data[200:], bytes(flipped), b"#EXTM3U\n"):
        with pytest.raises(VideoError, match=r"^unreadable: "):
            measure_clip(broken, clip)
    with pytest.raises(VideoError, match="unreadable: 36 frames, the manifest says 35"):
        measure_clip(data, replace(clip, frames=35))
    with pytest.raises(VideoError, match="unreadable: 256×144 pixels, the manifest says 64×64"):
        measure_clip(data, replace(clip, width=64, height=64))
    with pytest.raises(VideoError, match="unreadable: the manifest says 0 frames"):
        measure_clip(data, replace(clip, frames=0))


def test_a_long_clip_takes_no_more_memory() -> None:
    frames = pan(0.02, size=(320, 180), seconds=3)
    data, clip = encode(frames * 5)
    assert clip.frames == 360
    tracemalloc.start()
    measure_clip(data, clip, pictures=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * frames[0].nbytes  # 360 frames would be 62 MB
