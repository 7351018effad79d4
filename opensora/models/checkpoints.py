"""Released weights: of which model a file is, and how its tensors become ours.

Read are PixArt-α (its own `.pth` and diffusers' folder), Open-Sora 1.0 (plain or wrapped in `ema`), DiT and Latte.
Position tables are never taken: the model computes those of its own size.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from opensora.models.embeddings import spatial_positions, temporal_positions
from opensora.weights import LoadReport, WeightsError, load_strict, load_tensors

Family = Literal["stdit", "pixart", "pixart-diffusers", "dit"]
TITLES: dict[Family, str] = {
    "stdit": "STDiT of Open-Sora 1.0",
    "pixart": "PixArt-α",
    "pixart-diffusers": "PixArt-α in diffusers' form",
    "dit": "DiT or Latte",
}
WRAPPERS = ("state_dict", "ema", "model")  # what released files wrap their tensors in; the average before the raw one
POSITIONS = ("pos_embed", "pos_embed_temporal", "pos_embed_spatial", "temp_embed")
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published widths; tensors do not tell
SPACE_SCALES = (0.5, 1.0, 2.0)  # PixArt-α and Open-Sora at 256, 512 and 1024 pixels
TIME_SCALES = (1.0, 2 / 3)  # Open-Sora with 16 and 64 frames
DIFFUSERS_FILE = "diffusion_pytorch_model"
# What a PixArt file cannot hold: temporal attention, whose output projection starts at zero.
NEW_IN_VIDEO = ("blocks.*.attn_temp.*",)

# diffusers' names of PixArtTransformer2DModel -> ours; several names on the left are stacked.
DIFFUSERS_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("pos_embed.proj",), "x_embedder.proj"),
    (("adaln_single.emb.timestep_embedder.linear_1",), "t_embedder.mlp.0"),
    (("adaln_single.emb.timestep_embedder.linear_2",), "t_embedder.mlp.2"),
    (("adaln_single.linear",), "t_block.1"),
    (("caption_projection.linear_1",), "y_embedder.y_proj.fc1"),
    (("caption_projection.linear_2",), "y_embedder.y_proj.fc2"),
    (("proj_out",), "final_layer.linear"),
)
DIFFUSERS_BLOCK_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.qkv"),
    (("attn1.to_out.0",), "attn.proj"),
    (("attn2.to_q",), "cross_attn.q_linear"),
    (("attn2.to_k", "attn2.to_v"), "cross_attn.kv_linear"),
    (("attn2.to_out.0",), "cross_attn.proj"),
    (("ff.net.0.proj",), "mlp.fc1"),
    (("ff.net.2",), "mlp.fc2"),
)


@dataclass(frozen=True)
class Released:
    """The content of a released file under our names."""

    path: Path
    family: Family
    wrapper: str  # the key that the tensors lay under, or ""
    tensors: dict[str, Tensor]  # without position tables
    positions: dict[str, Tensor]
    settings: dict[str, object] = field(default_factory=dict)  # diffusers' config.json

    @property
    def title(self) -> str:
        """The family in words."""
        return TITLES[self.family]

    @property
    def parameters(self) -> int:
        """Number of values, the null text not counted, which is a constant."""
        return sum(value.numel() for name, value in self.tensors.items() if name != "y_embedder.y_embedding")


def read_released(path: Path) -> Released:
    """Read a weight file, or a folder in diffusers' form (the model's own, or one with `transformer/` in it).

    Raises:
        WeightsError: damaged, holds more than tensors, or of no known model.
    """
    settings: dict[str, object] = {}
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        content = _read_folder(folder)
        if (folder / "config.json").is_file():
            settings = json.loads((folder / "config.json").read_text())
    else:
        content = dict(load_tensors(path))
        if path.name.startswith(DIFFUSERS_FILE) and (path.parent / "config.json").is_file():
            settings = json.loads((path.parent / "config.json").read_text())
    wrapper, content = _unwrap(content)
    tensors = {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    family = _family(path, tensors)
    if family == "pixart-diffusers":
        tensors = _from_diffusers(tensors)
    patch = tensors.get("x_embedder.proj.weight")
    if patch is not None and patch.ndim == 4:  # an image model's patch: one frame deep
        tensors["x_embedder.proj.weight"] = patch.unsqueeze(2)
    positions = {name: tensors.pop(name) for name in POSITIONS if name in tensors}
    return Released(path, family, wrapper, tensors, positions, settings)


def guess_model(released: Released) -> dict[str, object]:
    """The fields of the model's configuration that the tensors tell; `num_heads` only for published widths.

    Raises:
        WeightsError: a tensor that tells them is missing.
    """
    tensors = released.tensors
    try:
        patch, final = tensors["x_embedder.proj.weight"], tensors["final_layer.linear.weight"]
        hidden, channels = patch.shape[:2]
        blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
        guess: dict[str, object] = {
            "hidden_size": hidden,
            "depth": max(blocks) + 1,
            "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
            "patch_size": list(patch.shape[2:]),
            "in_channels": channels,
            "pred_sigma": final.shape[0] == 2 * channels * math.prod(patch.shape[2:]),
        }
        if "y_embedder.y_proj.fc1.weight" in tensors:
            guess["caption_channels"] = tensors["y_embedder.y_proj.fc1.weight"].shape[1]
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{released.path} lacks {error}, which every {released.title} has; is it whole?") from None
    if "y_embedder.y_embedding" in tensors:
        guess["model_max_length"] = tensors["y_embedder.y_embedding"].shape[0]
    heads = released.settings.get("num_attention_heads", HEADS.get(hidden))
    return guess | ({"num_heads": heads} if heads else {})


def guess_size(released: Released) -> dict[str, int | float]:
    """What the stored position tables tell: `rows` and `columns` of patches, `frames`, `space_scale`, `time_scale`.

    Absent keys are not told by the file. A square grid is assumed, and the scales are those whose table is the
    stored one.
    """
    guess: dict[str, int | float] = {}
    space = released.positions.get("pos_embed", released.positions.get("pos_embed_spatial"))
    if space is not None and space.ndim == 3 and math.isqrt(space.shape[1]) ** 2 == space.shape[1]:
        side = math.isqrt(space.shape[1])
        guess |= {"rows": side, "columns": side}
        same = [s for s in SPACE_SCALES if _same(space, spatial_positions(side, side, space.shape[2], s))]
        guess |= {"space_scale": same[0]} if len(same) == 1 else {}
    elif isinstance(size := released.settings.get("sample_size"), int):
        patch = released.settings.get("patch_size", 2)
        assert isinstance(patch, int)
        stretch = released.settings.get("interpolation_scale") or max(size // 64, 1)
        assert isinstance(stretch, int | float)
        guess |= {"rows": size // patch, "columns": size // patch, "space_scale": float(stretch)}
    time = released.positions.get("pos_embed_temporal", released.positions.get("temp_embed"))
    if time is not None and time.ndim == 3:
        guess["frames"] = time.shape[1]
        same = [s for s in TIME_SCALES if _same(time, temporal_positions(time.shape[1], time.shape[2], s))]
        guess |= {"time_scale": same[0]} if len(same) == 1 else {}  # one frame fits all scales
    elif released.family in ("pixart", "pixart-diffusers"):
        guess["frames"] = 1
    return guess


def load_released(model: nn.Module, released: Released, allow_missing: Sequence[str] = ()) -> LoadReport:
    """Load released weights into an STDiT (or DiT) of their shape.

    Args:
        allow_missing: patterns of names that may be missing, unexpected or mis-shaped. What is missing then keeps its
            initial values. PixArt's lack of temporal attention is always allowed: with its output projection at
            zero the model equals PixArt frame by frame.

    Raises:
        WeightsError: names every tensor that does not fit.
    """
    known = NEW_IN_VIDEO if released.family in ("pixart", "pixart-diffusers") else ()
    try:
        return load_strict(model, released.tensors, (*known, *allow_missing), computed=POSITIONS)
    except WeightsError as error:
        hint = ""
        if released.family == "pixart-diffusers" and "missing y_embedder.y_embedding" in str(error):
            hint = (
                "; diffusers' form does not hold the null text that guidance needs: take PixArt's own .pth, or allow "
                "y_embedder.y_embedding and train with caption drop before you sample with guidance"
            )
        raise WeightsError(f"{released.path}: {error}{hint}") from None


def _read_folder(folder: Path) -> dict[str, object]:
    """All tensors of a diffusers folder: one file, or the shards that its index names."""
    for suffix in (".safetensors", ".bin"):
        index = folder / f"{DIFFUSERS_FILE}{suffix}.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {key: value for name in names for key, value in load_tensors(folder / name).items()}
        if (folder / f"{DIFFUSERS_FILE}{suffix}").is_file():
            return dict(load_tensors(folder / f"{DIFFUSERS_FILE}{suffix}"))
    raise WeightsError(f"no weights in {folder}: expected {DIFFUSERS_FILE}.safetensors or .bin, or name a .pth file")


def _unwrap(content: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """The key under which the tensors lie, or "", and the tensors."""
    if any(isinstance(value, Tensor) for value in content.values()):
        return "", dict(content)
    for name in WRAPPERS:
        inner = content.get(name)
        if isinstance(inner, Mapping) and inner:
            before, inner = _unwrap(inner)
            return f"{name}.{before}".rstrip("."), inner
    return "", dict(content)


def _family(path: Path, tensors: Mapping[str, Tensor]) -> Family:
    for name, family in (
        ("adaln_single.linear.weight", "pixart-diffusers"),
        ("blocks.0.attn_temp.qkv.weight", "stdit"),
        ("blocks.0.adaLN_modulation.1.weight", "dit"),
        ("blocks.0.cross_attn.kv_linear.weight", "pixart"),
    ):
        if name in tensors:
            return family  # type: ignore[return-value]
    some = ", ".join(list(tensors)[:3]) or "nothing"
    raise WeightsError(
        f"{path} is of no model that is known here ({'; '.join(TITLES.values())}); it holds {some}"
        + (", …" if len(tensors) > 3 else "")
    )


def _from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names -> ours; names that have no place in ours are kept, and fail when loaded."""
    left, ours = dict(tensors), {}
    left.pop("pos_embed.pos_embed", None)
    if "scale_shift_table" in left:
        ours["final_layer.scale_shift_table"] = left.pop("scale_shift_table")
    depth = 1 + max((int(m[1]) for n in tensors if (m := re.match(r"transformer_blocks\.(\d+)\.", n))), default=-1)
    rows = list(DIFFUSERS_NAMES)
    for index in range(depth):
        theirs, block = f"transformer_blocks.{index}", f"blocks.{index}"
        if f"{theirs}.scale_shift_table" in left:
            ours[f"{block}.scale_shift_table"] = left.pop(f"{theirs}.scale_shift_table")
        rows += [(tuple(f"{theirs}.{n}" for n in names), f"{block}.{own}") for names, own in DIFFUSERS_BLOCK_NAMES]
    for names, own in rows:
        for part in ("weight", "bias"):
            if all(f"{name}.{part}" in left for name in names):
                ours[f"{own}.{part}"] = torch.cat([left.pop(f"{name}.{part}") for name in names])
    return ours | left


def _same(stored: Tensor, computed: Tensor) -> bool:
    """Equal up to the rounding of half precision."""
    return stored.shape == computed.shape and bool((stored.float() - computed).abs().max() < 1e-2)
