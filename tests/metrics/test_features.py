"""Extractors against the same networks called directly, and files that are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from opensora.metrics.features import (
    EXTRACTOR,
    encoder_name,
    evenly,
    load_image_encoder,
    load_randconv,
    load_videomae,
    randconv_features,
    resize_crop,
)
from opensora.weights import WeightsError
from tests.data.tiny_clip import FEATURES, build_clip
from tests.metrics.tiny_models import MEAN, STD, WIDTH, build_dino, build_videomae

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (7, 20, 30, 3), dtype=np.uint8)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def videomae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_videomae(tmp_path_factory.mktemp("videomae"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_dino(tmp_path_factory.mktemp("dino"))


def by_hand(frames: np.ndarray, size: int) -> torch.Tensor:
    """[T, 3, size, size], resized, cropped and normalised without Transformers."""
    scaled = (size * frames.shape[2] // frames.shape[1], size)
    left = (scaled[0] - size) // 2
    rows = [np.asarray(Image.fromarray(frame).resize(scaled, Image.Resampling.BICUBIC)) for frame in frames]
    x = np.stack(rows)[:, :, left : left + size] / 255
    return torch.from_numpy((x - MEAN) / STD).float().permute(0, 3, 1, 2)


def test_random_features_are_the_same_everywhere_and_see_differences() -> None:
    x = RNG.integers(0, 255, (2, 4, 16, 16, 3), dtype=np.uint8)
    features = randconv_features(x)
    assert features.shape == (2, 64)
    assert features.dtype == np.float64
    np.testing.assert_array_equal(features, randconv_features(x))
    assert np.abs(features[0] - features[1]).max() > 1e-3
    extractor = load_randconv()
    np.testing.assert_array_equal(extractor(x[1]), features[1:])
    assert (extractor.name, extractor.metric, extractor.width) == (EXTRACTOR, "fd_randconv", 64)


def test_videomae_is_the_mean_of_its_tokens(videomae: Path) -> None:
    from transformers import VideoMAEModel

    extractor = load_videomae(videomae)
    model = VideoMAEModel.from_pretrained(videomae).eval()
    with torch.inference_mode():
        expected = model(by_hand(FRAMES[[0, 2, 4, 6]], 16)[None]).last_hidden_state.mean(1)
    found = extractor(FRAMES)
    assert found.shape == (1, WIDTH)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (extractor.name, extractor.metric, extractor.width) == ("videomae", "fvd_videomae", WIDTH)
    short = extractor(FRAMES[:2])  # each of two frames is seen twice
    np.testing.assert_allclose(short, extractor(FRAMES[[0, 0, 1, 1]]), atol=1e-6)


def test_dino_is_its_class_token_of_four_frames(dino: Path) -> None:
    from transformers import Dinov2Model

    extractor = load_image_encoder(dino)
    model = Dinov2Model.from_pretrained(dino).eval()
    with torch.inference_mode():
        expected = model(by_hand(FRAMES[[0, 2, 4, 6]], 14)).pooler_output
    np.testing.assert_allclose(extractor(FRAMES), expected, atol=1e-5)
    assert (extractor.name, extractor.metric, extractor.width) == ("dinov2_vit_w16_7", "fid_dinov2_vit_w16_7", WIDTH)
    assert extractor(FRAMES[:1]).shape == (1, WIDTH)


def test_clip_is_its_projection(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, CLIPModel

    extractor = load_image_encoder(build_clip(tmp_path))
    model = CLIPModel.from_pretrained(tmp_path).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    with torch.inference_mode():
        pixels = processor(images=list(FRAMES[:1]), return_tensors="pt").pixel_values
        expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    np.testing.assert_allclose(extractor(FRAMES[:1]), expected, atol=1e-5)
    assert (extractor.metric, extractor.width) == ("fid_clip_vit_w16_4", FEATURES)


def test_names_of_published_encoders() -> None:
    from transformers import CLIPConfig, Dinov2Config, SiglipConfig, ViTConfig

    clip = {"hidden_size": 768, "patch_size": 32}
    assert encoder_name(CLIPConfig(vision_config=clip)) == "clip_vit_b_32"
    assert encoder_name(Dinov2Config(hidden_size=1024, patch_size=14)) == "dinov2_vit_l_14"
    assert encoder_name(ViTConfig(hidden_size=384, patch_size=8)) == "vit_s_8"
    assert encoder_name(SiglipConfig()) == "siglip_vit_b_16"


def test_other_weights_are_another_identity(dino: Path, tmp_path: Path) -> None:
    shutil.copytree(dino, tmp_path / "copy")
    before = load_image_encoder(dino)
    assert load_image_encoder(tmp_path / "copy").sha256 == before.sha256
    state = load_file(dino / "model.safetensors")
    state["layernorm.bias"] += 1e-3
    save_file(state, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    other = load_image_encoder(tmp_path / "copy")
    assert other.name == before.name
    assert other.sha256 != before.sha256


def test_resizing_equals_pillow_where_it_is_not_rounded() -> None:
    x = torch.from_numpy(FRAMES)
    expected = by_hand(FRAMES, 10) * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    np.testing.assert_allclose(resize_crop(x, 10), expected, atol=2 / 255)
    assert resize_crop(x.transpose(1, 2), 24).shape == (7, 3, 24, 24)
    assert float(resize_crop(torch.full((1, 9, 9, 3), 255, dtype=torch.uint8), 5).min()) == pytest.approx(1)


def test_frames_are_chosen_evenly() -> None:
    assert evenly(16, 4).tolist() == [0, 5, 10, 15]
    assert evenly(2, 4).tolist() == [0, 0, 1, 1]
    assert evenly(1, 3).tolist() == [0, 0, 0]


def test_files_that_do_not_fit_are_named(videomae: Path, dino: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_videomae(tmp_path / "absent")
    with pytest.raises(WeightsError, match="holds a dinov2, expected a videomae"):
        load_videomae(dino)
    with pytest.raises(WeightsError, match="holds a videomae, no encoder of images"):
        load_image_encoder(videomae)
    half = shutil.copytree(dino, tmp_path / "half")
    state = load_file(half / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, half / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"do not fit Dinov2Model: missing layernorm\.weight"):
        load_image_encoder(half)
    (half / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match=r"image processor in .* cannot be loaded"):
        load_image_encoder(half)


def test_frames_of_another_kind_are_refused(videomae: Path) -> None:
    extractor = load_videomae(videomae)
    for frames in (FRAMES.astype(np.float32), FRAMES[0], FRAMES[:1], FRAMES[..., :2]):
        with pytest.raises(ValueError, match=r"videomae takes uint8 \[T ≥ 2, H, W, 3\], got"):
            extractor(frames)
