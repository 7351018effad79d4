"""STDiT, the spatial-temporal diffusion transformer of Open-Sora 1.0, for any number of frames and any size.

With one frame it is PixArt-α: temporal attention over one frame is a linear map, zero in a model that was not trained
on videos. Shapes: `B` batch, `T` frames, `H`, `W` latent size, `S` spatial tokens a frame, `N` = T·S tokens,
`C` hidden channels, `A` heads, `L` text tokens, `Cc` caption channels.

Parameter names are those of the released checkpoints. Papers: DiT (arXiv 2212.09748), PixArt-α
(arXiv 2310.00426), Latte (arXiv 2401.03048); the report of Open-Sora 1.0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from opensora.models.attention import CrossAttention, KeysValues, SelfAttention, TemporalAttention, keep_mask
from opensora.models.checkpointing import Checkpointing, checkpointed
from opensora.models.embeddings import (
    CaptionEmbedder,
    Mlp,
    PatchEmbedder,
    TimestepEmbedder,
    initialise,
    modulated,
    normal_weights,
    spatial_positions,
    temporal_positions,
    unpatchify,
)


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

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens at the default size."""
        return self.tokens(self.input_size)

    def tokens(self, size: tuple[int, ...]) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens of latents [..., T, H, W] of that size."""
        frames, height, width = size[-3:]
        return frames, math.ceil(height / self.patch_size[1]), math.ceil(width / self.patch_size[2])


class EncodedText(NamedTuple):
    """What the blocks need of a text, for all steps of sampling."""

    keys_values: list[KeysValues]  # a block
    keep: Tensor | None  # [B, 1, 1, L]


class Shard(Protocol):
    """The part of a video that one of `P` processes works on; `opensora.parallel.sequence` implements it.

    `T'` and `S'` are a process's share of frames and of spatial tokens, padded to the same size everywhere.
    """

    def own(self, x: Tensor, dim: int) -> Tensor:
        """The process's own frames, T' of the T along `dim`."""

    def to_space(self, x: Tensor) -> Tensor:
        """Own frames [B, T', S, C] -> all frames of own locations [B, T, S', C]."""

    def to_frames(self, x: Tensor) -> Tensor:
        """[B, T, S', C] -> [B, T', S, C], contiguous."""

    def gather(self, x: Tensor) -> Tensor:
        """Tokens of own frames [B, T'·S, K] -> of all frames [B, T·S, K], on every process."""


class STDiTBlock(nn.Module):
    """Spatial attention, temporal attention, text attention, MLP."""

    checkpointing: Checkpointing = "none"  # what the backward pass computes again

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        channels, heads = config.hidden_size, config.num_heads
        self.norm1 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(channels, heads)
        self.cross_attn = CrossAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio), channels)
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels) / channels**0.5)
        self.attn_temp = TemporalAttention(channels, heads)

    @checkpointed
    def forward(
        self,
        x: Tensor,
        text: Tensor | KeysValues,
        t0: Tensor,
        keep: Tensor | None,
        frames: int,
        temporal_position: Tensor | None,
        shard: Shard | None = None,
    ) -> Tensor:
        """x [B, N, C], text [B, L, C] or its keys and values, t0 [B, 6C], temporal_position [1, T, C] -> [B, N, C].

        With a `shard`, x, `frames` and positions are those of the process's own frames.
        """
        batch, tokens, channels = x.shape
        space = tokens // frames
        table = (self.scale_shift_table[None] + t0.view(batch, 6, channels)).to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)  # each [B, 1, C]

        within, along = (batch * frames, space, channels), (batch, frames, space, channels)

        # No name holds an intermediate: without gradients each is freed as soon as it was used.
        x = torch.addcmul(x, gate1, self.attn(modulated(self.norm1, x, shift1, scale1).view(within)).view(x.shape))
        x = torch.addcmul(x, gate1, self._attend_in_time(x.view(along), temporal_position, shard).view(x.shape))
        x = x + self.cross_attn(x, text, keep, frames)
        return torch.addcmul(x, gate2, self.mlp(modulated(self.norm2, x, shift2, scale2)))

    def _attend_in_time(self, x: Tensor, position: Tensor | None, shard: Shard | None) -> Tensor:
        """x [B, T, S, C], position [1, T, C] or None -> [B, T, S, C]."""
        if position is not None:
            x = x + position[:, :, None].to(x.dtype)
        return self.attn_temp(x) if shard is None else shard.to_frames(self.attn_temp(shard.to_space(x)))


