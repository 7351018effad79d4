"""The image VAE, applied frame by frame (Latent Diffusion, arXiv 2112.10752), through diffusers.

Frames go in micro-batches and large frames in tiles, so that memory follows neither the clip nor the frame.

Shapes: `M` frames, `B` batch, `T` frames a clip, `C` latent channels, `h`, `w` latent size, `H`, `W` frame size.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from opensora.weights import WeightsError, load_strict, load_tensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BATCH_PIXELS = 2**20  # pixels that go through the VAE at once: Stable Diffusion's VAE takes 3 GiB for them in float32
TILE = 768  # pixels; a frame with a longer side is cut into tiles of at most this height and width
OVERLAP = 128  # pixels that neighbouring tiles share; what an edge disturbs lies within, and more brings nothing
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # the first that is there is read
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # attention's in older diffusers


class FrameVAE:
    """An AutoencoderKL from a local folder; latents are scaled to a spread of about one.

    Tiling is not exact: a tile does not know what lies beyond its edge, and attention sees one tile. GroupNorm's
    statistics would tint each tile in its own way, so all tiles share an estimate of the frame's (`SharedNorms`) and
    each is computed twice. Measured with two small VAEs, one with attention, on photographs and drawn textures of
    424x640 in tiles of 256: pictures differ from the whole frame's by 0.7 to 4 grey levels on average (2.4 to 14 with
    a tile's own statistics, 7 to 13 with diffusers' tiling), a photograph's flat ground in places by 40 (by 100), and
    latents by 0.5 to 5 % of their spread; at the borders, neighbouring pixels differ no more than elsewhere. The least
    trustworthy are large frames of a single colour, whose statistics are next to nothing: there sharing lowers
    the worst error, not the mean of about 6 levels. Frames up to `tile` are computed whole, as if there were no tiling.

    Attributes:
        channels: latent channels.
        scale: pixels a latent, in height and in width.
        factor, shift: what turns the VAE's latents z into those of this class: (z − shift) · factor.
        tile, overlap: pixels; the longest side computed whole, and what neighbouring tiles share.
    """

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the VAE in `folder`; raises WeightsError when that is none, or a damaged one."""
        self.vae = load_autoencoder(folder)
        nn.Module.to(self.vae, device=device, dtype=dtype)  # diffusers' own `to` warns of an empty list
        self.device, self.dtype = device, dtype
        config = self.vae.config
        self.factor: float = config.scaling_factor
        self.shift: float = config.shift_factor or 0.0
        self.channels: int = config.latent_channels
        self.scale: int = 2 ** (len(config.block_out_channels) - 1)
        self.tile, self.overlap = TILE, OVERLAP

    @torch.no_grad()
    def encode(self, frames: np.ndarray, micro_batch: int | None = None) -> tuple[Tensor, Tensor]:
        """uint8 [M, H, W, 3] -> scaled mean and standard deviation, both [M, C, h, w] float32 on the CPU.

        Args:
            micro_batch: frames at once; by default as many as `BATCH_PIXELS` hold.

        Raises:
            ValueError: another shape or type, or a height or width that is no multiple of `scale`.
        """
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
            raise ValueError(f"frames must be uint8 [M, H, W, 3], got {frames.dtype} {list(frames.shape)}")
        height, width = frames.shape[1:3]
        if height % self.scale or width % self.scale or not height or not width:
            near = [max(round(side / self.scale), 1) * self.scale for side in (height, width)]
            raise ValueError(
                f"frames of {height}x{width} pixels do not fit a VAE of {self.scale} pixels a latent; "
                f"the nearest size that does is {near[0]}x{near[1]}"
            )
        parts = []
        for part in _split(len(frames), self._frames_at_once(height, width, micro_batch)):
            levels = torch.from_numpy(frames[part]).to(self.device).permute(0, 3, 1, 2)
            pixels = (levels.float() / 127.5 - 1).to(self.dtype)
            parts.append(self._by_tile(self._moments, pixels, self.scale, 1).cpu())
        mean, deviation = torch.cat(parts).chunk(2, dim=1)
        return (mean - self.shift) * self.factor, deviation * self.factor

    @torch.no_grad()
    def decode(self, latents: Tensor, micro_batch: int | None = None) -> np.ndarray:
        """Scaled latents [B, C, T, h, w] -> uint8 [B, T, H, W, 3]; no more than a micro-batch is ever held as floats.

        Args:
            micro_batch: frames at once; by default as many as `BATCH_PIXELS` hold.

        Raises:
            ValueError: another shape.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(f"latents must be [B, {self.channels}, T, h, w], got {list(latents.shape)}")
        batch, _, frames, rows, columns = latents.shape
        flat = latents.transpose(1, 2).flatten(0, 1)  # [B·T, C, h, w]
        height, width = rows * self.scale, columns * self.scale
        video = np.empty((batch * frames, height, width, 3), np.uint8)
        for part in _split(len(flat), self._frames_at_once(height, width, micro_batch)):
            scaled = flat[part].to(self.device).float() / self.factor + self.shift
            pixels = self._by_tile(self._pixels, scaled.to(self.dtype), 1, self.scale)
            levels = ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
            video[part] = levels.permute(0, 2, 3, 1).cpu().numpy()
        return video.reshape(batch, frames, height, width, 3)

    def _frames_at_once(self, height: int, width: int, wanted: int | None) -> int:
        if wanted is not None:
            if wanted < 1:
                raise ValueError(f"micro_batch must be at least 1, got {wanted}")
            return wanted
        return max(1, BATCH_PIXELS // (min(height, self.tile) * min(width, self.tile)))

    def _moments(self, pixels: Tensor) -> Tensor:
        """[M, 3, H, W] -> mean and standard deviation [M, 2·C, h, w] float32."""
        posterior = self.vae.encode(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    def _pixels(self, latents: Tensor) -> Tensor:
        """[M, C, h, w] -> [M, 3, H, W] float32 in about −1…1."""
        return self.vae.decode(latents).sample.float()

    def _by_tile(self, function: Callable[[Tensor], Tensor], whole: Tensor, before: int, after: int) -> Tensor:
        """function(whole), tile by tile where the frames are too large.

        Args:
            before: size of a latent in `whole` [M, ·, h·before, w·before].
            after: size of a latent in the result [M, ·, h·after, w·after].
        """
        rows, columns = whole.shape[2] // before, whole.shape[3] // before  # latents
        if max(rows, columns) * self.scale <= self.tile:
            return function(whole)
        limit, overlap = self.tile // self.scale, self.overlap // self.scale
        tiles = list(product(cut(rows, limit, overlap, after), cut(columns, limit, overlap, after)))
        with SharedNorms(self.vae) as norms:
            for row, column in tiles:
                function(whole[:, :, row.part(before), column.part(before)])
            norms.share()
            result: Tensor | None = None
            for row, column in tiles:
                made = function(whole[:, :, row.part(before), column.part(before)])
                if result is None:
                    result = made.new_zeros(*made.shape[:2], rows * after, columns * after)
                fade = (row.fade[:, None] * column.fade).to(made.device)
                result[:, :, row.part(after), column.part(after)] += made * fade
        assert result is not None  # there is a tile
        return result


@dataclass(frozen=True)
class Span:
    """What a tile takes of a frame's height or width."""

    start: int  # latents
    length: int  # latents
    fade: Tensor  # share of the result that comes from this tile, at each place of its result; tiles add up to 1

    def part(self, unit: int) -> slice:
        """Where it lies in a tensor that has `unit` places a latent."""
        return slice(self.start * unit, (self.start + self.length) * unit)


