"""Weight-free measures of motion in uint8 videos [T, H, W, 3], computed in float64.

Three of VBench's dimensions (Huang et al. 2024, arXiv 2311.17982) ask the same questions; each docstring says how the
answer here relates to VBench's.
"""

import numpy as np

FLOW_SIDE = 256  # pixels of the shorter side at which flow is computed, in larger frames
FASTEST = 0.05  # share of pixels whose motion counts as a frame's: VBench's


def flicker(frames: np.ndarray) -> float:
    """(255 − mean |frame difference|) / 255: 1 for a video that does not change, lower the more pixels jump.

    The formula of VBench's `temporal_flickering`, which asks it of prompts for still scenes alone: elsewhere motion
    counts as flicker too. A frozen video scores perfectly; read it beside `dynamic_degree`.
    """
    return 1.0 if len(frames) < 2 else 1 - _change(frames) / 255


def dynamic_degree(frames: np.ndarray) -> float:
    """Mean absolute change from frame to frame as a share of the full range: 0 for a frozen video, 1 − `flicker`.

    VBench's `dynamic_degree` is another number: the share of videos that move, by optical flow. `moves` is that.
    """
    return 0.0 if len(frames) < 2 else _change(frames) / 255


def motion_smoothness(frames: np.ndarray) -> float:
    """1 when every frame is the mean of its neighbours, lower for jerks.

    VBench's `motion_smoothness` compares every second frame with one that a network (AMT) interpolates; here the
    neighbours' mean stands in for it, of every inner frame. A sharp object that moves evenly is no mean of its
    neighbours, so that this number falls with speed and contrast, where VBench's does not. A frozen video scores 1.
    """
    if len(frames) < 3:
        return 1.0
    steps = zip(frames[:-2], frames[1:-1], frames[2:], strict=True)
    return 1 - float(np.mean([np.abs(b - (a / 2 + c / 2)).mean() for a, b, c in steps])) / 255


def flow_degree(frames: np.ndarray) -> float:
    """How far the fastest 5 % of pixels move from frame to frame, as a share of the shorter side; 0 for a frozen video.

    It sees motion where `dynamic_degree` sees change: a fade changes every pixel and moves none. By Farnebäck's
    optical flow (2003), which follows textured things over a few pixels a frame.
    """
    return float(np.mean(flow_speeds(frames))) / min(frames.shape[1:3]) if len(frames) > 1 else 0.0


def moves(frames: np.ndarray, fps: float) -> bool:
    """Whether VBench's rule for `dynamic_degree` calls a video dynamic.

    Eight frames a second are looked at. In at least a quarter of them the fastest 5 % of pixels must move by more than
    6 pixels of a 256 pixel frame. The rule is VBench's; the flow is Farnebäck's here and RAFT's there, so that single
    videos near the limit may be judged otherwise.
    """
    frames = frames[:: max(1, round(fps / 8))]
    limit = 6.0 * max(1.0, 8.0 / fps) * min(frames.shape[1:3]) / 256
    needed = round(4 * len(frames) / 16)
    fast = int((flow_speeds(frames) > limit).sum())
    return fast > 0 and fast >= needed


def stands_still(frames: np.ndarray) -> bool:
    """Whether VBench's filter of still videos, which comes before `temporal_flickering`, would keep one.

    Few steps may have a fastest 2 % of pixels that moves by more than 3 pixels of a 256 pixel frame, and the last frame
    may not lie far from the first. The rule is VBench's, the flow Farnebäck's instead of RAFT's.
    """
    limit, allowed = 3.0 * min(frames.shape[1:3]) / 256, round(2 * len(frames) / 16)
    if int((flow_speeds(frames, 0.02) > limit).sum()) > allowed:
        return False
    return bool((flow_speeds(frames[[0, -1, 0]], 0.02) <= limit * allowed * 2).all())


def flow_speeds(frames: np.ndarray, share: float = FASTEST) -> np.ndarray:
    """Mean motion of the fastest `share` of pixels of each step, in pixels of the frames: float64 [T − 1]."""
    import cv2

    height, width = frames.shape[1:3]
    scale = min(1.0, FLOW_SIDE / min(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grey = [cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA) for frame in frames]
    count = max(1, int(share * size[0] * size[1]))
    speeds = []
    for before, after in zip(grey[:-1], grey[1:], strict=True):
        start = np.zeros((size[1], size[0], 2), np.float32)
        flow = cv2.calcOpticalFlowFarneback(before, after, start, 0.5, 3, 15, 3, 5, 1.2, 0)
        lengths = np.hypot(flow[..., 0], flow[..., 1]).ravel()
        speeds.append(float(np.partition(lengths, -count)[-count:].mean(dtype=np.float64)) / scale)
    return np.array(speeds)


def _change(frames: np.ndarray) -> float:
    """Mean |frame difference| in grey levels, a pair at a time: a long clip in float64 would be large."""
    pairs = zip(frames[:-1], frames[1:], strict=True)
    return float(np.mean([np.abs(np.subtract(b, a, dtype=np.float64)).mean() for a, b in pairs]))
