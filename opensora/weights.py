"""Where pretrained weights come from: a local folder first, a hub only when allowed; loading is strict."""

import errno
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.config import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class WeightsError(UserError):
    """Weights are missing, damaged or do not fit; the message names the files or tensors.

    Args:
        reason: what is wrong.
        advice: what to do; the message ends with it.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(f"{reason}; {advice}" if advice else reason)
        self.reason = reason


# As Transformers and diffusers name the file that they read, or the index of its parts; the first that is there is it.
MODEL_FILES = tuple(
    f"{name}{suffix}{index}"
    for name, suffixes in (
        ("model", (".safetensors",)),
        ("pytorch_model", (".bin",)),
        ("diffusion_pytorch_model", (".safetensors", ".bin")),
    )
    for suffix in suffixes
    for index in ("", ".index.json")
)
MISSING = "put the model there, or allow downloads with --set offline=false and a hub id as the name"


class NoWeights(WeightsError):
    """There is no file or folder of that name."""


def find_weights(name: str, weights_dir: Path, offline: bool, files: Sequence[str] = ()) -> Path:
    """The folder or file of the model `name`: a path, a path below `weights_dir`, or a hub id when not offline.

    Args:
        files: what a folder must hold beside weights, alternatives as in `tokenizer.json|spiece.model`.

    Raises:
        NoWeights: it is nowhere; the message says where it was looked for.
        WeightsError: it is not whole (see `fault`).
    """
    place = next((place for place in (Path(name), weights_dir / name) if place.exists()), None)
    if place is None and not offline:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name))
    if place is None:
        places = " nor ".join(dict.fromkeys(map(str, (Path(name), weights_dir / name))))
        raise NoWeights(f"no weights {name!r}: neither {places} is a folder or file", MISSING)
    if reason := fault(place, files):
        raise WeightsError(reason, "copy or download it again")
    return place


def fault(place: Path, files: Sequence[str] = ()) -> str:
    """What keeps a file or folder from being weights, as far as a look of milliseconds tells; empty if nothing does.

    A part that an index names is missing, a file was cut short on its way here, or one of `files` is not there.
    """
    if place.is_file():
        return _cut_short(place)
    folder = place / "transformer" if (place / "transformer").is_dir() else place  # a whole model in diffusers' form
    for wanted in files:
        if not any((folder / name).is_file() for name in wanted.split("|")):
            return f"{folder} lacks {wanted.replace('|', ' or ')}"
    found = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    if found is None:
        return f"{folder} holds no weights: expected one of {', '.join(MODEL_FILES)}"
    parts = [found]
    if found.suffix == ".json":
        try:
            parts = [folder / name for name in sorted(set(json.loads(found.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{found} is damaged: it has no weight_map"
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        return f"{folder} lacks {', '.join(missing)}, which {found.name} names"
    return next(filter(None, map(_cut_short, parts)), "")


def _cut_short(file: Path) -> str:
    """Safetensors say how long they are, and a zip archive, as PyTorch writes, ends with its table of contents."""
    from zipfile import is_zipfile

    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        if file.suffix == ".safetensors":
            try:
                length = int.from_bytes(start, "little")
                header = json.loads(handle.read(length) if length < size else b"")
                ends = [value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"]
            except (ValueError, KeyError, TypeError, AttributeError):
                return f"{file} is damaged, or cut short"
            whole = 8 + length + max(ends, default=0)
            return f"{file} is cut short: {size} of {whole} bytes" if size < whole else ""
    if not size:
        return f"{file} is empty"
    return f"{file} is cut short" if start.startswith(b"PK\x03\x04") and not is_zipfile(file) else ""


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Tensors of a .safetensors file, or of a .pth/.pt/.bin file read without running any code in it.

    A file `<name>.sha256` beside it is checked.

    Raises:
        WeightsError: no such file, another hash than recorded, damaged, or not a mapping of tensors.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise WeightsError(f"no weights file at {path}")
    side = path.with_name(path.name + ".sha256")
    if side.is_file():
        expected, found = side.read_text().split()[0], hash_file(path)
        if expected != found:
            raise WeightsError(f"{path} has sha256 {found}, expected {expected}; download it again")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except Exception as error:  # a damaged pickle can fail in any way
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        match = re.search(r"GLOBAL ([\w.]+)", str(error))  # PyTorch's whole text advises to trust the file
        reason = f" ({match[1]})" if match else ""
        raise WeightsError(f"{path} is damaged, or holds more than tensors{reason}; nothing in it was run") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected a mapping of tensors")
    return content


def _read_pickle(path: Path) -> object:
    """A PyTorch file, tensors alone, not copied into memory where the file's form allows it."""
    from zipfile import is_zipfile

    import torch

    # Only the form that PyTorch has written since 1.6, a zip archive, can be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a file; all of them are names."""

    loaded: list[str]
    initial: list[str]  # of the model, not in the file: kept their initial values
    ignored: list[str]  # of the file, not taken


