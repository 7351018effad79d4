"""The Fréchet distance: time against the matrix root, and its bias by the number of samples.

    python -m benchmarks.frechet          # one minute

Features are normal with a random covariance. The other way is the usual one: the covariances by `np.cov`, and SciPy's
`sqrtm` of their product; both take features and give the distance. One thread, CPU time, in turn. The bias is the
distance between two sets of the same distribution, whose true distance is 0, for standard normal features of 768
channels and for features of `randconv` of clips of the embedded world.
"""

import json

import numpy as np
from scipy.linalg import sqrtm
from threadpoolctl import threadpool_limits

from benchmarks.measure import alternate, save
from opensora.demo.shapes import all_scenes, render_clip
from opensora.metrics.features import randconv_features
from opensora.metrics.frechet import Statistics, frechet_distance

SIZES = ((2048, 768), (64, 512))  # samples, channels
COUNTS = (16, 64, 256, 1024, 2048)
WIDTH = 768
CLIPS = 1024  # of each set


def by_matrix_root(x: np.ndarray, y: np.ndarray) -> float:
    """As it is usually written."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real))


def compare(count: int, width: int) -> dict[str, float]:
    """Times of one size, and the difference of what they give."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(width, width)) / np.sqrt(width)
    x, y = rng.normal(size=(count, width)) @ mix, rng.normal(size=(count, width)) @ mix * 1.1 + 0.1
    kept = Statistics.from_features(x)
    calls = {
        "sqrtm": lambda: by_matrix_root(x, y),
        "ours": lambda: frechet_distance(x, y),
        "ours_kept": lambda: frechet_distance(kept, y),
    }
    times = alternate(calls, rounds=5)
    return {
        "samples": count,
        "channels": width,
        "seconds_sqrtm": round(times["sqrtm"], 4),
        "seconds_ours": round(times["ours"], 5),
        "times_faster": round(times["sqrtm"] / times["ours"], 2),
        "times_faster_with_kept_reference": round(times["sqrtm"] / times["ours_kept"], 2),
        "distance": round(frechet_distance(x, y), 6),
        "difference": float(f"{abs(frechet_distance(x, y) - by_matrix_root(x, y)):.2g}"),
    }


def bias_of_normal(count: int) -> float:
    """Mean distance of two sets of standard normal features, three times."""
    rng = np.random.default_rng(0)
    sets = [[rng.normal(size=(count, WIDTH)) for _ in range(2)] for _ in range(3)]
    return round(float(np.mean([frechet_distance(*pair) for pair in sets])), 1)


def bias_of_clips() -> dict[str, float]:
    """Mean distance of two sets of random scenes of the embedded world by number of clips."""
    rng = np.random.default_rng(0)
    scenes = all_scenes()
    clips = [render_clip(scenes[rng.integers(len(scenes))], 8, 64, rng) for _ in range(2 * CLIPS)]
    features = np.concatenate([randconv_features(clip[None]) for clip in clips])
    found = {}
    for count in (16, 64, 256, 1024):
        pairs = [features[start : start + 2 * count] for start in range(0, min(len(features), 16 * count), 2 * count)]
        distances = [frechet_distance(pair[:count], pair[count:]) for pair in pairs]
        found[str(count)] = float(f"{np.mean(distances):.3g}")
    return found


def main() -> None:
    """Measure and save."""
    with threadpool_limits(1):
        values = {
            "command": "python -m benchmarks.frechet",
            "against_sqrtm": [compare(*size) for size in SIZES],
            "distance_of_equal_distributions": {
                f"normal_{WIDTH}_channels": {str(count): bias_of_normal(count) for count in COUNTS},
                "randconv_64_channels": bias_of_clips(),
            },
        }
    print(json.dumps(values, indent=2))
    print(save("frechet", values))


if __name__ == "__main__":
    main()
