"""Features of videos for Fréchet distances, by networks from local folders; each names its distance after itself.

T frames of a clip, D channels, P positions of a clip at which features are taken. Without real weights there is a fixed
random network, and its name says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora.weights import WeightsError, first_line, hash_model, load_pretrained, load_strict, load_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import BaseImageProcessor, PretrainedConfig

EXTRACTOR = "randconv"
CHANNELS = 32
SEED = 20240318
I3D_FRAMES, I3D_SIZE = 16, 224
FRAMES_PER_CLIP = 4  # that an image encoder looks at
SIZES = {384: "s", 768: "b", 1024: "l", 1280: "h", 1408: "g", 1664: "bigg"}  # names of vision transformers, by width


@dataclass(frozen=True)
class Extractor:
    """One network that makes features."""

    name: str
    metric: str  # of the Fréchet distance over its features
    sha256: str  # of its weights
    width: int  # D
    min_frames: int  # of a clip; shorter ones have no features
    call: Callable[[np.ndarray], np.ndarray]  # uint8 [T, H, W, 3] to [P, D]

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Features float64 [P, D] of one clip uint8 [T, H, W, 3]; raises ValueError for another shape or type."""
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or len(frames) < self.min_frames:
            raise ValueError(
                f"{self.name} takes uint8 [T ≥ {self.min_frames}, H, W, 3], got {frames.dtype} {list(frames.shape)}"
            )
        return self.call(frames).astype(np.float64)


def load_randconv() -> Extractor:
    """The random network of `randconv_features`."""
    return Extractor(
        EXTRACTOR, f"fd_{EXTRACTOR}", f"seed {SEED}", 2 * CHANNELS, 1, lambda x: randconv_features(x[None])
    )


def randconv_features(videos: np.ndarray) -> np.ndarray:
    """Features [N, 64] float64 of uint8 videos [N, T, H, W, 3] by a random 3D convolution network of a fixed seed.

    It tells distributions apart, roughly; it is no FVD, and its numbers compare only with its own.
    """
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(SEED)
    first = torch.randn(CHANNELS, 3, 3, 5, 5, generator=generator) / 15
    second = torch.randn(CHANNELS, CHANNELS, 3, 3, 3, generator=generator) / 29
    features = []
    with torch.no_grad():
        for video in videos:
            x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            x = F.relu(F.conv3d(x, first, stride=(1, 2, 2), padding=(1, 2, 2)))
            x = F.relu(F.conv3d(x, second, stride=(1, 2, 2), padding=1)).flatten(2)
            features.append(torch.cat([x.mean(2), x.std(2)], dim=1)[0])
    return torch.stack(features).double().numpy()


def load_videomae(folder: Path, device: str = "cpu") -> Extractor:
    """VideoMAE (Tong et al. 2022, arXiv 2203.12602): the mean of its tokens.

    It sees as many frames as it was trained on, evenly spaced over the clip (some twice in a shorter one), resized and
    cropped by the folder's own image processor.

    Args:
        folder: a VideoMAE as Transformers saves it, pretrained or fine-tuned, with `preprocessor_config.json`.

    Raises:
        WeightsError: a file is missing or damaged, or tensors do not fit.
    """
    import torch
    from transformers import VideoMAEModel

    kind = _read_config(folder)
    if kind.model_type != "videomae":
        raise WeightsError(f"{folder} holds a {kind.model_type}, expected a videomae")
    processor = _read_processor(folder)
    model = load_pretrained(VideoMAEModel, folder, torch.float32).to(device)

    @torch.inference_mode()
    def call(frames: np.ndarray) -> np.ndarray:
        chosen = frames[evenly(len(frames), kind.num_frames)]
        pixels = processor(list(chosen), return_tensors="pt").pixel_values.to(device)  # [1, T, 3, H, W]
        return model(pixel_values=pixels).last_hidden_state.mean(1).cpu().numpy()

    return Extractor("videomae", "fvd_videomae", hash_model(folder), kind.hidden_size, 2, call)


def load_i3d(path: Path, device: str = "cpu") -> Extractor:
    """I3D: the logits of 400 actions, as FVD is usually taken (Unterthiner et al. 2018, arXiv 1812.01717).

    It sees all frames, those of a clip of fewer than 16 evenly repeated, in −1…1 as it was trained; the shorter side is
    scaled to 224 pixels (bicubic with antialiasing) and the middle cut out.

    Args:
        path: a state dict, safetensors or PyTorch's. TorchScript is refused: such a file is a program, and there is no
            way to load one without running it.

    Raises:
        WeightsError: missing, damaged, a program, or tensors that do not fit.
    """
    import torch

    from opensora.metrics.i3d import CLASSES, I3D

    model = _load_network(I3D(), path, device)

    @torch.inference_mode()
    def call(frames: np.ndarray) -> np.ndarray:
        if len(frames) < I3D_FRAMES:
            frames = frames[evenly(len(frames), I3D_FRAMES)]
        x = resize_crop(torch.from_numpy(frames).to(device), I3D_SIZE)  # [T, 3, H, W]
        return model((x * 2 - 1).transpose(0, 1)[None]).cpu().numpy()

    return Extractor("i3d", "fvd_i3d", hash_model(path), CLASSES, 2, call)