def load_strict(
    module: "nn.Module",
    state: "Mapping[str, Tensor]",
    allow_missing: Sequence[str] = (),
    *,
    computed: Sequence[str] = (),
) -> LoadReport:
    """Load `state` into `module`; everything must fit.

    Args:
        allow_missing: patterns (as in `blocks.*.attn_temp.*`) of names that may be missing, unexpected or mis-shaped.
        computed: names of buffers that the module computes itself; they are neither needed nor taken.

    Raises:
        WeightsError: names every tensor that is missing, unexpected or mis-shaped.
    """
    own = {name: value for name, value in module.state_dict().items() if name not in computed}
    state = {name: value for name, value in state.items() if name not in computed}
    fitting = {name for name in own if name in state and state[name].shape == own[name].shape}
    problems = {name: f"missing {name}" for name in own if name not in state}
    problems |= {name: f"unexpected {name}" for name in state if name not in own}
    problems |= {
        name: f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and name not in fitting
    }
    wrong = [
        text for name, text in problems.items() if not any(fnmatchcase(name, pattern) for pattern in allow_missing)
    ]
    if wrong:
        raise WeightsError(f"the weights do not fit: {'; '.join(wrong)}")
    module.load_state_dict({name: state[name] for name in fitting}, strict=False, assign=_is_meta(module))
    return LoadReport(
        loaded=[name for name in own if name in fitting],
        initial=[name for name in own if name not in fitting],
        ignored=[name for name in state if name not in fitting],
    )


def load_pretrained(
    kind: "type[PreTrainedModel]", folder: Path, dtype: "torch.dtype", optional: Sequence[str] = ()
) -> "PreTrainedModel":
    """A model of Transformers from the files of a local folder, for inference.

    Args:
        kind: its class, or an `AutoModel`.
        optional: patterns of names that may be missing, since nobody asks for what they make.

    Raises:
        WeightsError: a file is missing or damaged, or a tensor is missing or of another shape, where Transformers would
            go on with random values.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of what a folder holds beside this model
    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # Transformers raises anything for files that are missing, damaged or do not fit
        raise WeightsError(f"the model in {folder} cannot be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = [name for name in sorted(report["missing_keys"]) if not any(fnmatchcase(name, p) for p in optional)]
    wrong = [f"missing {name}" for name in missing]
    mismatched = sorted(report["mismatched_keys"])
    wrong += [f"{name} is {list(found)}, expected {list(own)}" for name, found, own in mismatched]
    if wrong:
        raise WeightsError(f"the weights in {folder} do not fit {type(model).__name__}: {'; '.join(wrong)}")
    return model.eval()


def first_line(error: Exception) -> str:
    """Kind and first line of an error of a library, whose whole text can be a page."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _is_meta(module: "nn.Module") -> bool:
    """Whether the module was built without memory: then it takes the tensors over instead of copying them."""
    return any(parameter.is_meta for parameter in module.parameters())


def hash_file(path: Path) -> str:
    """sha256 of a file's content."""
    digest = sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_model(path: Path) -> str:
    """sha256 of a file, or of all weights (safetensors, bin) and JSON files right in a folder, with their names."""
    if path.is_file():
        return hash_file(path)
    digest = sha256()
    for part in sorted(path.iterdir()):
        if part.suffix in (".safetensors", ".bin", ".json"):
            digest.update(f"{part.name}\0{hash_file(part)}\n".encode())
    return digest.hexdigest()
