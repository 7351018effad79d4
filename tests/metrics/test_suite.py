"""The suite: rows that JSON takes, names that say what was measured, and reasons for what was not."""

import json
from pathlib import Path

import numpy as np
import pytest

from opensora.metrics.features import randconv_features
from opensora.metrics.frechet import frechet_distance
from opensora.metrics.suite import Suite
from opensora.weights import WeightsError
from tests.data.tiny_clip import build_clip
from tests.metrics.tiny_models import build_dino, build_videomae

RNG = np.random.default_rng(0)
MADE = RNG.integers(0, 256, (6, 4, 16, 16, 3), dtype=np.uint8)
REAL = RNG.integers(0, 200, (7, 4, 16, 16, 3), dtype=np.uint8)
PROMPT = "a red square"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    base = tmp_path_factory.mktemp("weights")
    clip = build_clip(base / "clip")
    return Suite.load(build_videomae(base / "videomae"), None, build_dino(base / "dino"), clip, device="cpu")


def rows_of(suite: Suite, clips: np.ndarray) -> list[dict]:
    return json.loads(json.dumps([suite.clip(frames, PROMPT) for frames in clips], allow_nan=False))


def reference_of(suite: Suite, clips: np.ndarray) -> dict[str, np.ndarray]:
    rows = [suite.reference(frames) for frames in clips]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def test_without_weights() -> None:
    suite = Suite.load(None, None, None, None)
    assert suite.names == ("randconv",)
    assert suite.absent == {
        "fvd_videomae": "evaluate.videomae is not set",
        "fvd_i3d": "evaluate.i3d is not set",
        "fid": "evaluate.inception is not set",
        "clip_score": "evaluate.clip is not set",
        "clip_temporal_consistency": "evaluate.clip is not set",
    }
    rows = rows_of(suite, MADE)
    found = suite.summary(rows, reference_of(suite, REAL))
    assert set(found) == {"flicker", "dynamic_degree", "motion_smoothness", "flow_degree", "fd_randconv"}
    assert found["flicker"] == pytest.approx(np.mean([row["flicker"] for row in rows]))
    expected = frechet_distance(randconv_features(MADE), randconv_features(REAL))
    assert found["fd_randconv"] == pytest.approx(expected, rel=1e-12)


def test_with_weights(suite: Suite) -> None:
    assert suite.names == ("randconv", "videomae", "dinov2_vit_w16_7")
    assert suite.absent == {"fvd_i3d": "evaluate.i3d is not set"}
    rows, reference = rows_of(suite, MADE), reference_of(suite, REAL)
    found = suite.summary(rows, reference)
    scores = {"clip_score", "clip_temporal_consistency", "flow_degree"}
    assert scores | {"fd_randconv", "fvd_videomae", "fid_dinov2_vit_w16_7"} < set(found)
    about = suite.distances(rows, reference)
    assert {name: (part.n, part.reference_n) for name, part in about.items()} == {
        "fd_randconv": (6, 7),
        "fvd_videomae": (6, 7),
        "fid_dinov2_vit_w16_7": (24, 28),  # four frames of each clip
    }
    assert len({part.sha256 for part in about.values()}) == 3
    assert suite.summary(rows, None).keys() == found.keys() - about.keys()
    assert {part.absent for part in suite.distances(rows, None).values()} == {"there are no reference clips"}


def test_pictures_have_no_motion(suite: Suite) -> None:
    rows = rows_of(suite, MADE[:, :1])
    assert set(rows[0]) == {"features", "clip_score"}
    found = suite.distances(rows, reference_of(suite, REAL[:, :1]) | {"videomae": np.zeros((7, 16))})
    assert found["fvd_videomae"].absent == "6 of 6 clips have fewer than 2 frames"
    assert found["fid_dinov2_vit_w16_7"].n == 6
    assert set(suite.summary(rows, None)) == {"clip_score"}


def test_a_distance_that_cannot_be_taken_says_why(suite: Suite) -> None:
    reference = reference_of(suite, REAL)
    rows = rows_of(suite, MADE)
    assert "got N 1" in suite.distances(rows[:1], reference)["fd_randconv"].absent
    rows[2]["features"]["randconv"][5] = float("nan")
    found = suite.distances(rows, reference)
    assert "not finite" in found["fd_randconv"].absent
    assert found["fvd_videomae"].value is not None
    assert "fd_randconv" not in suite.summary(rows, reference)


def test_weights_that_are_given_must_be_there(tmp_path: Path) -> None:
    for field in ("videomae", "i3d", "inception", "clip"):
        with pytest.raises(WeightsError, match="absent"):
            Suite.load(**{field: tmp_path / "absent"})
