"""Bytes of activations that one training step of STDiT keeps for its backward pass, by formula.

What autograd saves of each operation is added up; a test counts the same with PyTorch's hooks on saved tensors.

Legend: `T` frames, `S` spatial tokens a frame, `N` = T·S tokens, `C` hidden channels, `A` heads, `L` text tokens, `Cc`
caption channels. All counts are those of one sample, on each of the processes that share it.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from opensora.models.attention import MAX_HEADS
from opensora.models.embeddings import FREQUENCY_CHANNELS
from opensora.models.flops import Tokens, Trainable
from opensora.models.stdit import STDiTConfig

Checkpointing = Literal["none", "selective", "full"]
FLOAT = 4  # bytes of float32, in which norms and attention keep their statistics


class Precision(NamedTuple):
    """Bytes an element in the two kinds of tensors of a step."""

    stream: int  # residual stream, norms and modulation
    product: int  # what goes into matrix products and attention, and comes out


FLOAT32 = Precision(4, 4)
AUTOCAST = Precision(4, 2)  # float32 weights, matrix products in bfloat16 (torch.autocast)
BFLOAT16 = Precision(2, 2)  # bfloat16 weights, the float32 ones in the optimizer (ColossalAI)


@dataclass(frozen=True)
class Activations:
    """Bytes of one sample in one step.

    Attributes:
        saved: by part of the model, kept from the forward pass on.
        recomputed: of one block, made again in the backward pass (full checkpointing), or of its cheap parts (selective).
        workspace: gradients of activations while the widest layer, the MLP, goes backward.
    """

    saved: dict[str, int]
    recomputed: int
    workspace: int

    @property
    def peak(self) -> int:
        """All of it, which is there when the backward pass begins."""
        return sum(self.saved.values()) + self.recomputed + self.workspace


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
    first, other = (block_bytes(config, tokens, precision, trainable, first) for first in (True, False))
    whole, kept = sum(other.values()), kept_bytes(config, tokens, precision)
    saved = {"embedding": embedding_bytes(config, tokens, precision, trainable)}
    match checkpointing:
        case "none":
            saved |= {part: first[part] + (config.depth - 1) * other[part] for part in other}
            recomputed = 0
        case "selective":
            saved["products of blocks"] = config.depth * kept
            recomputed = whole - kept
        case "full":
            saved["inputs of blocks"] = config.depth * tokens.by_frame * config.hidden_size * precision.stream
            recomputed = whole
    saved["final layer"] = final_bytes(config, tokens, precision, trainable)
    return Activations(saved, recomputed, workspace_bytes(config, tokens, precision))


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

    casts = 3 if precision.stream != precision.product else 1  # autocast casts the input for each of q, k and v
    if tokens.frames == 1:
        temporal = trainable.temporal * 2 * product  # inputs of the value projection and of the last one
    else:
        temporal = trainable.temporal * casts * product + 4 * product + sums
        if tokens.by_place // tokens.frames * config.num_heads > MAX_HEADS:  # attended in parts, which are joined
            temporal += trainable.temporal * product
    temporal += rest * product

    text = trainable.text * product + 2 * product + sums
    keys_values = tokens.text * 2 * product

    mlp = stream + 2 * FLOAT + rest * (stream + product)
    hidden = int(channels * config.mlp_ratio) * precision.product
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
    channels = config.hidden_size
    stream, product = channels * precision.stream, channels * precision.product  # bytes a token
    sums = config.num_heads * FLOAT
    hidden = int(channels * config.mlp_ratio) * precision.product
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


def workspace_bytes(config: STDiTConfig, tokens: Tokens, precision: Precision) -> int:
    """Gradients of the residual stream, of the MLP's result and of its hidden layer."""
    wide = (1 + config.mlp_ratio) * config.hidden_size * precision.product
    return int(tokens.by_frame * (config.hidden_size * precision.stream + wide))


def cast_weight_bytes(config: STDiTConfig) -> int:
    """bfloat16 copies that autocast makes of one block's weights, kept until its backward pass."""
    square = config.hidden_size**2
    hidden = int(config.hidden_size * config.mlp_ratio)
    return 2 * (4 * square + 4 * square + 4 * square + 2 * config.hidden_size * hidden)
