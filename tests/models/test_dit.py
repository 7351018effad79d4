"""DiT: the names of the released models, any size, and what its attention sees."""

import json

import pytest
import torch

from opensora.models.dit import DiT
from opensora.models.stdit import STDiTConfig
from tests.shared import shared

SMALL = STDiTConfig(input_size=(4, 8, 8), hidden_size=32, depth=2, num_heads=4, caption_channels=16, model_max_length=6)


@pytest.mark.parametrize(
    ("table", "classes"),
    [
        ("DiT-XL/2 16x256x256 text(clip 512)", 0),
        ("DiT-XL/2 16x256x256 label_1000", 1000),
        ("Latte-XL/2 16x256x256 label_101", 101),
    ],
)
def test_names_and_shapes_of_the_full_models(table: str, classes: int) -> None:
    expected = json.loads(shared("fixtures/param_tables.json").read_text())[table]
    config = STDiTConfig(input_size=(16, 32, 32), caption_channels=512, model_max_length=1)
    with torch.device("meta"):
        model = DiT(config, classes)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == expected["parameters"] | expected["buffers"]
    assert sum(value.numel() for value in model.parameters()) == expected["n_params"]


def small(classes: int = 0) -> DiT:
    torch.manual_seed(0)
    model = DiT(SMALL, classes).eval()
    for parameter in model.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("size", [(1, 8, 8), (4, 8, 8), (7, 4, 12), (3, 5, 7)])
def test_any_size_of_video(size: tuple[int, int, int]) -> None:
    out = small()(torch.randn(2, 4, *size), torch.tensor([1.0, 500.0]), torch.randn(2, 1, 6, 16))
    assert out.shape == (2, 8, *size)
    assert out.isfinite().all()


def test_every_token_sees_every_other() -> None:
    model = small()
    x = torch.randn(1, 4, 3, 8, 8, requires_grad=True)
    out = model(x, torch.tensor([10.0]), torch.randn(1, 1, 6, 16))
    (gradient,) = torch.autograd.grad(out[0, 0, 0, 0, 0], x)
    assert (gradient.abs().sum((0, 1)) > 0).all()


def test_text_is_pooled_over_its_tokens() -> None:
    model = small()
    x, t, y = torch.randn(2, 4, 1, 4, 4), torch.tensor([5.0, 6.0]), torch.randn(2, 1, 6, 16)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    out = model(x, t, y, mask)
    changed = y.clone()
    changed[0, 0, 2:] = 9.0
    torch.testing.assert_close(model(x, t, changed, mask), out)
    assert not torch.allclose(model(x, t, changed), model(x, t, y))


def test_classes() -> None:
    model = small(classes=3)
    x, t = torch.randn(2, 4, 1, 4, 4), torch.tensor([5.0, 6.0])
    first, second = (model(x, t, torch.tensor(labels)) for labels in ([0, 1], [0, 3]))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    with pytest.raises(ValueError, match=r"classes \[2\], got \[2, 1\]"):
        model(x, t, torch.zeros(2, 1))


def test_captions_are_dropped_in_training_only() -> None:
    model = DiT(STDiTConfig(**{**SMALL.__dict__, "class_dropout_prob": 1.0})).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    for block in model.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[1].weight)
    x, t, y = torch.randn(2, 4, 1, 4, 4), torch.tensor([5.0, 6.0]), torch.randn(2, 1, 6, 16)
    assert not torch.equal(model(x, t, y), model(x, t, -y))
    model.train()
    assert torch.equal(model(x, t, y), model(x, t, -y))


def test_a_new_model_predicts_zero() -> None:
    out = DiT(SMALL)(torch.randn(1, 4, 2, 4, 4), torch.tensor([5.0]), torch.randn(1, 1, 6, 16))
    assert out.abs().max() == 0


@pytest.mark.parametrize(
    ("x", "y", "message"), [((2, 3, 1, 4, 4), (2, 1, 6, 16), "x must be"), ((2, 4, 1, 4, 4), (2, 6, 16), "y must be")]
)
def test_bad_shapes_are_named(x: tuple[int, ...], y: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(x), torch.zeros(2), torch.zeros(y))
