"""The tiny VAE and text encoder train, load and repeat."""

from pathlib import Path

import numpy as np
import pytest
import torch

from opensora.demo.autoencoder import train_vae
from opensora.demo.shapes import all_scenes, render_clip
from opensora.demo.text_encoder import build_text_encoder


def test_vae_learns_repeats_and_has_unit_latents(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    rng = np.random.default_rng(0)
    clips = np.concatenate([render_clip(scene, 2, 64, rng) for scene in all_scenes()[::6]])
    frames = torch.from_numpy(clips).permute(0, 3, 1, 2).contiguous()
    losses: list[float] = []
    vae = train_vae(frames, steps=40, seed=0, progress=lambda step, loss: losses.append(loss))
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    again: list[float] = []
    train_vae(frames, steps=3, seed=0, progress=lambda step, loss: again.append(loss))
    assert again[0] == losses[0]
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        latents = loaded.encode(frames.float() / 127.5 - 1).latent_dist.mean * loaded.config.scaling_factor
    assert latents.shape[1:] == (4, 16, 16)
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_vae_refuses_other_frames() -> None:
    with pytest.raises(ValueError, match="uint8"):
        train_vae(torch.zeros(2, 3, 64, 64), steps=1, seed=0)


def test_text_encoder_loads_as_a_real_one(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    words = sorted({word for scene in all_scenes() for word in scene.caption.split()})
    build_text_encoder(tmp_path / "one", words, seed=0)
    build_text_encoder(tmp_path / "two", reversed(words), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    batch = tokenizer(
        ["a red circle moving left", "A purple circle"], padding="max_length", max_length=8, return_tensors="pt"
    )
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(1).tolist() == [6, 4]
    assert tokenizer.unk_token_id in batch["input_ids"][1]
    assert tokenizer.unk_token_id not in batch["input_ids"][0]
    outputs = []
    for name in ("one", "two"):
        model = T5EncoderModel.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            outputs.append(model(**batch).last_hidden_state)
    assert outputs[0].shape == (2, 8, 64)
    assert torch.equal(outputs[0], outputs[1])
