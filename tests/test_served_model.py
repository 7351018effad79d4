"""The model as MLflow loads and serves it: the videos of `opensora generate`, clear refusals, no unseen change."""

import ast
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas
import pytest
from mlflow.exceptions import MlflowException

from opensora import generation_memory
from opensora.data.video import read_frames
from opensora.generate import Pipeline, choose_sampling, generate
from opensora.generation_memory import MemoryShort
from opensora.served_model import (
    REQUIREMENTS,
    ServedModelError,
    checkpoint_of,
    save_served_model,
    signature_of,
    verify_served_model,
)
from opensora.tracking.registry import CHAMPION
from opensora.tracking.store import connect
from opensora.tracking.version_files import model_version_path, register_folder
from opensora.training.checkpoint import CheckpointError, describe_checkpoint, read_info
from opensora.weights import hash_file
from tests.conftest import ROOT
from tests.small_disk import small_disk

MODEL = "opensora-smoke"
PROMPT = "a red circle moving left"
BIN = Path(sys.executable).parent
LIMIT_S = 120
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A served model; not to be changed."""
    return save_served_model(tmp_path_factory.mktemp("served") / "model", checkpoint)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What `opensora generate` makes of PROMPT with seed 3, as evaluated and with settings of its own."""
    pipeline, out = Pipeline.load(checkpoint), tmp_path_factory.mktemp("expected")
    own = choose_sampling(pipeline.checkpoint, steps=3, guidance=2.0)
    how = {"usual": choose_sampling(pipeline.checkpoint), "own": own}
    fps = pipeline.checkpoint.config.evaluate.fps
    return {
        name: next(iter(generate(pipeline, [PROMPT], [3], out, sampling, fps=fps))).read_bytes()
        for name, sampling in how.items()
    }


