"""The promoted model as MLflow serves it: a folder with weights, hashes and code that makes an mp4 of a prompt.

MLmodel, requirements.txt, …        what MLflow reads; load_model.py is what it runs
input_example.json                  a request
code/opensora/                      this package as it was, for a server that has not installed it
artifacts/contents.json             the checkpoint's name; sha256 of every file below and of what lies elsewhere
artifacts/step-N/                   the checkpoint, without what only resuming needs
artifacts/NAME/                     VAE and text encoder, where they are inside
"""

import base64
import json
import logging
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Hashable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import FLAVOR_NAME, PythonModel, PythonModelContext
from mlflow.types.schema import ColSpec, Schema

from opensora.clip_file import write_clip
from opensora.config import UserError
from opensora.generate import Pipeline, Sampling, choose_sampling, describe_clip, needs
from opensora.generation_memory import check_resident_memory
from opensora.models.text import TextEncoder
from opensora.step import UNWRITABLE, sync, write_json
from opensora.training.checkpoint import INFO, MODELS, SAMPLED, Checkpoint, describe_checkpoint
from opensora.weights import hash_file

CONTENTS, CODE = "contents.json", "load_model.py"
logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # it tells of every example that it checks
MAX_ROWS = 8  # of a request; they are made one after the other
MAX_STEPS = 1000
MAX_CHARACTERS = 10_000  # of a prompt; the text encoder reads some hundred tokens of it
# What the code inside imports, pinned to the versions that saved it; a test compares.
REQUIREMENTS = (
    *("av", "beautifulsoup4", "diffusers", "ftfy", "mlflow", "numpy", "opencv-python-headless", "pandas", "pillow"),
    *("protobuf", "psutil", "pydantic", "pyyaml", "rich", "safetensors", "sentencepiece", "torch"),
    "transformers",
)
SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec("string", "prompt"),
            ColSpec("long", "seed"),
            ColSpec("long", "num_steps", required=False),
            ColSpec("double", "guidance", required=False),
        ]
    ),
    outputs=Schema(
        [ColSpec("string", "mp4"), *(ColSpec("long", name) for name in ("frames", "fps", "height", "width"))]
    ),
)
EXAMPLE = {"prompt": "a red circle moving left", "seed": 0}
LOAD_MODEL = '''"""What MLflow runs to load this model; its code is in code/, its weights in artifacts/."""

from mlflow.models import set_model

from opensora.served_model import ServedModel

set_model(ServedModel())
'''


class ServedModelError(UserError):
    """A folder holds no served model, or its files are gone or changed."""