def cut(size: int, limit: int, overlap: int, unit: int) -> list[Span]:
    """Spans of one length ≤ `limit` that cover `size`, neighbours sharing about `overlap` (all in latents).

    One length, because a sliver at the end would have statistics of its own. Where two overlap, the quarter next to an
    edge counts for nothing, for what lies beyond the edge disturbs it; in the half between one fades into the other.

    Args:
        unit: places a latent in the tiles' results, for the fades.
    """
    count = 1 if size <= limit else math.ceil((size - overlap) / (limit - overlap))
    length = math.ceil((size + (count - 1) * overlap) / count)
    starts = [round(index * (size - length) / max(count - 1, 1)) for index in range(count)]
    places = torch.arange(length * unit) + 0.5
    rise = ((places - overlap * unit / 4) / (overlap * unit / 2)).clamp(0, 1)
    level = torch.ones_like(rise)
    shares = [
        torch.minimum(rise if index else level, rise.flip(0) if index + 1 < count else level) for index in range(count)
    ]
    total = torch.zeros(size * unit)
    for start, share in zip(starts, shares, strict=True):
        total[start * unit : (start + length) * unit] += share
    return [
        Span(start, length, share / total[start * unit : (start + length) * unit])
        for start, share in zip(starts, shares, strict=True)
    ]


