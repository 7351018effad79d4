"""The embedded world: coloured shapes that move, their captions, and a detector that reads them back."""

from dataclasses import dataclass
from itertools import product

import cv2
import numpy as np

COLOURS = {"red": (225, 45, 45), "green": (40, 190, 70), "blue": (50, 90, 235), "yellow": (235, 205, 40)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y of the image
RADIUS = (0.29, 0.31)  # share of the frame, least and most
START = (-0.05, -0.02)  # where a path begins, along its direction from the middle, share of the frame
END = (0.15, 0.18)  # where it ends
ACROSS = 0.03  # share of the frame that a path lies off the middle at most
DETECTOR_SIZE = 64  # pixels, frames are brought to this size before they are measured
MIN_SATURATION = 70  # of 255, of a pixel that belongs to an object
MIN_AREA = 0.02  # share of the frame that an object fills at least
MIN_TRAVEL = 0.06  # share of the frame that an object crosses at least
MIN_OVERLAP = 0.7  # intersection over union of an object with the shape that it is taken for; real clips give 0.9
OVERSAMPLE = 4  # drawn larger by this and averaged, for smooth edges


@dataclass(frozen=True)
class Scene:
    """What one shot shows."""

    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        """The one sentence that describes the scene."""
        return f"a {self.colour} {self.shape} moving {self.direction}"


@dataclass(frozen=True)
class Detection:
    """What the detector saw; None where it saw nothing."""

    colour: str | None
    shape: str | None
    direction: str | None


def all_scenes() -> list[Scene]:
    """All 48 combinations, in a fixed order."""
    return [Scene(*values) for values in product(COLOURS, SHAPES, DIRECTIONS)]


def held_out_scenes() -> list[Scene]:
    """Eight combinations that no video shows; each colour and direction is in two, each shape in two or three."""
    colours, directions = list(COLOURS), list(DIRECTIONS)
    return [Scene(colours[index % 4], SHAPES[index % 3], directions[(index + index // 4) % 4]) for index in range(8)]


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption of this world describes, or None for any other text."""
    words = text.lower().strip(" .").split()
    match words:
        case ["a", colour, shape, "moving", direction] if (
            colour in COLOURS and shape in SHAPES and direction in DIRECTIONS
        ):
            return Scene(colour, shape, direction)
    return None


def _outline(shape: str, radius: float) -> np.ndarray:
    """Corners [P, 2] of a shape round the origin, of about the same area for the same radius."""
    if shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "square":
        half = 0.93 * radius
        return np.array([[-half, -half], [half, -half], [half, half], [-half, half]])
    return 1.2 * radius * np.array([[0, -0.95], [1.0, 0.8], [-1.0, 0.8]])


def render_clip(scene: Scene, frames: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A clip of `scene`: uint8 [frames, size, size, 3]; `rng` draws size, path and background."""
    big = size * OVERSAMPLE
    radius = rng.uniform(*RADIUS) * big
    direction = np.array(DIRECTIONS[scene.direction], dtype=float)
    across = direction[::-1] * rng.uniform(-ACROSS, ACROSS) * big
    start, end = rng.uniform(*START) * big, rng.uniform(*END) * big
    background = np.full(3, rng.uniform(25, 60)) + rng.uniform(-4, 4, 3)
    colour = np.array(COLOURS[scene.colour], dtype=float)
    outline = _outline(scene.shape, radius)
    clip = np.empty((frames, size, size, 3), dtype=np.uint8)
    for index in range(frames):
        along = start + (end - start) * index / max(frames - 1, 1)
        centre = big / 2 + across + direction * along
        canvas = np.empty((big, big, 3), dtype=np.uint8)
        canvas[:] = background.round().astype(np.uint8)
        corners = np.round((outline + centre) * 16).astype(np.int32)
        cv2.fillPoly(canvas, [corners], colour.tolist(), lineType=cv2.LINE_AA, shift=4)
        clip[index] = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return clip


def _object(frame: np.ndarray) -> np.ndarray | None:
    """Mask [64, 64] of the largest saturated component of an RGB frame, or None."""
    frame = cv2.resize(frame, (DETECTOR_SIZE, DETECTOR_SIZE), interpolation=cv2.INTER_CUBIC)
    chroma = frame.max(axis=2).astype(int) - frame.min(axis=2)
    count, labels, stats, _ = cv2.connectedComponentsWithStats((chroma > MIN_SATURATION).astype(np.uint8))
    if count < 2:
        return None
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    if stats[largest, cv2.CC_STAT_AREA] < MIN_AREA * DETECTOR_SIZE**2:
        return None
    return labels == largest


def _overlaps(mask: np.ndarray) -> np.ndarray:
    """Intersection over union of a mask with each of `SHAPES`, drawn with the same area round the same centroid."""
    area, (row, column) = mask.sum(), np.argwhere(mask).mean(axis=0)
    overlaps = []
    for shape in SHAPES:
        outline = _outline(shape, 1.0)
        moments = cv2.moments(outline.astype(np.float32))
        outline -= np.array([moments["m10"], moments["m01"]]) / moments["m00"]
        corners = outline * np.sqrt(area / moments["m00"]) + [column, row]
        drawn = np.zeros(mask.shape, np.uint8)
        cv2.fillPoly(drawn, [np.round(corners * 16).astype(np.int32)], 1, shift=4)
        overlaps.append((mask & (drawn > 0)).sum() / (mask | (drawn > 0)).sum())
    return np.array(overlaps)


def _colour_of(frame: np.ndarray, mask: np.ndarray) -> str:
    big = cv2.resize(frame, (DETECTOR_SIZE, DETECTOR_SIZE), interpolation=cv2.INTER_CUBIC)
    inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    mean = big[inside if inside.any() else mask].mean(axis=0)
    return min(COLOURS, key=lambda name: float(np.linalg.norm(mean - np.array(COLOURS[name]))))


def detect(frames: np.ndarray) -> Detection:
    """Read a clip uint8 [T, H, W, 3] back.

    The colour is the nearest of the palette in most frames, the shape the one that overlaps most with the object over
    all frames, the direction that of the path from the first quarter of the frames to the last.
    """
    cv2.setNumThreads(1)  # its threads fight with those of the caller
    seen = [(index, _object(frame)) for index, frame in enumerate(frames)]
    found = [(index, mask) for index, mask in seen if mask is not None]
    if len(found) < max(1, len(frames) // 2):
        return Detection(None, None, None)
    colours = [_colour_of(frames[index], mask) for index, mask in found]
    overlaps = np.mean([_overlaps(mask) for _, mask in found], axis=0)
    shape = SHAPES[int(overlaps.argmax())] if overlaps.max() >= MIN_OVERLAP else None
    centres = np.array([np.argwhere(mask).mean(axis=0)[::-1] / DETECTOR_SIZE for _, mask in found])
    quarter = max(1, len(centres) // 4)
    path = centres[-quarter:].mean(axis=0) - centres[:quarter].mean(axis=0)
    direction = None
    if len(frames) > 1 and np.abs(path).max() > MIN_TRAVEL:
        direction = max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], path)))
    return Detection(_majority(colours), shape, direction)


def _majority(names: list[str]) -> str:
    return max(sorted(set(names)), key=names.count)
