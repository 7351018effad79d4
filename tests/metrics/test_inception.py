"""Inception: the published form of its state dict, the quirks of FID's network, and frames as pytorch-fid sees them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from opensora.metrics.features import load_inception
from opensora.metrics.inception import Inception, average
from opensora.metrics.suite import Suite
from opensora.weights import WeightsError

FRAMES = np.random.default_rng(0).integers(0, 256, (7, 30, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> Inception:
    """Untrained, with statistics of the normalisation that let signals through."""
    torch.manual_seed(0)
    model = Inception()
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.uniform_(-0.05, 0.05)
        elif name.endswith("running_var"):
            value.uniform_(0.1, 0.25)  # a convolution's first weights, then ReLU, leave a sixth of the square
    return model.eval()


def test_the_published_form(model: Inception) -> None:
    """Names and sizes of `pt_inception-2015-12-05-6726825d.pth`, 94 convolutions and 1008 classes."""
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert sum(name.endswith(".conv.weight") for name in state) == 94
    assert sum(value.numel() for value in model.parameters()) == 23_834_568 + 8 * 2049  # 1000 classes, and 8 more
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_7a.branch7x7x3_4.bn.running_var": (192,),
        "Mixed_7c.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "fc.weight": (1008, 2048),
    }.items():
        assert state[name] == shape


def test_average_pooling_leaves_the_padding_out() -> None:
    ones = torch.ones(1, 1, 4, 4)
    torch.testing.assert_close(average(ones), ones)


def test_the_last_block_pools_by_maxima(model: Inception) -> None:
    x = torch.rand(1, 2048, 8, 8)
    with torch.inference_mode():
        pooled = torch.nn.functional.max_pool2d(x, 3, 1, 1)
        torch.testing.assert_close(model.Mixed_7c(x)[:, -192:], model.Mixed_7c.branch_pool(pooled))
        x = torch.rand(1, 1280, 8, 8)
        torch.testing.assert_close(model.Mixed_7b(x)[:, -192:], model.Mixed_7b.branch_pool(average(x)))


def test_features_of_four_frames(model: Inception, tmp_path: Path) -> None:
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({name: value for name, value in model.state_dict().items() if "num_batches" not in name}, path)
    extractor = load_inception(path)
    found = extractor(FRAMES)
    x = torch.from_numpy(FRAMES[[0, 2, 4, 6]]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        expected = model(2 * torch.nn.functional.interpolate(x, (299, 299), mode="bilinear") - 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (4, extractor.width)
    assert found.std(axis=0).max() > 1e-3  # frames differ
    suite = Suite.load(inception=path, device="cpu")
    assert suite.names == ("randconv", "inception")
    assert "fid_inception" in suite.distances([], None)
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(WeightsError, match=r"missing Conv2d_1a_3x3.*fc\.weight is \[1000, 2048\]"):
        load_inception(path)
    with pytest.raises(ValueError, match=r"takes \[B, 3, 299, 299\], got \[1, 3, 30, 40\]"):
        model(torch.zeros(1, 3, 30, 40))