class FinalLayer(nn.Module):
    """Tokens [B, N, C] -> patches [B, N, pt·ph·pw·out_channels]."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        channels = config.hidden_size
        self.norm_final = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(channels, math.prod(config.patch_size) * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[None] + t_emb[:, None]).to(x.dtype).chunk(2, dim=1)
        return self.linear(modulated(self.norm_final, x, shift, scale))


class STDiT(nn.Module):
    """The denoiser: latents, timesteps and text in, prediction (and variance) out."""

    pos_embed: Tensor
    pos_embed_temporal: Tensor

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        self.config = config
        # Makes the part that this process works on of T frames with S tokens each; None: all of it.
        self.sharding: Callable[[int, int], Shard] | None = None
        channels = config.hidden_size
        frames, rows, columns = config.grid
        # Part of the released files; `forward` takes the tables of the size it is given.
        self.register_buffer("pos_embed", spatial_positions(rows, columns, channels, config.space_scale).clone())
        self.register_buffer("pos_embed_temporal", temporal_positions(frames, channels, config.time_scale).clone())

        self.x_embedder = PatchEmbedder(config.in_channels, channels, config.patch_size)
        self.t_embedder = TimestepEmbedder(channels)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, config.model_max_length, channels, config.class_dropout_prob
        )
        self.blocks = nn.ModuleList(STDiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialise()

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor | EncodedText, mask: Tensor | None = None) -> Tensor:
        """Predict the noise (or velocity) of latents.

        Args:
            x: latents [B, in_channels, T, H, W]; sizes that the patch does not divide are padded.
            timestep: [B], whole or fractional, on the scale 0…1000.
            y: text embeddings [B, 1, L, Cc], or what `encode_text` made of them.
            mask: [B, L], tokens ≠ 0 are attended to; None attends to all. Not read with encoded text.

        Returns:
            [B, out_channels, T, H, W] in float32.

        Raises:
            ValueError: a shape does not fit; the message names the shapes received.
        """
        config = self.config
        self._check_shapes(x, timestep)
        frames, rows, columns = config.tokens(x.shape)
        texts: list[Tensor | KeysValues]
        if isinstance(y, EncodedText):
            texts, keep = list(y.keys_values), y.keep
        else:
            texts, keep = [self._embed_text(y, mask, len(x))] * config.depth, keep_mask(mask, len(x))

        size, channels = x.shape[2:], config.hidden_size
        space = spatial_positions(rows, columns, channels, config.space_scale, x.device)
        time = temporal_positions(frames, channels, config.time_scale, x.device)
        shard = self.sharding(frames, rows * columns) if self.sharding else None
        if shard:
            x, time = shard.own(x, 2), shard.own(time, 1)
            frames = x.shape[2]
        x = self.x_embedder(x)  # [B, N, C], in the type that autocast gives it, which the whole stream keeps
        x = (x.view(len(x), frames, -1, channels) + space.to(x.dtype)[:, None]).view(x.shape)
        t_emb = self.t_embedder(timestep)  # [B, C]
        t0 = self.t_block(t_emb)  # [B, 6C]
        position: Tensor | None = time
        for block, text in zip(self.blocks, texts, strict=True):
            x = block(x, text, t0, keep, frames, position, shard)
            position = None  # only the first block's temporal attention sees it
        x = self.final_layer(x, t_emb)  # [B, N, patch · out_channels]
        if shard:
            x = shard.gather(x)
        return unpatchify(x, size, config.patch_size).float()

    def encode_text(self, y: Tensor, mask: Tensor | None = None) -> EncodedText:
        """Keys and values of text embeddings [B, 1, L, Cc] for every block: work that sampling does once a prompt.

        Tokens that no row of `mask` [B, L] attends to are left out, and the mask too where nothing is left to mask.
        """
        keep = keep_mask(mask, len(y))
        if keep is not None:
            used = keep.flatten(1).any(0)  # [L]
            y, keep = y[:, :, used], keep[..., used]
            keep = None if keep.all() else keep
        text = self._embed_text(y, None, len(y))
        blocks = (block for block in self.blocks if isinstance(block, STDiTBlock))
        return EncodedText([block.cross_attn.keys_values(text) for block in blocks], keep)

    def _embed_text(self, y: Tensor, mask: Tensor | None, batch: int) -> Tensor:
        """[B, 1, L, Cc] -> [B, L, C]."""
        if y.ndim != 4 or y.shape[:2] != (batch, 1) or y.shape[3] != self.config.caption_channels:
            raise ValueError(f"y must be [{batch}, 1, L, {self.config.caption_channels}], got {list(y.shape)}")
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != y.shape[2]):
            raise ValueError(f"mask must be [B, {y.shape[2]}], got {list(mask.shape)}")
        return self.y_embedder(y).squeeze(1)

    def _check_shapes(self, x: Tensor, timestep: Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"x must be [B, {self.config.in_channels}, T, H, W], got {list(x.shape)}")
        if timestep.shape != x.shape[:1]:
            raise ValueError(f"timestep must be [{x.shape[0]}], got {list(timestep.shape)}")

    def _initialise(self) -> None:
        initialise(self)
        normal_weights(self.t_block)
        if self.config.caption_init_std is not None:
            normal_weights(self.y_embedder, self.config.caption_init_std)
        for block in self.modules():
            if isinstance(block, STDiTBlock):
                nn.init.zeros_(block.cross_attn.proj.weight)
                nn.init.zeros_(block.attn_temp.proj.weight)  # a warm start begins as an image model
        nn.init.zeros_(self.final_layer.linear.weight)
