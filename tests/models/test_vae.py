"""The frame VAE: shapes, scaling, and independence of frames and micro-batches."""

from pathlib import Path

import numpy as np
import torch

from opensora.models.vae import FrameVAE


def test_encode_and_decode_work_frame_by_frame(vae: Path) -> None:
    model = FrameVAE(vae)
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    mean, deviation = model.encode(frames, micro_batch=2)
    assert model.scale == 4
    assert mean.shape == deviation.shape == (5, 4, 8, 12)
    assert (deviation > 0).all()
    alone, _ = model.encode(frames[3:4])
    torch.testing.assert_close(alone[0], mean[3], atol=1e-5, rtol=1e-4)

    video = model.decode(mean.transpose(0, 1)[None], micro_batch=3)
    assert video.shape == (1, 5, 32, 48, 3)
    assert video.dtype == np.uint8
    one = model.decode(mean[3:4].transpose(0, 1)[None])
    assert np.abs(one[0, 0].astype(int) - video[0, 3]).max() <= 1


def test_the_scaling_factor_is_applied_both_ways(vae: Path) -> None:
    model = FrameVAE(vae)
    frames = np.full((1, 32, 32, 3), 90, np.uint8)
    mean, _ = model.encode(frames)
    before = model.decode(mean.transpose(0, 1)[None])
    model.factor *= 3
    scaled, _ = model.encode(frames)
    torch.testing.assert_close(scaled, 3 * mean, atol=1e-5, rtol=1e-4)
    assert np.abs(model.decode(scaled.transpose(0, 1)[None]).astype(int) - before).max() <= 1
