"""Scores: what each measures, and thresholds that change without decoding again."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from opensora.config import ExecutorConfig, ScoreConfig
from opensora.data import score
from opensora.data.score import add_duplicate_distance, apply_thresholds, measure, perceptual_hash
from opensora.manifest import Clip, kept_clips, read_manifest
from opensora.step import StepError

EXECUTOR = ExecutorConfig(kind="sequential")
RNG = np.random.default_rng(0)
NOISE = np.kron(RNG.integers(0, 255, (16, 16, 3)), np.ones((4, 4, 1))).astype(np.uint8)  # blocks of four pixels


def moving(pixels: int) -> np.ndarray:
    return np.stack([np.roll(NOISE, pixels * index, axis=1) for index in range(8)])


def test_scores_measure_what_they_say() -> None:
    still, slow, black = measure(moving(0), 8), measure(moving(1), 8), measure(np.zeros((8, 64, 64, 3), np.uint8), 8)
    assert still["duration_s"] == 1.0
    assert still["short_side"] == 64
    assert still["frame_difference"] == 0
    assert still["motion"] < 1e-3
    assert slow["motion"] > 0.01
    assert black["black"] == 1.0
    assert black["sharpness"] == 0 < still["sharpness"]


def test_the_first_missed_threshold_is_the_reason() -> None:
    clips = [
        Clip("a", "x", scores=measure(moving(1), 8), perceptual_hash="01"),
        Clip("b", "x", scores=measure(moving(0), 8), perceptual_hash="02"),
        Clip("c", "x", scores=measure(np.zeros((8, 64, 64, 3), np.uint8), 8), perceptual_hash="04"),
        Clip("d", "x", kept=False, reason="unreadable"),
    ]
    config = ScoreConfig(min_short_side=32)
    judged = apply_thresholds(add_duplicate_distance(clips), config)
    assert [clip.kept for clip in judged] == [True, False, False, False]
    assert [clip.reason.split(":")[0] for clip in judged] == ["", "static", "black", "unreadable"]
    none = ScoreConfig(min_duration_s=None, min_short_side=None, max_black=None, min_frame_difference=None)
    assert len(kept_clips(apply_thresholds(add_duplicate_distance(clips), none))) == 3


def test_duplicates_are_found_against_earlier_clips() -> None:
    first, scores = moving(1), measure(moving(1), 8)
    darker = (first.astype(int) * 9 // 10).astype(np.uint8)
    turned = np.stack([np.rot90(frame) for frame in first])
    hashes = [perceptual_hash(cv2.cvtColor(frames[4], cv2.COLOR_RGB2GRAY)) for frames in (first, darker, turned)]
    clips = [
        Clip(name, "x", scores=scores, perceptual_hash=f"{bits:016x}") for name, bits in zip("abc", hashes, strict=True)
    ]
    config = ScoreConfig(max_duplicate_distance=4)
    assert [clip.kept for clip in apply_thresholds(add_duplicate_distance(clips), config)] == [True, False, True]


def test_another_threshold_decodes_nothing_again(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ScoreConfig(min_short_side=32, max_duplicate_distance=None)
    score.run(config, clips / "split", tmp_path / "score", EXECUTOR)
    first = read_manifest(tmp_path / "score")
    monkeypatch.setattr(score, "score_shard", None)  # decoding again would fail
    strict = config.model_copy(update={"min_duration_s": 100.0})
    with pytest.raises(StepError, match="16 short"):
        score.run(strict, clips / "split", tmp_path / "score", EXECUTOR)
    loose = config.model_copy(update={"min_duration_s": 0.1})
    score.run(loose, clips / "split", tmp_path / "score", EXECUTOR)
    second = read_manifest(tmp_path / "score")
    assert [replace(clip) for clip in first] == second