class ServedModel(PythonModel):
    """Prompts to mp4 files, as `opensora generate` makes them; everything is in memory from the start.

    Rows and requests are made one after the other, so a video needs what it would need alone and, on a CPU, is bit for
    bit the one that `opensora generate` makes.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Verify every file and load the text encoder, the model and the VAE.

        Raises:
            ServedModelError, CheckpointError: a file is missing or changed.
            MemoryShort: they do not fit into memory.
        """
        artifacts = Path(context.artifacts["contents"]).parent
        contents = json.loads((artifacts / CONTENTS).read_text())
        places = {name: artifacts / context.model_config[name] for name in MODELS}
        self.pipeline = Pipeline(_verify(artifacts, contents, places), **places)
        self.usual = choose_sampling(self.pipeline.checkpoint)
        check_resident_memory(needs(self.pipeline, self.usual, 1), self.pipeline.device)
        config = self.pipeline.checkpoint.config
        self.encoder = TextEncoder(places["text_encoder"], self.pipeline.device, getattr(torch, config.encode.dtype))
        _ = self.pipeline.model, self.pipeline.vae
        self._one_at_a_time = threading.Lock()  # the server runs every request in a thread of its own

    def predict(self, context: PythonModelContext, model_input: pandas.DataFrame) -> pandas.DataFrame:
        """A row with the columns of `SIGNATURE` for each row of the input.

        Raises:
            MlflowException: what is asked for cannot be made; the server answers 400 with the message.
        """
        rows = model_input.to_dict("records")
        if not 1 <= len(rows) <= MAX_ROWS:
            raise _refuse(f"{len(rows)} rows; a request takes 1 to {MAX_ROWS}, send the rest in another")
        asked = [self._read(number, row) for number, row in enumerate(rows)]
        with self._one_at_a_time:
            return pandas.DataFrame([self._make(*item) for item in asked])

    def _read(self, number: int, row: Mapping[Hashable, Any]) -> tuple[str, int, Sampling]:
        """Prompt, seed and sampling of one row; a column that is not there, or empty, takes what evaluation takes."""
        given = {str(name): value for name, value in row.items() if not pandas.isna(value)}
        prompt, sampling = given.get("prompt", ""), self.usual
        if not prompt.strip():
            raise _refuse(f"row {number}: the prompt is empty; say what the video shows")
        if len(prompt) > MAX_CHARACTERS:
            raise _refuse(f"row {number}: the prompt has {len(prompt)} characters, at most {MAX_CHARACTERS} are read")
        if "num_steps" in given:
            steps = int(given["num_steps"])
            least = 2 if sampling.sampler in ("iddpm", "ddim") else 1
            if not least <= steps <= MAX_STEPS:
                raise _refuse(f"row {number}: num_steps is {steps}, {sampling.sampler} takes {least} to {MAX_STEPS}")
            sampling = replace(sampling, steps=steps)
        if "guidance" in given:
            guidance = float(given["guidance"])
            if not 0 <= guidance < math.inf:
                raise _refuse(f"row {number}: guidance is {guidance}, expected a number of 0 or more (1 turns it off)")
            sampling = replace(sampling, guidance=guidance)
        return prompt, int(given["seed"]), sampling

    def _make(self, prompt: str, seed: int, sampling: Sampling) -> dict[str, object]:
        config = self.pipeline.checkpoint.config
        text = self.encoder.encode([prompt], config.model.model_max_length)
        frames = self.pipeline.sample(text, [seed], sampling)[0]
        note = json.dumps(describe_clip(self.pipeline, prompt, seed, sampling, config.evaluate.fps))
        with tempfile.TemporaryDirectory() as folder:
            clip = write_clip(Path(folder) / "clip.mp4", frames, config.evaluate.fps, note).read_bytes()
        count, height, width = frames.shape[:3]
        size = {"frames": count, "fps": config.evaluate.fps, "height": height, "width": width}
        return {"mp4": base64.b64encode(clip).decode(), **size}


def _refuse(reason: str) -> MlflowException:
    return MlflowException(reason, INVALID_PARAMETER_VALUE)


def save_served_model(folder: Path, checkpoint: Path, *, embed_models: bool = True) -> Path:
    """Write the model folder of a checkpoint; it appears whole or not at all.

    Files of the same file system are hard links, so that a version takes no second copy of the weights.

    Args:
        folder: where it shall be; must not exist.
        embed_models: the VAE and the text encoder go inside; if not, those that the checkpoint names by an absolute
            path stay where they are, and the path and the hashes are kept.

    Raises:
        CheckpointError: the checkpoint, or a model that it names, is missing or damaged.
        ServedModelError: the checkpoint makes pictures, or `folder` exists or cannot be written, as on a full disk.
    """
    described = describe_checkpoint(checkpoint)
    if described.train.frames < 2:
        raise ServedModelError(
            f"{checkpoint} makes single pictures; a served model makes mp4 files: name a video stage's"
        )
    if folder.exists():
        raise ServedModelError(f"{folder} exists already; remove it, or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        part.chmod(0o755)  # mkdtemp's is for its owner alone
        _write(part, described, embed_models)
        for path in [*part.rglob("*"), part]:
            sync(path)
        part.rename(folder)
        sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, MlflowException | OSError):
            reason = UNWRITABLE.get(getattr(error, "errno", None) or 0, str(error))
            raise ServedModelError(f"{folder} could not be written: {reason}; nothing of it is left") from error
        raise
    return folder


