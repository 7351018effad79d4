"""Where pretrained weights come from: a local folder first, a hub only when allowed; loading is strict."""

from collections.abc import Mapping
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.config import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


class WeightsError(UserError):
    """Weights are missing, damaged or do not fit; the message names the files or tensors."""


def find_weights(name: str, weights_dir: Path, offline: bool) -> Path:
    """The folder of the model `name`: a path, a folder below `weights_dir`, or a hub id when not offline.

    Raises:
        WeightsError: it is nowhere; the message says where it was looked for.
    """
    for folder in (Path(name), weights_dir / name):
        if folder.is_dir():
            return folder
    if offline:
        raise WeightsError(
            f"no weights {name!r}: neither {Path(name)} nor {weights_dir / name} is a folder; put the model there, "
            "or allow downloads with --set offline=false and a hub id as the name"
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name))


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Tensors of a .safetensors file, or of a .pth/.pt/.bin file read without running any code in it.

    A file `<name>.sha256` beside it is checked.

    Raises:
        WeightsError: no such file, another hash than recorded, damaged, or not a mapping of tensors.
    """
    from pickle import UnpicklingError

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise WeightsError(f"no weights file at {path}")
    side = path.with_name(path.name + ".sha256")
    if side.is_file():
        expected, found = side.read_text().split()[0], sha256(path.read_bytes()).hexdigest()
        if expected != found:
            raise WeightsError(f"{path} has sha256 {found}, expected {expected}; download it again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{path} is damaged, or holds more than tensors: {reason}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected a mapping of tensors")
    return content


def load_strict(module: "nn.Module", state: "Mapping[str, Tensor]", allow_missing: tuple[str, ...] = ()) -> None:
    """Load `state` into `module`; everything must fit.

    Args:
        allow_missing: patterns (as in `blocks.*.attn_temp.*`) of names that the state may lack.

    Raises:
        WeightsError: names every tensor that is missing, unexpected or mis-shaped.
    """
    own = module.state_dict()
    missing = [
        name for name in own if name not in state and not any(fnmatch(name, pattern) for pattern in allow_missing)
    ]
    wrong = [f"missing {name}" for name in missing]
    wrong += [f"unexpected {name}" for name in state if name not in own]
    wrong += [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        raise WeightsError(f"the weights do not fit: {'; '.join(wrong)}")
    module.load_state_dict({**own, **state})