class SharedNorms:
    """Lets every GroupNorm of a module use the same mean and variance for all tiles of a frame.

    Within the context, calls with each tile (all of one size) are noted and work as ever. After `share`, calls use what
    was noted, averaged over the tiles. It is an estimate: tiles overlap, and those noted had statistics of their own
    in the layers before.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [part for part in module.modules() if isinstance(part, nn.GroupNorm)]
        self.noted: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # a tile: mean and variance, both [M, groups]
        self.shared: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> "SharedNorms":
        self.handles = [norm.register_forward_hook(self._call) for norm in self.norms]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self.handles:
            handle.remove()

    def share(self) -> None:
        """From now on, use the mean of the means, and the variance within and between tiles."""
        for norm, tiles in self.noted.items():
            means, variances = (torch.stack(values) for values in zip(*tiles, strict=True))
            self.shared[norm] = means.mean(0), variances.mean(0) + means.var(0, correction=0)

    def _call(self, norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        """After the forward of `norm`, which maps [M, C, ...] to the same shape; a result takes the output's place."""
        assert isinstance(norm, nn.GroupNorm)
        groups = inputs[0].float().unflatten(1, (norm.num_groups, -1)).flatten(2)  # bf16 is too coarse for statistics
        if norm not in self.shared:
            variance, mean = torch.var_mean(groups, dim=2, correction=0)
            self.noted.setdefault(norm, []).append((mean, variance))
            return None
        mean, variance = self.shared[norm]
        normal = (groups - mean[..., None]).mul_((variance + norm.eps).rsqrt()[..., None]).view(output.shape)
        shape = (1, -1, *[1] * (output.ndim - 2))
        return normal.mul_(norm.weight.float().view(shape)).add_(norm.bias.float().view(shape)).to(output.dtype)


def _split(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `total`."""
    return (slice(start, start + size) for start in range(0, total, size))


def load_autoencoder(folder: Path) -> "AutoencoderKL":
    """The VAE of a folder with config.json and weights, float32 on the CPU; no code in the weights is run.

    diffusers' own loader would fill in random numbers for tensors that are missing.

    Raises:
        WeightsError: there is no VAE, or it is damaged, or its tensors are not exactly those its config describes.
    """
    from diffusers import AutoencoderKL

    config = _read_config(folder)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise WeightsError(f"no VAE weights in {folder}: neither {' nor '.join(WEIGHTS)} is there")
    try:
        with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and then replaced
            vae = AutoencoderKL.from_config(config)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise WeightsError(f"{folder / 'config.json'} describes no VAE that can be built: {_line(error)}") from error
    state = load_tensors(path)
    try:
        load_strict(vae, {_new_name(name): tensor for name, tensor in state.items()})
    except (WeightsError, AttributeError) as error:  # AttributeError: something that is no tensor bears a tensor's name
        raise WeightsError(f"{path}: {_line(error)}") from error
    return vae.eval()


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"no VAE in {folder}: there is no config.json; expected the folder of an AutoencoderKL")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is damaged: {_line(error)}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != "AutoencoderKL":
        raise WeightsError(f"{path} describes {name or 'no model'}, expected AutoencoderKL")
    return config


def _new_name(name: str) -> str:
    """The name that a tensor has today; attention had other ones when Stable Diffusion's VAE was released."""
    if ".attentions." not in name:
        return name
    return ".".join(OLD_NAMES.get(part, part) for part in name.split("."))


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