@pytest.fixture
def outside(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that names its VAE and text encoder by absolute paths, in a folder of weights."""
    base = checkpoint.parents[2]
    shutil.copytree(base / "demo_models", tmp_path / "weights")
    return edit_checkpoint(
        checkpoint, tmp_path, vae=str(tmp_path / "weights" / "vae"), text_encoder=str(tmp_path / "weights" / "t5")
    )


def edit_checkpoint(checkpoint: Path, place: Path, **info: object) -> Path:
    folder = place / checkpoint.name
    shutil.copytree(checkpoint, folder)
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | info))
    return folder


def predict(model: Any, *rows: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(text) for text in model.predict(pandas.DataFrame(list(rows)))["mp4"]]


def load(folder: Path, **config: str) -> Any:
    return mlflow.pyfunc.load_model(str(folder), model_config=config or None)


@contextmanager
def running(log: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen]:
    """`mlflow ARGUMENTS` in a process group of its own, killed at the end."""
    command = [sys.executable, "-m", "mlflow", *arguments]
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "TMPDIR": str(log.parent)} | environment
    with log.open("w") as handle:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=handle, stderr=handle, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def promote(root: Path, folder: Path, tags: dict[str, str]) -> None:
    version = register_folder(root, "smoke", MODEL, folder, tags)
    connect(root).set_registered_model_alias(MODEL, CHAMPION, version)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_up(process: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if direct.open(url, timeout=5).status == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no answer from {url}: {log.read_text()[-3000:]}")


def post(url: str, body: object, kind: str = "application/json") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": kind})
    try:
        with direct.open(request, timeout=LIMIT_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_videos_are_those_of_generate_bit_for_bit(served: Path, expected: dict[str, bytes]) -> None:
    model = load(served)
    own = {"prompt": PROMPT, "seed": 3, "num_steps": 3, "guidance": 2.0}
    assert predict(model, {"prompt": PROMPT, "seed": 3}) == [expected["usual"]]
    other, same = predict(model, own | {"seed": 4}, own)  # neither depends on the row beside it
    assert same == expected["own"]
    assert other not in expected.values()
    frames = read_frames(same)
    row = model.predict(pandas.DataFrame([own])).iloc[0]
    assert (row["frames"], row["height"], row["width"]) == frames.shape[:3] == (4, 32, 32)
    assert row["fps"] == 8


def test_the_folder_holds_what_sampling_reads_once(served: Path, checkpoint: Path) -> None:
    inside = checkpoint_of(served)
    assert sorted(path.name for path in inside.iterdir()) == ["checkpoint.json", "ema.safetensors", "model.safetensors"]
    assert (inside / "model.safetensors").stat().st_ino == (checkpoint / "model.safetensors").stat().st_ino
    assert describe_checkpoint(inside).sha256 == describe_checkpoint(checkpoint).sha256
    assert describe_checkpoint(inside).text_encoder.is_relative_to(served)  # `opensora generate` finds it, too
    assert "+" not in (served / "requirements.txt").read_text()
    assert str(served.parent) not in (served / "MLmodel").read_text()  # it can be moved
    assert list(served.parent.iterdir()) == [served]


def test_what_the_code_inside_imports_is_required() -> None:
    brought_along = {"triton", "tokenizers", "huggingface_hub"}  # by torch and Transformers
    distributions = packages_distributions()
    names = third_party("opensora.served_model", set()) - brought_along
    needed = {"mlflow" if name == "mlflow" else distributions[name][0].lower() for name in names}
    assert needed <= set(REQUIREMENTS)
    assert set(REQUIREMENTS) - needed == {"protobuf", "sentencepiece"}  # Transformers reads T5's tokenizer with them


def third_party(module: str, seen: set[str]) -> set[str]:
    """Top-level names of other projects that a module of ours imports, with those that it imports."""
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    if module in seen or not path.is_file():
        return set()
    seen.add(module)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    own = {name for name in names if name.startswith("opensora.")}
    found = {name.split(".")[0] for name in names - own} - sys.stdlib_module_names - {"opensora"}
    return found.union(*(third_party(name, seen) for name in own))


@pytest.mark.parametrize(
    "file",
    ["step-00000001/checkpoint.json", "step-00000001/ema.safetensors", "demo_models/vae/config.json",
     "demo_models/t5/model.safetensors"],
)  # fmt: skip
def test_a_changed_file_is_refused(served: Path, tmp_path: Path, file: str) -> None:
    copy = shutil.copytree(served, tmp_path / "model")
    path = copy / "artifacts" / file
    before = hash_file(path)
    damage(path)
    with pytest.raises((ServedModelError, CheckpointError)) as caught:
        load(copy)
    assert path.name in str(caught.value)
    assert f"expected {before}" in str(caught.value)
    assert f"{hash_file(path)}" in str(caught.value)
    path.unlink()
    with pytest.raises((ServedModelError, CheckpointError), match=rf"{path.name} is missing|no {path.name} there"):
        load(copy)


def damage(path: Path) -> None:
    """Change the last bytes; to a file that is still a JSON file where it is one."""
    content = path.read_bytes()
    path.unlink()  # and no other link of the file
    path.write_bytes(content + b" " if path.suffix == ".json" else content[:-4] + b"hurt")


def test_models_outside_are_kept_by_path_and_hash(
    outside: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights"
    note = weights / "t5" / "README.md"
    note.write_text("a note")
    folder = save_served_model(tmp_path / "by-reference", outside, embed_models=False)
    note.write_text("edited, which changes no model")
    whole = save_served_model(tmp_path / "whole", outside)
    assert not list(folder.rglob("*.model")) + [
        path for path in folder.rglob("*.safetensors") if "step" not in str(path)
    ]
    assert len(predict(load(folder), {"prompt": PROMPT, "seed": 3})) == 1
    assert verify_served_model(folder).sha256 == verify_served_model(whole).sha256 == read_info(outside)["sha256"]
    moved = weights.rename(tmp_path / "elsewhere")
    with pytest.raises(ServedModelError, match=r"weights/vae/config\.json is missing"):
        verify_served_model(folder)
    verify_served_model(whole)
    with pytest.raises(ServedModelError, match=r"weights/vae/config\.json is missing"):
        load(folder)
    places = {"vae": str(moved / "vae"), "text_encoder": str(moved / "t5")}
    assert len(predict(load(folder, **places), {"prompt": PROMPT, "seed": 3})) == 1
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", json.dumps(places))  # how a server is told
    assert len(predict(load(folder), {"prompt": PROMPT, "seed": 3})) == 1
    damage(moved / "t5" / "model.safetensors")
    with pytest.raises(ServedModelError, match=r"elsewhere/t5/model\.safetensors is not the file .* expected"):
        load(folder)
    monkeypatch.delenv("MLFLOW_PYFUNC_INFERENCE_CONFIG")
    video = read_frames(predict(load(whole), {"prompt": PROMPT, "seed": 3})[0])  # its own links are whole
    assert np.array_equal(video, read_frames(expected["usual"]))


def test_what_cannot_be_served_leaves_nothing(checkpoint: Path, outside: Path, served: Path, tmp_path: Path) -> None:
    place = tmp_path / "models" / "model"
    config = json.loads((checkpoint / "checkpoint.json").read_text())["config"]
    picture = edit_checkpoint(
        checkpoint, tmp_path / "one", config=config | {"train_video": config["train_video"] | {"frames": 1}}
    )
    with pytest.raises(ServedModelError, match="makes single pictures"):
        save_served_model(place, picture)
    (outside.parent / "weights" / "vae" / "config.json").unlink()
    shutil.rmtree(outside.parent / "weights" / "t5")
    with pytest.raises(CheckpointError, match="weights/t5"):
        save_served_model(place, outside)
    damage(outside / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has another sha256 .* found .*, expected"):
        save_served_model(place, outside)
    assert not list(place.parent.iterdir()) if place.parent.exists() else True
    with pytest.raises(ServedModelError, match="exists already"):
        save_served_model(served, checkpoint)
    with pytest.raises(ServedModelError, match="is no served model"):
        checkpoint_of(tmp_path)
    with pytest.raises(ServedModelError, match="is no served model"):
        verify_served_model(tmp_path)
    with pytest.raises(ServedModelError, match="is no MLflow model"):
        signature_of(tmp_path)


@pytest.mark.parametrize("size", ["600k", "1800k"])  # too little for the code, too little for the weights
def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path, size: str) -> None:
    with small_disk(tmp_path / "small", size) as small:
        with pytest.raises(ServedModelError, match="model could not be written: the disk is full"):
            save_served_model(small / "model", checkpoint)
        assert not list(small.iterdir())


def test_signatures_of_two_versions_are_the_same_text(served: Path, outside: Path, tmp_path: Path) -> None:
    other = save_served_model(tmp_path / "other", outside, embed_models=False)
    assert signature_of(other) == signature_of(served) == signature_of()
    columns = json.loads(signature_of(served))["inputs"]
    required = {column["name"]: (column["type"], column["required"]) for column in columns}
    assert required == {
        "prompt": ("string", True), "seed": ("long", True), "num_steps": ("long", False), "guidance": ("double", False)
    }  # fmt: skip
    text = (other / "MLmodel").read_text()
    (other / "MLmodel").write_text(
        text.replace('"name": "seed", "required": true', '"name": "seed", "required": false')
    )
    assert signature_of(other) != signature_of(served)


def test_too_little_memory_is_said_at_the_start(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_memory, "free_memory", lambda device: 0.5 * generation_memory.GIB)
    with pytest.raises(MemoryShort, match=r"needs about \d+\.\d GiB of memory with its text encoder"):
        load(served)


def test_served_over_http_from_the_registry(
    served: Path, checkpoint: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    sha256 = describe_checkpoint(checkpoint).sha256
    tags = {"checkpoint.uri": str(checkpoint_of(served)), "checkpoint.sha256": sha256}
    promote(tmp_path, served, tags)
    uri = f"models:/{MODEL}@champion"
    assert model_version_path(uri, tmp_path) == checkpoint_of(served)  # what `opensora generate` takes
    assert predict(mlflow.pyfunc.load_model(uri), {"prompt": PROMPT, "seed": 3}) == [expected["usual"]]

    log, port = tmp_path / "serve.log", free_port()
    arguments = ["models", "serve", "--model-uri", uri, "--env-manager", "local", "--port", str(port)]
    with running(log, *arguments, MLFLOW_TRACKING_URI=store) as process:
        wait_until_up(process, f"http://127.0.0.1:{port}/ping", log)
        url = f"http://127.0.0.1:{port}/invocations"
        asked = [{"prompt": PROMPT, "seed": 3}, {"prompt": PROMPT, "seed": 3, "num_steps": 3, "guidance": 2}]
        with ThreadPoolExecutor(2) as pool:  # two clients at once
            answers = list(pool.map(lambda row: post(url, {"dataframe_records": [row]}), asked))
        for (status, answer), name in zip(answers, ("usual", "own"), strict=True):
            assert status == 200
            (row,) = answer["predictions"]
            assert base64.b64decode(row["mp4"]) == expected[name]
            assert (row["frames"], row["fps"], row["height"], row["width"]) == (4, 8, 32, 32)
        example = (served / "serving_input_example.json").read_bytes()
        assert post(url, example)[0] == 200
        for rows, message in refused():
            status, answer = post(url, {"dataframe_records": rows})
            assert status == 400
            assert message in answer["message"]
        for body, message in (
            (b"{", "valid JSON"),
            ({"rows": [PROMPT]}, "exactly one of the input fields"),
            ({"dataframe_records": [{"prompt": PROMPT, "seed": "soon"}]}, "Failed to convert column seed"),
        ):
            status, answer = post(url, body)
            assert status == 400
            assert message in answer["message"]
        assert post(url, example)[0] == 200


def refused() -> list[tuple[list[dict[str, Any]], str]]:
    """Rows of a request, and what the server says of them."""
    good = {"prompt": PROMPT, "seed": 1}
    return [
        ([good, good | {"prompt": "  "}], "row 1: the prompt is empty"),
        ([good | {"prompt": None}], "row 0: the prompt is empty"),
        ([good | {"prompt": "a" * 20_000}], "the prompt has 20000 characters, at most 10000 are read"),
        ([good | {"num_steps": -1}], "row 0: num_steps is -1, rectified_flow takes 1 to 1000"),
        ([good | {"num_steps": 0}], "num_steps is 0"),
        ([good | {"num_steps": 1001}], "takes 1 to 1000"),
        ([good | {"guidance": -0.5}], "row 0: guidance is -0.5, expected a number of 0 or more"),
        ([good] * 9, "9 rows; a request takes 1 to 8"),
        ([{"prompt": PROMPT}], "Model is missing inputs ['seed']"),
        ([], "Model is missing inputs"),
    ]


def test_serving_a_changed_model_fails(served: Path, tmp_path: Path) -> None:
    copy, log = shutil.copytree(served, tmp_path / "model"), tmp_path / "serve.log"
    path = copy / "artifacts" / "step-00000001" / "model.safetensors"
    damage(path)
    arguments = ["models", "serve", "--model-uri", str(copy), "--env-manager", "local", "--port", str(free_port())]
    with running(log, *arguments) as process:
        assert process.wait(LIMIT_S) != 0
    assert f"model.safetensors has another sha256 than recorded: found {hash_file(path)}, expected" in log.read_text()


def test_a_server_gets_the_files_and_gives_them_back(
    served: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, port = tmp_path / "server.log", free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ["server", "--port", str(port), "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"]
    arguments += ["--artifacts-destination", str(tmp_path / "store"), "--workers", "1"]
    with running(log, *arguments, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false") as process:
        wait_until_up(process, f"{url}/health", log)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        client = connect(tmp_path)
        client.create_registered_model(MODEL)
        with pytest.raises(MlflowException, match="To use a local path as a model version source"):
            client.create_model_version(MODEL, str(served))
        promote(tmp_path, served, {"stage": "train_video"})
        before = dict(os.environ)
        model = mlflow.pyfunc.load_model(f"models:/{MODEL}@champion")
        assert predict(model, {"prompt": PROMPT, "seed": 3}) == [expected["usual"]]
        assert os.environ == before
    stored = {path.name: hash_file(path) for path in (tmp_path / "store").rglob("*.safetensors")}
    assert stored == {path.name: hash_file(path) for path in served.rglob("*.safetensors")}
