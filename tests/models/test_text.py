"""The text encoder: padding is empty, texts do not disturb each other, long texts are cut."""

from pathlib import Path

import torch

from opensora.models.text import TextEncoder


def test_embeddings_and_masks(text_encoder: Path) -> None:
    encoder = TextEncoder(text_encoder)
    both, mask = encoder.encode(["a red circle moving left", "a square"], 8)
    assert both.shape == (2, 8, 64)
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert (both[mask == 0] == 0).all()
    alone, _ = encoder.encode(["a square"], 8)
    torch.testing.assert_close(alone[0], both[1], atol=1e-5, rtol=1e-4)
    cut, mask = encoder.encode(["a red circle moving left"], 3)
    assert cut.shape == (1, 3, 64)
    assert mask.tolist() == [[1, 1, 1]]


def test_directions_differ(text_encoder: Path) -> None:
    left, right = TextEncoder(text_encoder).encode(["moving left", "moving right"], 4)[0]
    assert (left - right).norm() > 0.1 * left.norm()
