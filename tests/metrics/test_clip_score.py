"""CLIP score and temporal consistency against Transformers called directly."""

from pathlib import Path

import numpy as np
import pytest
import torch

from opensora.metrics import clip_score
from opensora.metrics.clip_score import ClipScore
from tests.data.tiny_clip import build_clip

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 24, 40, 3), dtype=np.uint8)
PROMPT = "a red square"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def score(folder: Path) -> ClipScore:
    return ClipScore(folder)


def direct(folder: Path, frames: np.ndarray, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of frames and text, of length 1, as the whole model gives them."""
    from transformers import CLIPModel, CLIPProcessor

    processor = CLIPProcessor.from_pretrained(folder, backend="pil")
    with torch.inference_mode():
        found = CLIPModel.from_pretrained(folder)(**processor(text=[text], images=list(frames), return_tensors="pt"))
    return found.image_embeds, found.text_embeds[0]


def test_parity(folder: Path, score: ClipScore, monkeypatch: pytest.MonkeyPatch) -> None:
    images, text = direct(folder, FRAMES, PROMPT)
    cosines = images @ text
    assert (cosines > 0).any()
    expected = {
        "clip_score": float(100 * cosines.clamp(min=0).mean()),
        "clip_temporal_consistency": float(torch.nn.functional.cosine_similarity(images[1:], images[:-1]).mean()),
    }
    assert score(FRAMES, PROMPT) == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(clip_score, "BATCH", 2)
    assert score(FRAMES, PROMPT) == pytest.approx(expected, abs=1e-4)


def test_frames_against_the_prompt_count_as_nothing(folder: Path, score: ClipScore) -> None:
    """A frame of a negative cosine weighs 0, not less."""
    candidates = np.random.default_rng(1).integers(0, 256, (40, 24, 24, 3), dtype=np.uint8)
    texts = ("a", "red", "square", "zebra", "of q", "a x")
    for text in texts:
        images, words = direct(folder, candidates, text)
        cosines = images @ words
        if (cosines < 0).any() and (cosines > 0).any():
            break
    else:
        pytest.fail("no text with cosines of both signs")
    chosen = [int(cosines.argmin()), int(cosines.argmax())]
    expected = 100 * float(cosines.max()) / 2
    assert score(candidates[chosen], text)["clip_score"] == pytest.approx(expected, abs=1e-4)


def test_what_cannot_be_told_is_absent(score: ClipScore) -> None:
    assert set(score(FRAMES[:1], PROMPT)) == {"clip_score"}
    assert set(score(FRAMES, "")) == {"clip_temporal_consistency"}
    frozen = np.repeat(FRAMES[:1], 4, axis=0)
    assert score(frozen, PROMPT)["clip_temporal_consistency"] == pytest.approx(1, abs=1e-6)
