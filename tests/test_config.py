"""params.yaml: every profile resolves, and every mistake is named."""

from pathlib import Path

import pytest
import yaml

from opensora.config import PROFILES, ConfigError, load_config, parse_override

PARAMS = Path(__file__).resolve().parents[1] / "params.yaml"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_resolves(profile: str) -> None:
    assert load_config(PARAMS, profile).profile == profile


def test_h800_holds_the_published_recipe() -> None:
    config = load_config(PARAMS, "h800")
    video, high = config.train_video, config.train_highres
    assert (video.frames, video.height, video.frame_interval) == (16, 256, 3)
    assert (video.batch_size, video.processes, video.lr, video.dtype) == (8, 64, 2e-5, "bfloat16")
    assert (video.strategy, video.activation_checkpointing, video.space_scale) == ("zero2", "full", 0.5)
    assert video.steps == 80_000 + 24_000
    assert (high.frames, high.height, high.frame_interval, high.sequence_parallel) == (64, 512, 2, 2)
    assert high.time_scale == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_vidoe.lr=1", "did you mean 'train_video'"),
        ("train_video.lrr=1", "did you mean 'lr'"),
        ("train_video.lr=fast", r"train_video\.lr"),
        ("train_video.lr=-1", "greater than 0"),
        ("train_video.height=48", "encode.sizes"),
        ("train_image.frames=4", "train_image.frames must be 1"),
        ("encode.max_tokens=9", "must be equal"),
        ("train_video.objective=iddpm", "pred_sigma"),
        ("train_video.processes=12", "fills no whole number of nodes of hardware.gpus_per_node 8 GPUs; take 8 or 16"),
        ("lr", "section.key=value"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(PARAMS, "demo", (override,))


@pytest.mark.parametrize("processes", [3, 8, 64])
def test_less_than_a_node_or_whole_nodes_are_fine(processes: int) -> None:
    assert load_config(PARAMS, "demo", (f"train_video.processes={processes}",)).train_video.processes == processes


def test_missing_file_and_unknown_profile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no parameter file"):
        load_config(tmp_path / "params.yaml")
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_config(PARAMS, "dmeo")


def test_overrides_are_yaml() -> None:
    assert parse_override("train_video.lr=2e-5") == {"train_video": {"lr": 2e-5}}
    assert parse_override("evaluate.prompts=[a, b]") == {"evaluate": {"prompts": ["a", "b"]}}


def test_a_config_cannot_be_changed() -> None:
    config = load_config(PARAMS, "smoke")
    with pytest.raises(ValueError, match="frozen"):
        config.train_video.lr = 1.0  # type: ignore[misc]


def test_params_hold_every_step_for_every_profile() -> None:
    document = yaml.safe_load(PARAMS.read_text())
    for profile in PROFILES:
        assert set(document[profile]) >= set(document["base"]) - {"weights_dir", "offline", "executor", "hardware"}
