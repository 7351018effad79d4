"""DiT with full attention over all tokens of a video: what STDiT is compared with, at the same width and depth.

The condition is one vector: the timestep's embedding plus a pooled text (CLIP's in Open-Sora 1.0) or a class. It
modulates every block; there is no text attention. Shapes: `B` batch, `T` frames, `H`, `W` latent size, `S` spatial
tokens a frame, `N` = T·S tokens, `C` hidden channels, `L` text tokens, `Cc` caption channels. Parameter names are those
of the released checkpoints of DiT (arXiv 2212.09748) and Latte (arXiv 2401.03048).
"""

import math

import torch
from torch import Tensor, nn

from opensora.models.attention import SelfAttention, keep_mask
from opensora.models.checkpointing import Checkpointing, checkpointed
from opensora.models.embeddings import (
    SMALL_STD,
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
from opensora.models.stdit import STDiTConfig


class LabelEmbedder(nn.Module):
    """Classes [B] -> [B, C]; the last row of the table stands for no class, which guidance needs."""

    def __init__(self, num_classes: int, channels: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, channels)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class DiTBlock(nn.Module):
    """Attention over all tokens and an MLP, both modulated by the condition."""

    checkpointing: Checkpointing = "none"  # what the backward pass computes again

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        channels = config.hidden_size
        self.norm1 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(channels, config.num_heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio), channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))

    @checkpointed
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, N, C], condition [B, C] -> [B, N, C]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=2)
        x = torch.addcmul(x, gate1, self.attn(modulated(self.norm1, x, shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(modulated(self.norm2, x, shift2, scale2)))


class FinalLayer(nn.Module):
    """Tokens [B, N, C] -> patches [B, N, pt·ph·pw·out_channels]."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        channels = config.hidden_size
        self.norm_final = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(channels, math.prod(config.patch_size) * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=2)
        return self.linear(modulated(self.norm_final, x, shift, scale))


class DiT(nn.Module):
    """The denoiser that STDiT is compared with; the same configuration, so that they differ in attention alone.

    `num_classes` > 0 conditions on classes, as the released DiT and Latte do, instead of on text.
    """

    pos_embed_spatial: Tensor
    pos_embed_temporal: Tensor

    def __init__(self, config: STDiTConfig, num_classes: int = 0) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        channels, drop = config.hidden_size, config.class_dropout_prob
        frames, rows, columns = config.grid
        spatial = spatial_positions(rows, columns, channels, config.space_scale)
        self.register_buffer("pos_embed_spatial", spatial.clone())
        self.register_buffer("pos_embed_temporal", temporal_positions(frames, channels, config.time_scale).clone())

        self.x_embedder = PatchEmbedder(config.in_channels, channels, config.patch_size)
        self.y_embedder: LabelEmbedder | CaptionEmbedder
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, channels, drop)
        else:
            self.y_embedder = CaptionEmbedder(config.caption_channels, config.model_max_length, channels, drop)
        self.t_embedder = TimestepEmbedder(channels)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialise()

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predict the noise of latents.

        Args:
            x: latents [B, in_channels, T, H, W]; sizes that the patch does not divide are padded.
            timestep: [B], whole or fractional, on the scale 0…1000.
            y: text embeddings [B, 1, L, Cc], averaged over the tokens of `mask` after their projection (a pooled
                text has L = 1); or classes [B] where the model has them.
            mask: [B, L] or None.

        Returns:
            [B, out_channels, T, H, W] in float32.
        """
        config, size = self.config, x.shape[2:]
        if x.ndim != 5 or x.shape[1] != config.in_channels:
            raise ValueError(f"x must be [B, {config.in_channels}, T, H, W], got {list(x.shape)}")
        frames, rows, columns = config.tokens(x.shape)
        space = spatial_positions(rows, columns, config.hidden_size, config.space_scale, x.device)
        time = temporal_positions(frames, config.hidden_size, config.time_scale, x.device)
        position = space[:, None] + time[:, :, None]  # [1, T, S, C]
        condition = self.t_embedder(timestep) + self._condition(y, mask, len(x))  # [B, C]
        x = self.x_embedder(x)  # [B, N, C]
        x = x + position.flatten(1, 2).to(x.dtype)
        for block in self.blocks:
            x = block(x, condition)
        return unpatchify(self.final_layer(x, condition), size, config.patch_size).float()

    def _condition(self, y: Tensor, mask: Tensor | None, batch: int) -> Tensor:
        """What is added to the timestep's embedding: [B, C]."""
        if self.num_classes:
            if y.shape != (batch,):
                raise ValueError(f"y must be classes [{batch}], got {list(y.shape)}")
            return self.y_embedder(y)
        if y.ndim != 4 or y.shape[:2] != (batch, 1) or y.shape[3] != self.config.caption_channels:
            raise ValueError(f"y must be [{batch}, 1, L, {self.config.caption_channels}], got {list(y.shape)}")
        text = self.y_embedder(y).squeeze(1)  # [B, L, C]
        keep = keep_mask(mask, batch)
        if keep is None:
            return text.mean(1)
        weights = keep.flatten(1).to(text.dtype)[:, :, None]
        return (text * weights).sum(1) / weights.sum(1)

    def _initialise(self) -> None:
        initialise(self)
        if isinstance(self.y_embedder, LabelEmbedder):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=SMALL_STD)
        else:
            normal_weights(self.y_embedder)
        for part in self.modules():
            if isinstance(part, DiTBlock | FinalLayer):
                normal_weights(part.adaLN_modulation, std=0.0)
        nn.init.zeros_(self.final_layer.linear.weight)
