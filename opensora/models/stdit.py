"""STDiT, the spatial-temporal diffusion transformer of Open-Sora 1.0, for any number of frames and any size.

Shapes: `B` batch, `T` frames, `H`, `W` latent size, `S` spatial tokens a frame, `N` = T·S tokens,
`C` hidden channels, `L` text tokens, `Cc` caption channels. Token index = (t·H' + h)·W' + w.

Parameter names are those of the released checkpoints. Papers: DiT (arXiv 2212.09748), PixArt-α
(arXiv 2310.00426), Latte (arXiv 2401.03048); the report of Open-Sora 1.0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.models.attention import CrossAttention, SelfAttention, keep_mask

FREQUENCY_CHANNELS = 256  # sinusoidal channels of a timestep (DiT)
MAX_PERIOD = 10_000.0  # longest wavelength of every sinusoidal table (DiT)


@dataclass(frozen=True)
class STDiTConfig:
    """Shape of an STDiT. `input_size` is the default latent size; other sizes are accepted by `forward`."""

    input_size: tuple[int, int, int]  # latent frames, height, width
    in_channels: int = 4  # latent channels
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latent frames, rows, columns a token
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096  # width of the text encoder
    model_max_length: int = 120  # text tokens
    space_scale: float = 1.0  # spatial positions are divided by it (0.5 at 256 px)
    time_scale: float = 1.0  # temporal positions are divided by it
    class_dropout_prob: float = 0.1  # share of captions dropped in training
    pred_sigma: bool = True  # also predict the variance: twice the output channels
    caption_init_std: float | None = 0.02  # None: xavier, which small models need

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4 (position tables need it)")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.patch_size}: STDiT attends frame by frame, so the first must be 1")

    @property
    def out_channels(self) -> int:
        """Channels of the output: the prediction, and its variance when `pred_sigma`."""
        return self.in_channels * (2 if self.pred_sigma else 1)


def sinusoid(positions: Tensor, channels: int) -> Tensor:
    """[P] -> [P, channels]: [sin(p·ω), cos(p·ω)] with ω_k = 10000^(−k / (channels / 2)), in float64."""
    half = channels // 2
    omega = MAX_PERIOD ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.to(torch.float64)[:, None] * omega[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def spatial_positions(rows: int, columns: int, channels: int, scale: float) -> Tensor:
    """Table [1, rows·columns, channels] in float32; the first half of the channels encodes the column."""
    column = sinusoid(torch.arange(columns) / scale, channels // 2).repeat(rows, 1)
    row = sinusoid(torch.arange(rows) / scale, channels // 2).repeat_interleave(columns, dim=0)
    return torch.cat([column, row], dim=1).float()[None]


def temporal_positions(frames: int, channels: int, scale: float) -> Tensor:
    """Table [1, frames, channels] in float32."""
    return sinusoid(torch.arange(frames) / scale, channels).float()[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, C] scaled and shifted by [B, 1, C]."""
    return x * (1 + scale) + shift


class PatchEmbedder(nn.Module):
    """Latent [B, c, T, H, W] -> tokens [B, N, C]."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


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
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text embeddings [B, 1, L, Cc] -> [B, 1, L, C]; drops captions in training for guidance."""

    y_embedding: Tensor

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        self.y_proj = Mlp(config.caption_channels, config.hidden_size, config.hidden_size)
        null = torch.randn(config.model_max_length, config.caption_channels) / config.caption_channels**0.5
        self.register_buffer("y_embedding", null)
        self.dropout_prob = config.class_dropout_prob

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """`drop` [B] (1 drops that sample's text) replaces the random choice made in training."""
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
        if drop is not None:
            null = self.y_embedding[: y.shape[2]].to(y.dtype)
            y = torch.where(drop.bool()[:, None, None, None], null, y)
        return self.y_proj(y)


