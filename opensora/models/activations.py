"""Bytes of activations that one training step of STDiT keeps for its backward pass, by formula.

What autograd saves of each operation is added up; a test counts the same with PyTorch's hooks on saved tensors.

Legend: `T` frames, `S` spatial tokens a frame, `N` = T·S tokens, `C` hidden channels, `A` heads, `L` text tokens, `Cc`
caption channels. All counts are those of one sample, on each of the processes that share it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from opensora.models.attention import MAX_HEADS
from opensora.models.checkpointing import Checkpointing
from opensora.models.embeddings import FREQUENCY_CHANNELS
from opensora.models.flops import Tokens, Trainable
from opensora.models.stdit import STDiTConfig

FLOAT = 4  # bytes of float32, in which norms and attention keep their statistics


class Precision(NamedTuple):
    """Bytes an element in the two kinds of tensors of a step."""

    stream: int  # residual stream, norms and modulation
    product: int  # what goes into matrix products and attention, and comes out
    copies_weights: bool = False  # which are float32, and cast for each product


FLOAT32 = Precision(4, 4)
AUTOCAST = Precision(2, 2, copies_weights=True)  # matrix products in bfloat16 (torch.autocast)
BFLOAT16 = Precision(2, 2)  # bfloat16 weights, the float32 ones in the optimizer (ColossalAI)


@dataclass(frozen=True)
class Activations:
    """Bytes of one sample in one step.

    Attributes:
        saved: by part of the model, kept from the forward pass on.
        transient: on top of it at the worst moment of the backward pass: what is computed again there, and gradients.
        end: what is left of both when the backward pass has come to the first block, and most gradients are there.
    """

    saved: dict[str, int]
    transient: int
    end: int

    @property
    def peak(self) -> int:
        """The most that is alive at once."""
        return sum(self.saved.values()) + self.transient


def activations(
    config: STDiTConfig,
    size: tuple[int, int, int],
    text_tokens: int,
    precision: Precision,
    checkpointing: Checkpointing = "none",
    trainable: Trainable = Trainable(),  # noqa: B008  (immutable)
    ranks: int = 1,
) -> Activations:
    """Of one sample with latents of `size` (T, H, W), on each of `ranks` processes that share it."""
    tokens = Tokens.of(config, size, text_tokens, ranks)
    stream, hidden = (tokens.by_frame * width for width in token_bytes(config, precision))
    first, other = (block_bytes(config, tokens, precision, trainable, first) for first in (True, False))
    embedding = embedding_bytes(config, tokens, precision, trainable)
    final = final_bytes(config, tokens, precision, trainable)
    match checkpointing:
        case "none":
            kept = sum(other.values())
            blocks = {part: first[part] + (config.depth - 1) * other[part] for part in other}
        case "selective":
            kept = kept_bytes(config, tokens, precision)
            blocks = {"products of blocks": config.depth * kept}
        case "full":
            kept = stream
            blocks = {"inputs of blocks": config.depth * kept}
    # The worst moment is in the last layer (two gradients of the residual stream), or in the last block's MLP, when the
    # last layer's share has gone: a gradient of the residual stream and one of the hidden layer.
    again = sum(other.values()) - kept
    transient = max(2 * stream, again + stream + hidden - final)
    end = embedding + sum(first.values()) + stream + hidden
    return Activations({"embedding": embedding, **blocks, "final layer": final}, transient, end)


def token_bytes(config: STDiTConfig, precision: Precision) -> tuple[int, int]:
    """Bytes a token of the residual stream, and of the MLP's hidden layer."""
    return config.hidden_size * precision.stream, int(config.hidden_size * config.mlp_ratio) * precision.product


