"""Memory of a training step is foretold within a tenth of what is alive in a real one, part by part."""

from pathlib import Path

import pytest
import torch

from opensora.config import Config, load_config
from opensora.models.stdit import STDiT
from opensora.training_memory import Counts, stage_model, state_bytes, training_memory
from tests.conftest import ROOT
from tests.live_bytes import LiveBytes
from tests.training_step import StepRun, nbytes

MODEL = ("model.hidden_size=96", "model.num_heads=4", "model.depth=2", "train_video.frames=8", "demo.build_models=true")

pytestmark = pytest.mark.usefixtures("one_thread")


def config(*overrides: str) -> Config:
    sizes = ("encode.sizes=[[32,32],[64,64]]", "train_video.height=64", "train_video.width=64")
    return load_config(ROOT / "params.yaml", "smoke", (*MODEL, *sizes, *overrides))


def moments(run: StepRun) -> list[torch.Tensor]:
    optimizer = run.engine._optimizer  # type: ignore[attr-defined]  # nothing else needs to look into it
    return [value for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("batch", [1, 4])  # where gradients, and where activations are most of the peak
def test_a_real_step_takes_what_was_foretold(dtype: str, recompute: str, batch: int) -> None:
    values = config(
        f"train_video.dtype={dtype}",
        f"train_video.activation_checkpointing={recompute}",
        f"train_video.batch_size={batch}",
    )
    foretold = training_memory(values, values.train_video, values.train_video)
    with LiveBytes() as live:
        run = StepRun(values, "train_video")
        run.step()
        live.peak = live.now
        run.step()
    run.close()
    assert foretold.parts["weights"] == nbytes(run.model.parameters())
    assert foretold.parts["gradients"] == run.gradient_bytes
    assert foretold.parts["optimizer"] == nbytes(moments(run))
    assert foretold.parts["averages (EMA)"] == nbytes(run.ema.shares().values())
    assert foretold.peak == pytest.approx(live.peak, rel=0.1)


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
        for name, value in STDiT(stage_model(temporal, temporal.train_video)).named_parameters()
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
