"""The commands `weights inspect` and `weights import`: a released file is looked at, or becomes a checkpoint."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora.config import TRAIN_STEPS, Config, ConfigError, build_config, merge
from opensora.models.checkpoints import Released, guess_model, guess_size, load_released, read_released
from opensora.weights import LoadReport, hash_file

VAE_SCALE = 8  # pixels a latent column of Stable Diffusion's VAE, which all released models use
RELEASED_SAMPLING = {"steps": 100, "guidance": 7.0}  # Open-Sora 1.0


def inspect(path: Path) -> str:
    """What a weight file or folder is and what importing it would do, as text.

    Raises:
        WeightsError: see `read_released`.
    """
    import torch

    from opensora.models.dit import DiT
    from opensora.models.stdit import STDiT, STDiTConfig

    released = read_released(path)
    model, size = guess_model(released), guess_size(released)
    heads = model.get("num_heads")
    rows = {
        "file": f"{path}" + (f", sha256 {hash_file(path)}" if path.is_file() else ""),
        "model": released.title + (f', under the key "{released.wrapper}"' if released.wrapper else ""),
        "shape": ", ".join(f"{name} {value}" for name, value in model.items())
        + ("" if heads else "; num_heads is not told: import with --set model.num_heads=N"),
        "tensors": f"{len(released.tensors)}, {released.parameters:,} parameters, {_types(released)}",
        "positions": _describe_size(size, model) + "; tables are computed anew for any size",
    }
    with torch.device("meta"):
        config = STDiTConfig(input_size=(1, 2, 2), **{**model, "num_heads": heads or 1})  # type: ignore[arg-type]
        network = DiT(config, _classes(released)) if released.family == "dit" else STDiT(config)
    problems = _problems(network, released)
    rows["import"] = problems or f"all {len(released.tensors)} tensors have their place"
    missing = [name for name in network.state_dict() if name not in released.tensors and "attn_temp" in name]
    if missing:
        rows["new"] = f"{len(missing)} tensors of temporal attention, which starts as nothing and is learnt from videos"
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items())


def import_weights(
    path: Path, out: Path, base: Config, overrides: Mapping[str, Any], allow_missing: Sequence[str] = ()
) -> tuple[Path, LoadReport, Config, str]:
    """Write a released file as a checkpoint below `out`; returns its folder, what was mapped, its config and stage.

    Args:
        base: the profile that says everything the file does not.
        overrides: values that win over what the file tells, as of `--set`.
        allow_missing: patterns of tensors that need not fit; see `load_released`.

    Raises:
        WeightsError: the file is no released STDiT or PixArt, or does not fit.
        ConfigError: the number of heads is not known, or a value does not fit.
    """
    import torch

    from opensora.models.stdit import STDiT
    from opensora.training.checkpoint import save_checkpoint, stdit_config

    released = read_released(path)
    if released.family == "dit":
        raise ConfigError(
            f"{path} is a {released.title}: it has no text attention, so no STDiT can hold it and `generate` cannot "
            "sample it; load it with opensora.models.checkpoints.load_released into an opensora.models.dit.DiT"
        )
    config, stage = released_config(released, base, overrides)
    torch.manual_seed(0)
    model = STDiT(stdit_config(config, stage, VAE_SCALE))
    report = load_released(model, released, allow_missing)
    weights = Path(config.weights_dir).resolve()
    # Relative names are looked for in the folders above the checkpoint: then the whole folder can be moved.
    prefix = "" if out.resolve().is_relative_to(weights) else f"{weights}/"
    folder = save_checkpoint(
        out,
        step=0,
        model=model.state_dict(),
        info={
            "config": config.model_dump(mode="json"),
            "stage": stage,
            "vae": prefix + config.encode.vae,
            "text_encoder": prefix + config.encode.text_encoder,
            "vae_scale": VAE_SCALE,
            "imported": {"file": path.name, "sha256": hash_file(path) if path.is_file() else "", "of": released.title},
        },
    )
    return folder, report, config, stage


def released_config(released: Released, base: Config, overrides: Mapping[str, Any]) -> tuple[Config, str]:
    """The configuration of a released model and the name of its stage: the file's own values, then `overrides`.

    Raises:
        ConfigError: the number of heads or the size is not known, or a value does not fit.
    """
    guess, size = guess_model(released), guess_size(released)
    patch = guess["patch_size"]
    assert isinstance(patch, list)
    frames = size.get("frames", 1)
    stage = TRAIN_STEPS[0] if frames == 1 else TRAIN_STEPS[1]
    train: dict[str, Any] = {
        "objective": "iddpm",
        "frames": frames,
        **{name: size[name] for name in ("space_scale", "time_scale") if name in size},
    }
    if "rows" in size:
        train |= {"height": size["rows"] * patch[1] * VAE_SCALE, "width": size["columns"] * patch[2] * VAE_SCALE}
    values = base.model_dump(mode="json")
    found = {"model": guess, stage: train, "evaluate": {**RELEASED_SAMPLING, "sampler": "iddpm", "guidance_mode": "v1"}}
    values = merge(merge(values, found), dict(overrides))
    if "num_heads" not in merge(guess, overrides.get("model")):
        raise ConfigError(
            f"{released.path} has a width of {guess['hidden_size']}, whose number of heads is not published; "
            "say it with --set model.num_heads=N"
        )
    values["encode"]["max_tokens"] = values["model"]["model_max_length"]
    values["encode"]["sizes"] = sorted({*map(tuple, values["encode"]["sizes"]), _pixels(values[stage])})
    return build_config(values), stage


def summarise(names: Sequence[str]) -> str:
    """Names of tensors, those of all blocks as one: `blocks.*.attn.qkv.weight (28)`."""
    counts = Counter(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names)
    return ", ".join(name + (f" ({count})" if count > 1 else "") for name, count in counts.items())


def _pixels(train: Mapping[str, int]) -> tuple[int, int]:
    return train["height"], train["width"]


def _classes(released: Released) -> int:
    """Classes of a class-conditional DiT, or 0; the table has one row more, for no class."""
    table = released.tensors.get("y_embedder.embedding_table.weight")
    return 0 if table is None else table.shape[0] - 1


def _types(released: Released) -> str:
    return " and ".join(sorted({str(value.dtype).removeprefix("torch.") for value in released.tensors.values()}))


def _problems(network: Any, released: Released) -> str:
    from opensora.weights import WeightsError

    try:
        load_released(network, released)
    except WeightsError as error:
        return str(error)
    return ""


def _describe_size(size: Mapping[str, int | float], model: Mapping[str, object]) -> str:
    patch = model["patch_size"]
    assert isinstance(patch, list)
    parts = []
    if "rows" in size:
        pixels = f"{size['rows'] * patch[1] * VAE_SCALE}×{size['columns'] * patch[2] * VAE_SCALE}"
        parts.append(f"{size['rows']}×{size['columns']} patches, {pixels} pixels with an {VAE_SCALE}× VAE")
    if "frames" in size:
        parts.append(f"{size['frames']} frame{'s' if size['frames'] != 1 else ''}")
    parts += [f"{name} {size[name]:.4g}" for name in ("space_scale", "time_scale") if name in size]
    return ", ".join(parts) or "none in the file"
