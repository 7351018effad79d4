"""Memory of a training step is foretold within a tenth of what is alive in a real one, part by part."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from opensora.config import Config, load_config
from opensora.diffusion.rectified_flow import RectifiedFlow
from opensora.models.stdit import STDiT
from opensora.training.checkpoint import stdit_config
from opensora.training.ema import Ema
from opensora.training.train import build_optimizer
from opensora.training_memory import Counts, stage_model, state_bytes, training_memory
from tests.conftest import ROOT
from tests.live_bytes import LiveBytes

MODEL = ("model.hidden_size=96", "model.num_heads=4", "model.depth=2", "train_video.frames=8", "demo.build_models=true")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small here, and threads that wait for each other on a busy machine cost five times their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(*overrides: str) -> Config:
    sizes = ("encode.sizes=[[32,32],[64,64]]", "train_video.height=64", "train_video.width=64")
    return load_config(ROOT / "params.yaml", "smoke", (*MODEL, *sizes, *overrides))


def nbytes(tensors: object) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor.ndim)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("batch", [1, 4])  # where gradients, and where activations are most of the peak
def test_a_real_step_takes_what_was_foretold(dtype: str, recompute: str, batch: int) -> None:
    values = config(
        f"train_video.dtype={dtype}",
        f"train_video.activation_checkpointing={recompute}",
        f"train_video.batch_size={batch}",
    )
    train = values.train_video
    foretold = training_memory(values, train, train)
    x0 = torch.randn(batch, *stage_latents(values))
    text, mask = torch.randn(batch, 1, 8, 64), torch.ones(batch, 8)
    with LiveBytes() as live:
        model = STDiT(stdit_config(values, "train_video", 4)).train()
        if recompute == "full":
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        optimizer, ema, objective = build_optimizer(model, train), Ema(model, 0.9), RectifiedFlow()
        for step in range(2):
            live.peak = live.now
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                times = torch.full((batch,), 0.5)
                loss = objective.training_losses(model, x0, times, torch.randn_like(x0), text, mask)["loss"].mean()
            loss.backward()
            gradients = nbytes(value.grad for value in model.parameters())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(step)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert foretold.parts["weights"] == nbytes(model.parameters())
    assert foretold.parts["gradients"] == gradients
    assert foretold.parts["optimizer"] == nbytes(moments)
    assert foretold.parts["averages (EMA)"] == nbytes(ema.state_dict().values())
    assert foretold.peak == pytest.approx(live.peak, rel=0.1)


def stage_latents(values: Config) -> tuple[int, ...]:
    return (values.model.in_channels, *stage_model(values, values.train_video).input_size)


@pytest.mark.parametrize(
    ("strategy", "whole", "shared"),  # bytes a parameter in bfloat16: on every GPU, and shared out over all
    [("zero1", 4, 12), ("zero2", 2, 14), ("gemini", 0, 16)],
)
def test_shards_are_those_of_the_zero_paper(strategy: str, whole: int, shared: int) -> None:
    """Arxiv 1910.02054, figure 1; the averages are 4 bytes more, shared out as well."""
    overrides = (f"train_video.strategy={strategy}", "train_video.engine=colossalai", "train_video.processes=8")
    train = load_config(ROOT / "params.yaml", "h800", overrides).train_video
    states = state_bytes(train, Counts(all=1000, trainable=1000, block=10))
    assert sum(states.values()) == 1000 * (whole + (shared + 4) / 8)


def test_what_is_frozen_needs_no_gradient_and_no_moments() -> None:
    whole, temporal = (config(f"train_video.trainable={kind}") for kind in ("all", "temporal"))
    parts, fewer = (
        training_memory(values, values.train_video, values.train_video).parts for values in (whole, temporal)
    )
    learning = sum(
        value.numel()
        for name, value in STDiT(stdit_config(temporal, "train_video", 4)).named_parameters()
        if "attn_temp" in name
    )
    assert fewer["gradients"] == 4 * learning
    assert fewer["optimizer"] == 8 * learning
    assert fewer["weights"] == parts["weights"]
    assert fewer["activations"] < parts["activations"]


def test_clips_bring_their_encoders(vae: Path, text_encoder: Path) -> None:
    """Their own where weights_dir has them, else the released ones."""
    values = load_config(ROOT / "params.yaml", "single_gpu", ("train_video.data=clips", "weights_dir=/nowhere"))
    parts = training_memory(values, values.train_video, values.train_video).parts
    assert parts["VAE, text encoder"] == 2 * (83_653_863 + 4_762_310_656)
    beside = (
        "demo.build_models=true",
        f"weights_dir={text_encoder.parent}",
        f"encode.text_encoder={text_encoder.name}",
    )
    tiny = config("train_video.data=clips", *beside)
    parts = training_memory(tiny, tiny.train_video, tiny.train_video).parts
    assert parts["VAE, text encoder"] < 2**30
