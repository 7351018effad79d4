"""I3D: the published form of its state dict, TensorFlow's padding, and TorchScript refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from opensora.metrics.features import load_i3d, resize_crop
from opensora.metrics.i3d import I3D, pad_same
from opensora.weights import WeightsError

FRAMES = np.random.default_rng(0).integers(0, 256, (10, 30, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> I3D:
    """Untrained, with statistics of the normalisation that let signals through."""
    torch.manual_seed(0)
    model = I3D()
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.uniform_(-0.05, 0.05)
        elif name.endswith("running_var"):
            value.uniform_(0.1, 0.25)  # a convolution's first weights, then ReLU, leave a sixth of the square
    return model.eval()


@pytest.fixture(scope="module")
def weights(model: I3D, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("i3d") / "i3d_pretrained_400.pt"
    torch.save(model.state_dict(), path)
    return path


def test_the_published_form(model: I3D) -> None:
    """Names and sizes of `rgb_imagenet.pt`: 57 convolutions with normalisation, and the logits."""
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert sum(name.endswith(".conv3d.weight") for name in state) == 58
    assert sum(name.endswith(".bn.running_var") for name in state) == 57
    assert sum(value.numel() for value in model.parameters()) == 12_697_264
    for name, shape in {
        "Conv3d_1a_7x7.conv3d.weight": (64, 3, 7, 7, 7),
        "Conv3d_2c_3x3.bn.weight": (192,),
        "Mixed_3b.b1b.conv3d.weight": (128, 96, 3, 3, 3),
        "Mixed_4f.b2a.conv3d.weight": (32, 528, 1, 1, 1),
        "Mixed_5c.b3b.bn.running_mean": (128,),
        "logits.conv3d.weight": (400, 1024, 1, 1, 1),
        "logits.conv3d.bias": (400,),
    }.items():
        assert state[name] == shape


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "before", "after"),
    [(8, 3, 2, 0, 1), (7, 3, 2, 1, 1), (8, 3, 1, 1, 1), (8, 7, 2, 2, 3), (5, 1, 1, 0, 0), (2, 2, 2, 0, 0)],
)
def test_padding_is_tensorflows(size: int, kernel: int, stride: int, before: int, after: int) -> None:
    x = torch.ones(1, 1, size, size, size)
    padded = pad_same(x, (kernel,) * 3, (stride,) * 3)
    torch.testing.assert_close(padded, F.pad(x, (before, after) * 3))
    assert (padded.shape[2] - kernel) // stride + 1 == -(-size // stride)


def test_features_are_the_logits_of_frames_as_it_was_trained(model: I3D, weights: Path) -> None:
    extractor = load_i3d(weights)
    found = extractor(FRAMES)
    assert found.shape == (1, extractor.width)
    assert (extractor.name, extractor.metric) == ("i3d", "fvd_i3d")
    seen = resize_crop(torch.from_numpy(FRAMES[np.linspace(0, 9, 16).round().astype(int)]), 224) * 2 - 1
    with torch.inference_mode():
        expected = model(seen.transpose(0, 1)[None])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - model.logits["conv3d"].bias.detach()).max() > 0.1  # the frames have a say


def test_what_is_no_state_dict_of_it_is_refused(weights: Path, tmp_path: Path) -> None:
    program = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(program)
    with (
        pytest.warns(UserWarning, match="TorchScript"),
        pytest.raises(WeightsError, match=r"nothing in it was run.*is a program"),
    ):
        load_i3d(program)
    state = torch.load(weights)
    del state["Mixed_4b.b0.bn.bias"]
    state["logits.conv3d.bias"] = torch.zeros(600)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"missing Mixed_4b\.b0\.bn\.bias; logits\.conv3d\.bias is \[600\]"):
        load_i3d(tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="no weights file"):
        load_i3d(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match=r"takes \[B, 3, T ≥ 9, 224, 224\], got \[1, 3, 8, 224, 224\]"):
        I3D()(torch.zeros(1, 3, 8, 224, 224))
