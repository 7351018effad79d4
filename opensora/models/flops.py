"""Floating-point operations of STDiT's matrix products, by formula; a multiply-add counts as two.

Norms, activations and softmax are left out, as in PyTorch's own counter, which a test holds these formulas against.

Legend: `T` frames, `S` spatial tokens a frame, `N` = T·S tokens, `C` hidden channels, `L` text tokens, `Cc` caption
channels. All counts are those of one sample.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from opensora.models.embeddings import FREQUENCY_CHANNELS
from opensora.models.stdit import STDiTConfig


class Trainable(NamedTuple):
    """Which parts of STDiT learn; the rest is frozen and needs no gradient of its weights."""

    temporal: bool = True  # temporal attention
    text: bool = True  # caption embedder and text attention
    rest: bool = True

    @classmethod
    def named(cls, name: str) -> "Trainable":
        """Of `trainable` in a stage's settings: "all", "temporal" or "no_text"."""
        return {"all": cls(), "temporal": cls(text=False, rest=False), "no_text": cls(text=False)}[name]

    def has(self, parameter: str) -> bool:
        """Whether the parameter of that name learns."""
        if ".attn_temp." in parameter:
            return self.temporal
        return self.text if ".cross_attn." in parameter or parameter.startswith("y_embedder.") else self.rest


class Product(NamedTuple):
    """Matrix products of one kind in a forward pass: a linear layer, or one of the two products of attention."""

    name: str
    multiply_adds: int
    input_gradient: bool  # the backward pass computes that of the left side (the layer's input, the queries)
    weight_gradient: bool  # … of the right side (the layer's weight, the keys or values)

    @property
    def backward(self) -> int:
        """Multiply-adds of the backward pass: each gradient takes as many as the forward pass."""
        return self.multiply_adds * (self.input_gradient + self.weight_gradient)


class Tokens(NamedTuple):
    """Sizes that one process computes on, of a sample that `ranks` processes share."""

    frames: int  # T of the whole sample
    space: int  # S of the whole sample
    text: int  # L; every process has the whole text
    by_frame: int  # tokens where frames are shared out: everywhere but in temporal attention
    by_place: int  # tokens where space is shared out: in temporal attention

    @classmethod
    def of(cls, config: STDiTConfig, size: tuple[int, int, int], text: int, ranks: int = 1) -> "Tokens":
        """Of latents of `size` (T, H, W); what `ranks` does not divide is padded."""
        frames, rows, columns = config.tokens(size)
        space = rows * columns
        by_frame = math.ceil(frames / ranks) * space
        # One frame stays where it is: nothing is exchanged for its temporal attention.
        return cls(frames, space, text, by_frame, frames * math.ceil(space / ranks) if frames > 1 else by_frame)


def forward_flops(config: STDiTConfig, size: tuple[int, int, int], text_tokens: int, ranks: int = 1) -> int:
    """FLOPs of one sample's forward pass, on each of `ranks` processes that share it.

    Args:
        size: latents' frames, height and width.
        text_tokens: L, padding included: masked tokens are computed too.
    """
    return 2 * sum(product.multiply_adds for product in products(config, Tokens.of(config, size, text_tokens, ranks)))


def training_flops(
    config: STDiTConfig,
    size: tuple[int, int, int],
    text_tokens: int,
    trainable: Trainable = Trainable(),  # noqa: B008  (immutable)
    recompute_blocks: bool = False,
    ranks: int = 1,
) -> int:
    """FLOPs of one sample's forward and backward pass, on each of `ranks` processes that share it.

    Twice the forward pass for the backward one, less the gradients that nobody needs: those of the first layers' inputs
    and of frozen weights. `recompute_blocks` (full activation checkpointing) adds the blocks' forward pass once more;
    selective checkpointing repeats no matrix product.
    """
    tokens = Tokens.of(config, size, text_tokens, ranks)
    once = sum(product.multiply_adds + product.backward for product in products(config, tokens, trainable))
    again = 0
    if recompute_blocks:
        again = config.depth * sum(product.multiply_adds for product in block_products(config, tokens))
    return 2 * (once + again)


def products(config: STDiTConfig, tokens: Tokens, trainable: Trainable = Trainable()) -> Iterator[Product]:  # noqa: B008
    """All matrix products of one sample, in the order of the forward pass."""
    channels, rest = config.hidden_size, trainable.rest
    patch = math.prod(config.patch_size)
    yield Product("patch", tokens.by_frame * patch * config.in_channels * channels, False, rest)
    yield Product("timestep in", FREQUENCY_CHANNELS * channels, False, rest)
    yield Product("timestep out", channels * channels, rest, rest)
    yield Product("modulation", channels * 6 * channels, rest, rest)
    yield Product("text in", tokens.text * config.caption_channels * channels, False, trainable.text)
    yield Product("text out", tokens.text * channels * channels, trainable.text, trainable.text)
    for index in range(config.depth):
        yield from block_products(config, tokens, trainable, first=index == 0)
    out = patch * config.out_channels
    yield Product("final", tokens.by_frame * channels * out, True, rest)


def block_products(
    config: STDiTConfig,
    tokens: Tokens,
    trainable: Trainable = Trainable(),  # noqa: B008
    first: bool = False,
) -> Iterator[Product]:
    """The matrix products of one block; the `first` one has nothing that learns before it when the rest is frozen."""
    channels, (temporal, text, rest) = config.hidden_size, trainable
    hidden = int(channels * config.mlp_ratio)
    square = channels * channels
    spatial, along = tokens.by_frame, tokens.by_place
    before = rest or not first  # the block's input needs a gradient

    yield Product("spatial qkv", spatial * 3 * square, before, rest)
    yield from attention("spatial", spatial * tokens.space * channels, before, before)
    yield Product("spatial out", spatial * square, before, rest)

    if tokens.frames == 1:  # softmax over one key is 1: only the values are projected
        yield Product("temporal values", along * square, before, temporal)
    else:
        yield Product("temporal qkv", along * 3 * square, before, temporal)
        yield from attention("temporal", along * tokens.frames * channels, True, True)
    yield Product("temporal out", along * square, True, temporal)

    yield Product("text queries", spatial * square, True, text)
    yield Product("text keys and values", tokens.text * 2 * square, text, text)
    yield from attention("text", spatial * tokens.text * channels, True, text)
    yield Product("text out", spatial * square, True, text)

    yield Product("MLP in", spatial * channels * hidden, True, rest)
    yield Product("MLP out", spatial * hidden * channels, True, rest)


def attention(name: str, multiply_adds: int, queries: bool, keys: bool) -> tuple[Product, Product]:
    """Its two products, of queries with keys and of weights with values: (queries · keys · C) multiply-adds each."""
    return (
        Product(f"{name} scores", multiply_adds, queries, keys),
        Product(f"{name} values", multiply_adds, queries, keys),
    )
