"""What enters the transformers (position tables, patches, timesteps, captions) and how patches leave them.

Shapes: `B` batch, `T` frames, `H`, `W` latent size, `H'`, `W'` the same in patches, `N` = T·H'·W' tokens, `C` hidden
channels, `L` text tokens, `Cc` caption channels. Token index = (t·H' + h)·W' + w. Papers: DiT (arXiv 2212.09748),
PixArt-α (arXiv 2310.00426).
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCY_CHANNELS = 256  # sinusoidal channels of a timestep (DiT)
MAX_PERIOD = 10_000.0  # longest wavelength of every sinusoidal table (DiT)
SMALL_STD = 0.02  # of embedding layers (DiT)
CPU = torch.device("cpu")


def sinusoid(positions: Tensor, channels: int) -> Tensor:
    """[P] -> [P, channels]: [sin(p·ω), cos(p·ω)] with ω_k = 10000^(−k / (channels / 2)), in float64."""
    half = channels // 2
    omega = MAX_PERIOD ** (-torch.arange(half, dtype=torch.float64, device=CPU) / half)
    angles = positions.to(torch.float64)[:, None] * omega[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@torch.compiler.assume_constant_result
def spatial_positions(rows: int, columns: int, channels: int, scale: float, device: torch.device = CPU) -> Tensor:
    """Table [1, rows·columns, channels] in float32, kept; the first half of the channels encodes the column."""
    return _spatial(rows, columns, channels, scale, device)


@torch.compiler.assume_constant_result
def temporal_positions(frames: int, channels: int, scale: float, device: torch.device = CPU) -> Tensor:
    """Table [1, frames, channels] in float32, kept."""
    return _temporal(frames, channels, scale, device)


@lru_cache(maxsize=16)
def _spatial(rows: int, columns: int, channels: int, scale: float, device: torch.device) -> Tensor:
    column = sinusoid(torch.arange(columns, device=CPU) / scale, channels // 2).repeat(rows, 1)
    row = sinusoid(torch.arange(rows, device=CPU) / scale, channels // 2).repeat_interleave(columns, dim=0)
    return torch.cat([column, row], dim=1).float()[None].to(device)


@lru_cache(maxsize=16)
def _temporal(frames: int, channels: int, scale: float, device: torch.device) -> Tensor:
    return sinusoid(torch.arange(frames, device=CPU) / scale, channels).float()[None].to(device)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, C] scaled by 1 + scale and shifted, both [B, 1, C], in one pass over memory."""
    return torch.addcmul(shift, x, 1 + scale)


def modulated(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`modulate` of the normalised x. Autocast would return float32 here; the norm itself computes in it either way."""
    if x.is_meta:  # which autocast does not know
        return modulate(norm(x), shift, scale)
    with torch.autocast(x.device.type, enabled=False):
        return modulate(norm(x), shift, scale)


class PatchEmbedder(nn.Module):
    """Latent [B, c, T, H, W] -> tokens [B, N, C]; sizes that the patch does not divide are padded with zeros."""

    def __init__(self, in_channels: int, channels: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, channels, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        _, patch_h, patch_w = self.proj.kernel_size
        x = F.pad(x.to(self.proj.weight.dtype), (0, -x.shape[4] % patch_w, 0, -x.shape[3] % patch_h))
        # The residual stream inherits this layout: laid out by channel, every norm and product would copy it.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


def unpatchify(x: Tensor, size: Sequence[int], patch: tuple[int, int, int]) -> Tensor:
    """Patches [B, N, pt·ph·pw·c] (c fastest, pt = 1) of latents of `size` -> [B, c, T, H, W]; padding is cut off."""
    (frames, height, width), (_, patch_h, patch_w) = size, patch
    rows, columns = math.ceil(height / patch_h), math.ceil(width / patch_w)
    x = x.view(x.shape[0], frames, rows, columns, patch_h, patch_w, -1)
    x = x.permute(0, 6, 1, 2, 4, 3, 5)  # [B, c, T, H', ph, W', pw]
    return x.reshape(*x.shape[:3], rows * patch_h, columns * patch_w)[..., :height, :width]


class TimestepEmbedder(nn.Module):
    """Timesteps [B] -> [B, C]. The sinusoids stay in float32: bf16 would merge neighbouring timesteps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_CHANNELS, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, timestep: Tensor) -> Tensor:
        half = FREQUENCY_CHANNELS // 2
        index = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angles = timestep.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * index / half)[None]
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if torch.is_grad_enabled():
            return self.fc2(F.gelu(hidden, approximate="tanh"))
        # The hidden layer is the largest tensor of the model; without gradients nobody needs it a second time.
        return self.fc2(torch.ops.aten.gelu_(hidden, approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text embeddings [B, 1, L, Cc] -> [B, 1, L, C]; drops captions in training for guidance."""

    y_embedding: Tensor

    def __init__(self, caption_channels: int, max_length: int, channels: int, dropout_prob: float) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, channels, channels)
        self.register_buffer("y_embedding", torch.randn(max_length, caption_channels) / caption_channels**0.5)
        self.dropout_prob = dropout_prob

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """`drop` [B] (1 drops that sample's text) replaces the random choice made in training."""
        y = y.to(self.y_embedding.dtype)
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
        if drop is not None:
            y = torch.where(drop.bool()[:, None, None, None], self.y_embedding[: y.shape[2]], y)
        return self.y_proj(y)


def initialise(model: nn.Module) -> None:
    """What DiT, PixArt and STDiT share: xavier weights, zero biases, patches as a linear layer, small time layers."""
    for module in model.modules():
        match module:
            case nn.Linear():
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            case PatchEmbedder():
                patch = module.proj.weight
                nn.init.xavier_uniform_(patch.data.view(patch.shape[0], -1))
    for module in model.modules():
        if isinstance(module, TimestepEmbedder):
            normal_weights(module)


def normal_weights(part: nn.Module, std: float = SMALL_STD) -> None:
    """Draw the weights of all linear layers in `part` from a normal distribution."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
