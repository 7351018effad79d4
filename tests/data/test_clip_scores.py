"""CLIP's scores: a tiny CLIP in the files of a large one, heads whose numbers are told by hand, errors with names."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora.data.clip_scores import ClipScorer, read_head
from opensora.weights import WeightsError
from tests.data.tiny_clip import FEATURES, build_clip, build_linear_head, build_mlp_head

RNG = np.random.default_rng(0)
FRAMES = [RNG.integers(0, 255, (3, 24, 40, 3), dtype=np.uint8), RNG.integers(0, 255, (3, 64, 30, 3), dtype=np.uint8)]
LONG = "a red square " * 100


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scorer(clip: Path) -> ClipScorer:
    return ClipScorer(clip)


def features(clip: Path, frames: np.ndarray, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each frame and of the text, each alone and through other doors of Transformers."""
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(clip)
    processor = CLIPProcessor.from_pretrained(clip, backend="pil")
    inputs = processor(text=[text], images=list(frames), return_tensors="pt")
    with torch.inference_mode():
        found = model(**inputs)
    return found.image_embeds, found.text_embeds  # of length 1 as they come


def test_text_match_is_the_mean_cosine(clip: Path, scorer: ClipScorer) -> None:
    texts = ["a red square", "a"]
    found = scorer.text_match(FRAMES, texts)
    for frames, text, value in zip(FRAMES, texts, found, strict=True):
        images, words = features(clip, frames, text)
        assert value == pytest.approx(float((images @ words.T).mean()), abs=1e-5)
    assert scorer.text_match(FRAMES[:1], texts[:1]) == pytest.approx(found[:1], abs=1e-5)
    assert scorer([], []) == []


def test_clips_without_text_get_no_text_match(scorer: ClipScorer) -> None:
    first, second = scorer(FRAMES, ["", "a square"])
    assert first == {}
    assert set(second) == {"text_match"}


def test_long_texts_are_cut_at_77_tokens(scorer: ClipScorer) -> None:
    longer = LONG + "and something else"
    assert scorer.text_match(FRAMES[:1], [LONG]) == scorer.text_match(FRAMES[:1], [longer])


def test_the_mlp_head_computes_what_its_numbers_say(clip: Path, tmp_path: Path) -> None:
    """Its layers pass the first feature on, times 2 · 3, plus 5."""
    scorer = ClipScorer(clip, build_mlp_head(tmp_path / "head.pth"))
    for frames, found in zip(FRAMES, scorer(FRAMES, ["", ""]), strict=True):
        images, _ = features(clip, frames, "a")
        assert found["aesthetic"] == pytest.approx(float(6 * images[:, 0].mean() + 5), abs=1e-4)
        assert set(found) == {"aesthetic"}


def test_the_linear_head_computes_what_its_numbers_say(clip: Path, tmp_path: Path) -> None:
    scorer = ClipScorer(clip, build_linear_head(tmp_path / "head.pth"))
    images, _ = features(clip, FRAMES[0], "a")
    expected = float((images[:, 0] - 2 * images[:, 1]).mean() + 4)
    found = scorer(FRAMES[:1], ["a red square"])[0]
    assert found["aesthetic"] == pytest.approx(expected, abs=1e-4)
    assert set(found) == {"aesthetic", "text_match"}


def test_bfloat16_is_near(clip: Path, scorer: ClipScorer) -> None:
    rough = ClipScorer(clip, dtype=torch.bfloat16).text_match(FRAMES, ["a red square", "a"])
    assert rough == pytest.approx(scorer.text_match(FRAMES, ["a red square", "a"]), abs=0.03)


def test_errors_name_what_does_not_fit(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be loaded"):
        ClipScorer(tmp_path)
    half = tmp_path / "half"
    shutil.copytree(clip, half)
    state = load_file(half / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, half / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"do not fit .*missing visual_projection\.weight"):
        ClipScorer(half)
    head = build_mlp_head(tmp_path / "head.pth", width=FEATURES + 1)
    with pytest.raises(WeightsError, match=rf"layers\.0\.weight is \[1024, {FEATURES + 1}\], expected"):
        ClipScorer(clip, head)
    layers = torch.load(head)
    del layers["layers.6.bias"]
    torch.save(layers, head)
    with pytest.raises(WeightsError, match=r"head\.pth is no aesthetic head .*missing layers\.6\.bias"):
        read_head(head, FEATURES + 1)
    torch.save({"weight": torch.zeros(1, FEATURES), "bias": print}, head)
    with pytest.raises(WeightsError, match="nothing in it was run"):
        read_head(head, FEATURES)
