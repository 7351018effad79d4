"""Weight-free measures of motion in uint8 videos [T, H, W, 3]."""

import numpy as np


def flicker(frames: np.ndarray) -> float:
    """1 for a video that does not change, lower the more pixels jump: (255 − mean |frame difference|) / 255.

    A frozen video scores perfectly; read it beside `dynamic_degree`.
    """
    return 1.0 if len(frames) < 2 else 1 - _change(frames) / 255


def dynamic_degree(frames: np.ndarray) -> float:
    """Mean absolute change from frame to frame, as a share of the full range."""
    return 0.0 if len(frames) < 2 else _change(frames) / 255


def motion_smoothness(frames: np.ndarray) -> float:
    """1 when every frame is the mean of its neighbours, lower for jerks."""
    if len(frames) < 3:
        return 1.0
    x = frames.astype(np.float32)
    return float(1 - np.abs(x[1:-1] - (x[:-2] + x[2:]) / 2).mean() / 255)


def _change(frames: np.ndarray) -> float:
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())
