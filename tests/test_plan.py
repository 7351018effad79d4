"""The plan of a stage: work, time and money follow from its settings, and what cannot fit is refused with a way out."""

import re
from pathlib import Path

import pytest
import torch

from opensora.config import Config, ConfigError, load_config
from opensora.gpus import GIB, known_gpu
from opensora.plan import VAE_FLOPS_PER_PIXEL, check_fits, largest, plan_stage, sample_flops, worst_peak
from opensora.training_memory import T5_PARAMETERS, VAE_PARAMETERS
from tests.conftest import ROOT

H800 = known_gpu("h800")


def config(profile: str = "h800", *overrides: str) -> Config:
    return load_config(ROOT / "params.yaml", profile, overrides)


def test_the_published_recipe_costs_what_was_published() -> None:
    """At the share of the peak that its own throughput was: 7.00 samples/s a GPU, nothing recomputed."""
    share = 7.00 * 3 * 5.71 / 989
    settings = (f"hardware.utilization={share}", "train_video.activation_checkpointing=none")
    made = plan_stage(config("h800", *settings), "train_video", H800)
    assert made.step_seconds == pytest.approx(8 / 7.00, rel=0.01)
    assert made.samples_per_step * made.steps == 104_000 * 64 * 8
    assert made.gpu_hours == pytest.approx(104_000 * 64 * 8 / 7.00 / 3600, rel=0.01)
    assert made.published_gpu_hours == 2808
    assert made.dollars == pytest.approx(made.gpu_hours * 2.1)
    assert made.days == pytest.approx(made.gpu_hours / 64 / 24)
    assert made.fits


def test_encoding_in_the_step_is_a_fifth_of_its_work() -> None:
    """16 to 24 % at the published settings."""
    for name, least, most in (("train_video", 0.2, 0.26), ("train_highres", 0.14, 0.24)):
        off = (f"{name}.activation_checkpointing=none", f"{name}.sequence_parallel=1")
        latents, clips = (config("h800", *off, f"{name}.data={data}") for data in ("latents", "clips"))
        stages = [getattr(values, name) for values in (latents, clips)]
        without, whole = (
            sample_flops(values, stage, stage) for values, stage in zip((latents, clips), stages, strict=True)
        )
        assert least < (whole - without) / whole < most


def test_the_encoders_are_counted_as_pytorch_counts_them() -> None:
    from diffusers import AutoencoderKL
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import T5Config, T5EncoderModel

    shape = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    xxl = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    with torch.device("meta"):
        vae = AutoencoderKL(**shape, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
        text = T5EncoderModel(T5Config(**xxl, feed_forward_proj="gated-gelu"))
    assert sum(value.numel() for value in vae.parameters()) == VAE_PARAMETERS
    assert sum(value.numel() for value in text.parameters()) == T5_PARAMETERS
    for side in (256, 512):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            vae.encode(torch.empty(1, 3, side, side, device="meta"))
        assert counter.get_total_flops() == pytest.approx(VAE_FLOPS_PER_PIXEL * side**2, rel=0.03)


def test_the_largest_batch_is_the_last_that_fits() -> None:
    values = config("single_gpu", "train_video.activation_checkpointing=none")
    train, usable = values.train_video, H800.usable
    batch = largest(values, train, train, "batch_size", usable)
    peaks = [worst_peak(values, train.model_copy(update={"batch_size": size})) for size in (batch, batch + 1)]
    assert peaks[0] <= usable < peaks[1]
    assert largest(values, train, train, "batch_size", 1 * GIB) == 0


def test_buckets_and_images_are_planned_for_the_largest() -> None:
    bucket = "train_video.buckets=[{frames: 32, height: 512, width: 512, batch_size: 4}]"
    plain, joint = (plan_stage(config("h800", *more), "train_video", H800) for more in ((), (bucket,)))
    assert plain.shape == (16, 256, 256)
    assert joint.shape == (32, 512, 512)
    assert joint.memory.peak > plain.memory.peak
    mixed = plan_stage(config("h800", "train_video.image_share=0.25"), "train_video", H800)
    assert mixed.step_flops == pytest.approx(plain.step_flops * (0.75 + 0.25 / 16), rel=0.05)


def test_what_does_not_fit_is_refused_and_what_is_advised_fits() -> None:
    """Every --set of the message, put together, is accepted."""
    wanted = (
        "train_video.batch_size=64",
        "train_video.activation_checkpointing=none",
        "train_video.frames=64",
        "hardware.gpu=rtx4090",
    )
    values = config("single_gpu", *wanted)
    with pytest.raises(ConfigError) as error:
        check_fits(values, "train_video")
    text = str(error.value)
    assert "train_video of 64 x 64x256x256" in text
    assert "activations" in text
    advice = re.findall(r"--set (\S+)", text)
    assert any(change.startswith("train_video.accumulate=") for change in advice)
    check_fits(config("single_gpu", *wanted, *advice), "train_video")
    with pytest.raises(ConfigError):
        check_fits(config("single_gpu", *wanted, *advice[:-2]), "train_video")


def test_one_minute_of_1080p_is_told_what_fits() -> None:
    """At 24 frames a second it does not fit eight 80-GB GPUs; the message says how many frames do, and they do."""
    wanted = (
        "train_highres.height=1080",
        "train_highres.width=1920",
        "train_highres.sequence_parallel=8",
        "train_highres.processes=8",
        "encode.sizes=[[256, 256], [1080, 1920]]",
    )
    with pytest.raises(ConfigError) as error:
        check_fits(config("h800", *wanted, "train_highres.frames=1440"), "train_highres")
    found = re.search(r"the longest sample that fits has (\d+) frames, with (.*)", str(error.value))
    assert found
    advice = re.findall(r"--set (\S+)", found[2])
    frames = int(found[1])
    check_fits(config("h800", *wanted, *advice, f"train_highres.frames={frames}"), "train_highres")
    with pytest.raises(ConfigError):
        check_fits(config("h800", *wanted, *advice, f"train_highres.frames={frames + 8}"), "train_highres")


def test_nothing_is_checked_without_a_known_gpu() -> None:
    huge = ("train_video.batch_size=4096", "train_video.activation_checkpointing=none")
    check_fits(config("single_gpu", *huge), "train_video")
    check_fits(config("h800", *huge), "train_video", torch.device("cpu"))
    with pytest.raises(ConfigError):
        check_fits(config("h800", *huge), "train_video")
    assert plan_stage(config("demo"), "train_video", None).gpu_hours is None


def test_training_refuses_before_it_starts(tmp_path: Path) -> None:
    from opensora.training.stages import Source, run

    encoded = tmp_path / "encode"
    encoded.mkdir()
    (encoded / "report.json").write_text('{"step": "encode"}')
    (encoded / "fingerprint.json").write_text('"made here"')
    values = config("smoke", "hardware.gpu=l40s", "train_video.batch_size=1000000", "train_video.processes=2")
    with pytest.raises(ConfigError, match="one l40s has"):
        run(values, "train_video", Source(encoded), None, tmp_path / "train_video", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["encode"]