def load_inception(path: Path, device: str = "cpu") -> Extractor:
    """Inception-v3 with TensorFlow's weights of 2015, over single frames: the network that FID is named by.

    Four frames of a clip are seen, evenly spaced (one of a picture), scaled to 299×299 as pytorch-fid does: bilinear,
    without antialiasing. Published FIDs are of 10,000 images and more; one of a few frames does not compare with them.

    Args:
        path: a state dict, safetensors or PyTorch's.

    Raises:
        WeightsError: missing, damaged, or tensors that do not fit.
    """
    import torch
    from torch.nn import functional as F

    from opensora.metrics.inception import SIZE, WIDTH, Inception

    model = _load_network(Inception(), path, device)

    @torch.inference_mode()
    def call(frames: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(_some(frames)).to(device).permute(0, 3, 1, 2).float() / 255
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False)
        return model(x * 2 - 1).cpu().numpy()

    return Extractor("inception", "fid_inception", hash_model(path), WIDTH, 1, call)


def load_image_encoder(folder: Path, device: str = "cpu") -> Extractor:
    """Features of single frames by CLIP, SigLIP, DINO or another encoder of Transformers, for an FID by that encoder.

    Four frames of a clip are seen, evenly spaced (one of a picture). Of a model with a joint space of images and texts
    the image's projection is taken, else the class token, else the mean over places. The distance is named after the
    encoder, as `fid_clip_vit_b_32`: FID alone means the Inception network.

    Args:
        folder: a model as Transformers saves it, with `preprocessor_config.json`.

    Raises:
        WeightsError: a file is missing or damaged, or tensors do not fit.
    """
    import torch
    from transformers import AutoModel

    kind, processor = _read_config(folder), _read_processor(folder)
    model = load_pretrained(AutoModel, folder, torch.float32, optional=("*pooler.*",)).to(device)

    @torch.inference_mode()
    def call(frames: np.ndarray) -> np.ndarray:
        pixels = processor(images=list(_some(frames)), return_tensors="pt").pixel_values.to(device)
        if hasattr(model, "get_image_features"):
            return model.get_image_features(pixel_values=pixels).pooler_output.cpu().numpy()
        tokens = model(pixel_values=pixels).last_hidden_state
        return (tokens[:, 0] if tokens.ndim == 3 else tokens.mean((2, 3))).cpu().numpy()

    try:
        width = call(np.zeros((1, 32, 32, 3), np.uint8)).shape[1]
    except Exception as error:  # a model that takes something else than pictures can fail in any way
        raise WeightsError(f"{folder} holds a {kind.model_type}, no encoder of images: {first_line(error)}") from error
    name = encoder_name(kind)
    return Extractor(name, f"fid_{name}", hash_model(folder), width, 1, call)


def encoder_name(kind: "PretrainedConfig") -> str:
    """A name as `clip_vit_b_32` from a model's configuration: its kind, size and patch."""
    vision = getattr(kind, "vision_config", kind)
    family = kind.model_type.removesuffix("_vision_model").replace("-", "_")
    width, patch = getattr(vision, "hidden_size", None), getattr(vision, "patch_size", None)
    if not isinstance(width, int) or not isinstance(patch, int):
        return family
    stem = family if family.endswith("vit") else f"{family}_vit"
    return f"{stem}_{SIZES.get(width, f'w{width}')}_{patch}"


def evenly(count: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` of `count` frames, first and last among them; some come more than once if there are fewer."""
    return np.linspace(0, count - 1, wanted).round().astype(int)


def resize_crop(frames: "Tensor", size: int) -> "Tensor":
    """uint8 [T, H, W, 3] to float32 [T, 3, size, size] in 0…1: the shorter side scaled, the middle cut out."""
    from torch.nn import functional as F

    x = frames.permute(0, 3, 1, 2).float() / 255
    height, width = x.shape[2:]
    scale = size / min(height, width)
    scaled = (max(size, round(height * scale)), max(size, round(width * scale)))
    x = F.interpolate(x, scaled, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return x[:, :, top : top + size, left : left + size]


def _some(frames: np.ndarray) -> np.ndarray:
    """The frames of a clip [T, H, W, 3] that encoders of images look at."""
    return frames[evenly(len(frames), FRAMES_PER_CLIP)] if len(frames) > 1 else frames


def _load_network(model: "nn.Module", path: Path, device: str) -> "nn.Module":
    """A network of our own with the state dict of a file."""
    try:
        state = load_tensors(path)
    except WeightsError as error:
        advice = "; a state dict is read (docs/metrics.md), TorchScript is a program" if path.is_file() else ""
        raise WeightsError(f"{error}{advice}") from error
    counters = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]  # for training alone
    load_strict(model, state, computed=counters)
    return model.to(device).eval()


def _read_config(folder: Path) -> "PretrainedConfig":
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # Transformers raises anything for files that are missing or damaged
        raise WeightsError(f"the model in {folder} cannot be loaded: {first_line(error)}") from error


def _read_processor(folder: Path) -> "BaseImageProcessor":
    """The image processor of a folder, in the form that needs no torchvision."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except Exception as error:  # Transformers raises anything for files that are missing or damaged
        raise WeightsError(f"the image processor in {folder} cannot be loaded: {first_line(error)}") from error