def block_bytes(
    config: STDiTConfig, tokens: Tokens, precision: Precision, trainable: Trainable, first: bool = False
) -> dict[str, int]:
    """What one block keeps, by part; nothing that learns stands before the `first` when the rest is frozen.

    A linear layer keeps its input where its weight learns, attention its queries, keys, values, result and a sum a
    head, a norm its input and two numbers a token, a product of two tensors the one whose partner needs a gradient.
    """
    channels, rest = config.hidden_size, trainable.rest
    stream, product = channels * precision.stream, channels * precision.product  # bytes a token
    before = rest or not first  # the block's input needs a gradient
    norm = before * (stream + 2 * FLOAT) + rest * stream  # input and statistics; what the modulation scales
    sums = config.num_heads * FLOAT

    spatial = norm + rest * product  # input of qkv
    spatial += before * (4 * product + sums)
    spatial += rest * product  # what the gate scales

    if tokens.frames == 1:
        temporal = trainable.temporal * 2 * product  # inputs of the value projection and of the last one
    else:
        temporal = trainable.temporal * product + 4 * product + sums
        if tokens.by_place // tokens.frames * config.num_heads > MAX_HEADS:  # attended in parts, which are joined
            temporal += trainable.temporal * product
    temporal += rest * product

    text = trainable.text * product + 2 * product + sums
    keys_values = tokens.by_frame // tokens.space * tokens.text * 2 * product  # repeated for every frame

    mlp = stream + 2 * FLOAT + rest * (stream + product)
    hidden = token_bytes(config, precision)[1]
    mlp += (1 + rest) * hidden + rest * product

    modulation = 8 * stream  # of a sample: six vectors, two of them with one added
    return {
        "spatial attention": spatial * tokens.by_frame,
        "temporal attention": temporal * tokens.by_place,
        "text attention": text * tokens.by_frame + keys_values,
        "MLP": mlp * tokens.by_frame + modulation,
    }


def kept_bytes(config: STDiTConfig, tokens: Tokens, precision: Precision) -> int:
    """What selective checkpointing keeps of one block: its input, and the results of matrix products and attention.

    Norms, modulation, residual sums and GELU are computed again from these.
    """
    product, sums = config.hidden_size * precision.product, config.num_heads * FLOAT  # bytes a token
    stream, hidden = token_bytes(config, precision)
    by_frame = stream  # the block's input
    by_frame += 5 * product + sums  # spatial: qkv, attention, projection
    by_frame += 3 * product + sums  # text: queries, attention, projection
    by_frame += hidden + product  # MLP
    by_place = 5 * product + sums if tokens.frames > 1 else 2 * product  # temporal
    return by_frame * tokens.by_frame + by_place * tokens.by_place + tokens.text * 2 * product


def embedding_bytes(config: STDiTConfig, tokens: Tokens, precision: Precision, trainable: Trainable) -> int:
    """Of patches, timestep and text: the inputs of their layers."""
    channels, product = config.hidden_size, precision.product
    patch = tokens.by_frame * math.prod(config.patch_size) * config.in_channels * product
    time = (FREQUENCY_CHANNELS + 4 * channels) * product
    text = tokens.text * (config.caption_channels + 3 * channels) * product
    return trainable.rest * (patch + time) + trainable.text * text


def final_bytes(config: STDiTConfig, tokens: Tokens, precision: Precision, trainable: Trainable) -> int:
    """Of the last norm and linear layer, and of the prediction in float32 with which the loss goes backward."""
    channels = config.hidden_size
    norm = channels * precision.stream + 2 * FLOAT
    layer = trainable.rest * channels * (precision.stream + precision.product)
    prediction = math.prod(config.patch_size) * config.out_channels * FLOAT
    return tokens.by_frame * (norm + layer + prediction)


def weight_copy_bytes(config: STDiTConfig, precision: Precision) -> int:
    """Copies of one block's weights, kept until its backward pass: casts, and temporal attention's rows in order."""
    square = config.hidden_size**2
    hidden = int(config.hidden_size * config.mlp_ratio)
    if precision.copies_weights:
        return precision.product * (12 * square + 2 * config.hidden_size * hidden)
    return precision.product * 3 * square