def _write(folder: Path, checkpoint: Checkpoint, embed_models: bool) -> None:
    artifacts = folder / "artifacts"
    places, files = {}, {}
    for name in MODELS:
        named, source = Path(checkpoint.info[name]), getattr(checkpoint, name).resolve()
        beside = not named.is_absolute() and ".." not in named.parts  # of the checkpoint: found again by the same name
        places[name] = str(named) if beside else name if embed_models else str(source)
        files[name] = {path.name: hash_file(path) for path in _files(source)}
    files["checkpoint"] = {INFO: hash_file(checkpoint.folder / INFO)}  # which holds the hashes of the others
    with tempfile.TemporaryDirectory() as work:
        code = Path(work) / CODE
        code.write_text(LOAD_MODEL)
        mlflow.pyfunc.save_model(
            folder,
            python_model=code,
            model_config=places,
            signature=SIGNATURE,
            input_example=pandas.DataFrame([EXAMPLE]),
            # A build's own suffix, as in 2.13.0+cpu, is on no index. Given here, MLflow does not run the model to see.
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )
    # MLflow would copy code and artifacts, too: these twice, through the folder for temporary files, and a full disk
    # would be said to be a file that cannot be copied.
    package = Path(__file__).parent
    for path in package.rglob("*.py"):
        _copy(path, folder / "code" / package.name / path.relative_to(package))
    for name, place in places.items():
        if not Path(place).is_absolute():
            for path in _files(getattr(checkpoint, name)):
                _link(path, artifacts / place / path.name)
    for path in _files(checkpoint.folder):
        if path.name in (INFO, *SAMPLED):
            _link(path, artifacts / checkpoint.folder.name / path.name)
    write_json(artifacts / CONTENTS, {"checkpoint": checkpoint.folder.name, "files": files})
    model = Model.load(str(folder))
    where = f"artifacts/{CONTENTS}"
    contents = {"contents": {"path": where, "uri": where}}
    model.flavors[FLAVOR_NAME] |= {"artifacts": contents, "code": "code", "model_code_path": CODE}
    model.model_size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    model.save(str(folder / MLMODEL_FILE_NAME))


def _files(folder: Path) -> list[Path]:
    """All but notes, which no model reads: one that is edited makes no other model of it; see `hash_folder`."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md")


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def verify_served_model(folder: Path) -> Checkpoint:
    """Read and hash all that a served model needs, as loading it would: its checkpoint, and VAE and text encoder also
    where they lie elsewhere. Returns the checkpoint.

    Raises:
        ServedModelError: it is no served model, or a file of the models is missing or changed.
        CheckpointError: one of the checkpoint's is.
    """
    artifacts = folder / "artifacts"
    try:
        contents = json.loads((artifacts / CONTENTS).read_text())
        config = Model.load(str(folder)).flavors[FLAVOR_NAME]["config"]
        places = {name: artifacts / config[name] for name in MODELS}
    except (MlflowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ServedModelError(f"{folder} is no served model: {error}; save one with `save_served_model`") from None
    return _verify(artifacts, contents, places)


def _verify(artifacts: Path, contents: Mapping[str, Any], places: Mapping[str, Path]) -> Checkpoint:
    checkpoint = artifacts / contents["checkpoint"]
    for name, place in {"checkpoint": checkpoint, **places}.items():
        _verify_files(place, contents["files"][name])
    return describe_checkpoint(checkpoint)


def _verify_files(folder: Path, hashes: Mapping[str, str]) -> None:
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise ServedModelError(
                f"{path} is missing; put back the file with sha256 {expected}, or save the model anew"
            )
        found = hash_file(path)
        if found != expected:
            raise ServedModelError(
                f"{path} is not the file this model was saved with: found sha256 {found}, expected {expected}; "
                "put that file back, or save the model anew"
            )


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint inside a served model, which `opensora generate --checkpoint` takes.

    Raises:
        ServedModelError: it is no served model.
    """
    try:
        contents = json.loads((folder / "artifacts" / CONTENTS).read_text())
    except (OSError, ValueError) as error:
        raise ServedModelError(f"{folder} is no served model: {error}; save one with `save_served_model`") from None
    return folder / "artifacts" / contents["checkpoint"]


def signature_of(folder: Path | None = None) -> str:
    """Columns and types of requests and answers, as one line of JSON: equal if a client can take one for the other.

    Args:
        folder: a served model; None for what one gets that is saved now.

    Raises:
        ServedModelError: it is no served model.
    """
    try:
        signature = Model.load(str(folder)).signature if folder else SIGNATURE
    except (MlflowException, OSError, ValueError) as error:
        raise ServedModelError(f"{folder} is no MLflow model: {error}") from None
    described = signature.to_dict() if signature else {}
    columns = {name: json.loads(value) for name, value in described.items() if value}
    return json.dumps(columns, sort_keys=True)