class STDiTBlock(nn.Module):
    """Spatial attention, temporal attention, text attention, MLP."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        channels, heads = config.hidden_size, config.num_heads
        self.norm1 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(channels, heads)
        self.cross_attn = CrossAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio), channels)
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels) / channels**0.5)
        self.attn_temp = SelfAttention(channels, heads)

    def forward(
        self, x: Tensor, text: Tensor, t0: Tensor, keep: Tensor | None, frames: int, temporal_position: Tensor | None
    ) -> Tensor:
        """x [B, N, C], text [B, L, C], t0 [B, 6C], temporal_position [1, T, C] or None -> [B, N, C]."""
        batch, tokens, channels = x.shape
        space = tokens // frames
        table = self.scale_shift_table[None] + t0.view(batch, 6, channels)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)  # each [B, 1, C]

        within = modulate(self.norm1(x), shift1, scale1).view(batch * frames, space, channels)
        x = x + gate1 * self.attn(within).view(batch, tokens, channels)

        along = x.view(batch, frames, space, channels).transpose(1, 2).reshape(batch * space, frames, channels)
        if temporal_position is not None:
            along = along + temporal_position
        along = self.attn_temp(along).view(batch, space, frames, channels).transpose(1, 2)
        x = x + gate1 * along.reshape(batch, tokens, channels)

        x = x + self.cross_attn(x, text, keep)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens [B, N, C] -> patches [B, N, pt·ph·pw·out_channels]."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        channels = config.hidden_size
        self.norm_final = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(channels, math.prod(config.patch_size) * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[None] + t_emb[:, None]).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class STDiT(nn.Module):
    """The denoiser: latents, timesteps and text in, prediction (and variance) out."""

    pos_embed: Tensor
    pos_embed_temporal: Tensor

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.hidden_size
        frames, rows, columns = (
            math.ceil(size / patch) for size, patch in zip(config.input_size, config.patch_size, strict=True)
        )
        self.register_buffer("pos_embed", spatial_positions(rows, columns, channels, config.space_scale))
        self.register_buffer("pos_embed_temporal", temporal_positions(frames, channels, config.time_scale))
        self._position_cache: dict[tuple[int, ...], Tensor] = {}
        self.grid = (frames, rows, columns)

        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimestepEmbedder(channels)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
        self.y_embedder = CaptionEmbedder(config)
        self.blocks = nn.ModuleList(STDiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialise()

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predict the noise (or velocity) of latents.

        Args:
            x: latents [B, in_channels, T, H, W]; sizes that the patch does not divide are padded.
            timestep: [B], whole or fractional, on the scale 0…1000.
            y: text embeddings [B, 1, L, Cc].
            mask: [B, L], tokens ≠ 0 are attended to; None attends to all.

        Returns:
            [B, out_channels, T, H, W] in float32.

        Raises:
            ValueError: a shape does not fit; the message names the shapes received.
        """
        self._check_shapes(x, timestep, y, mask)
        height, width = x.shape[-2:]
        _, patch_h, patch_w = self.config.patch_size
        dtype = self.x_embedder.proj.weight.dtype
        x = F.pad(x.to(dtype), (0, -width % patch_w, 0, -height % patch_h))
        frames, rows, columns = x.shape[2], x.shape[3] // patch_h, x.shape[4] // patch_w

        x = self.x_embedder(x) + self._spatial(rows, columns).to(dtype).repeat(1, frames, 1)  # [B, N, C]
        t_emb = self.t_embedder(timestep)  # [B, C]
        t0 = self.t_block(t_emb)  # [B, 6C]
        text = self.y_embedder(y.to(dtype)).squeeze(1)  # [B, L, C]
        keep = keep_mask(mask, y.shape[0])
        position: Tensor | None = self._temporal(frames).to(dtype)
        for block in self.blocks:
            x = block(x, text, t0, keep, frames, position)
            position = None  # only the first block's temporal attention sees it
        x = self.final_layer(x, t_emb)  # [B, N, patch · out_channels]
        return self._unpatchify(x, frames, rows, columns)[..., :height, :width].float()

    def _check_shapes(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[1] != config.in_channels:
            raise ValueError(f"x must be [B, {config.in_channels}, T, H, W], got {list(x.shape)}")
        if timestep.shape != x.shape[:1]:
            raise ValueError(f"timestep must be [{x.shape[0]}], got {list(timestep.shape)}")
        if y.ndim != 4 or y.shape[:2] != (x.shape[0], 1) or y.shape[3] != config.caption_channels:
            raise ValueError(f"y must be [{x.shape[0]}, 1, L, {config.caption_channels}], got {list(y.shape)}")
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != y.shape[2]):
            raise ValueError(f"mask must be [B, {y.shape[2]}], got {list(mask.shape)}")

    def _unpatchify(self, x: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """[B, N, pt·ph·pw·c] (c fastest) -> [B, c, T, H, W]."""
        _, patch_h, patch_w = self.config.patch_size
        out = self.config.out_channels
        x = x.view(x.shape[0], frames, rows, columns, patch_h, patch_w, out)
        x = x.permute(0, 6, 1, 2, 4, 3, 5)  # [B, c, T, H', ph, W', pw]
        return x.reshape(x.shape[0], out, frames, rows * patch_h, columns * patch_w)

    def _spatial(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) == self.grid[1:]:
            return self.pos_embed
        key = (rows, columns)
        if key not in self._position_cache:
            table = spatial_positions(rows, columns, self.config.hidden_size, self.config.space_scale)
            self._position_cache[key] = table
        return self._cached(key)

    def _temporal(self, frames: int) -> Tensor:
        if frames == self.grid[0]:
            return self.pos_embed_temporal
        key = (frames,)
        if key not in self._position_cache:
            table = temporal_positions(frames, self.config.hidden_size, self.config.time_scale)
            self._position_cache[key] = table
        return self._cached(key)

    def _cached(self, key: tuple[int, ...]) -> Tensor:
        """A cached table on the model's device, moved there once."""
        device = self.pos_embed.device
        if self._position_cache[key].device != device:
            self._position_cache[key] = self._position_cache[key].to(device)
        return self._position_cache[key]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj.weight
        nn.init.xavier_uniform_(patch.data.view(patch.shape[0], -1))
        for part in (self.t_embedder.mlp, self.t_block):
            for linear in part:
                if isinstance(linear, nn.Linear):
                    nn.init.normal_(linear.weight, std=0.02)
        if self.config.caption_init_std is not None:
            nn.init.normal_(self.y_embedder.y_proj.fc1.weight, std=self.config.caption_init_std)
            nn.init.normal_(self.y_embedder.y_proj.fc2.weight, std=self.config.caption_init_std)
        for block in self.modules():
            if not isinstance(block, STDiTBlock):
                continue
            nn.init.zeros_(block.cross_attn.proj.weight)
            nn.init.zeros_(block.attn_temp.proj.weight)  # a warm start begins as an image model
        nn.init.zeros_(self.final_layer.linear.weight)
