"""Small models and data that several tests share."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.tracking.mlflow_server import MlflowServer

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_MODEL_CATALOG_URI", "")
os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")  # a test that wants it says so
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two test processes share two cores: a second thread in each would spin while it waits for one that has no core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes that outlives its test


# A shell without job control starts background commands with SIGINT ignored, and their children inherit it: then no
# Ctrl-C that a test sends would arrive.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Compiled code in a folder of its own: what a killed process left half done in the shared one would fail tests."""
    config.compiled_code = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="opensora-inductor-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Here, as processes of pytest-xdist end without Python's own handlers at exit."""
    shutil.rmtree(config.compiled_code, ignore_errors=True)


@contextmanager
def killed_in_the_end(process: subprocess.Popen) -> Iterator[None]:
    """A process with a session of its own: nothing of it outlives a test that fails."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors: threads that wait for each other on a busy machine cost five times their work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny T5."""
    from opensora.demo.shapes import all_scenes
    from opensora.demo.text_encoder import build_text_encoder

    folder = tmp_path_factory.mktemp("t5")
    build_text_encoder(folder, sorted({word for scene in all_scenes() for word in scene.caption.split()}), seed=0)
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained tiny VAE."""
    import torch

    from opensora.demo.autoencoder import build_vae

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    build_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a finished score step beside its shards (`split`): sixteen clips of the embedded world."""
    from opensora.config import load_config
    from opensora.data import download, score, split
    from opensora.demo.videos import run as demo_videos

    base = tmp_path_factory.mktemp("clips")
    config = load_config(ROOT / "params.yaml", "smoke")
    demo_videos(config.demo, base / "demo_videos")
    download.run(config.download, str(base / "demo_videos" / "manifest.csv"), base / "download", config.executor)
    split.run(config.split, base / "download", base / "split", config.executor)
    score.run(config.score, base / "split", base / "score", config.executor)
    return base


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, vae: Path, text_encoder: Path) -> Path:
    """A checkpoint of an untrained video stage beside the models it needs; the model is not trivial: it moves noise."""
    import shutil

    import torch

    from opensora.config import load_config
    from opensora.models.stdit import STDiT
    from opensora.training.checkpoint import save_checkpoint, stdit_config

    base = tmp_path_factory.mktemp("trained") / "smoke"
    shutil.copytree(vae, base / "demo_models" / "vae")
    shutil.copytree(text_encoder, base / "demo_models" / "t5")
    config = load_config(ROOT / "params.yaml", "smoke")
    torch.manual_seed(0)
    model = STDiT(stdit_config(config, "train_video", 4))
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.2)
    for block in model.blocks:
        torch.nn.init.normal_(block.cross_attn.proj.weight, std=0.3)  # the text has a say
    state = model.state_dict()
    return save_checkpoint(
        base / "train_video" / "checkpoints",
        step=1,
        model=state,
        ema={name: value.detach() for name, value in model.named_parameters()},
        optimizer={},
        rng={"0/cpu": torch.get_rng_state()},
        info={
            "config": config.model_dump(mode="json"),
            "stage": "train_video",
            "vae": "demo_models/vae",
            "text_encoder": "demo_models/t5",
            "vae_scale": 4,
        },
    )


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database, to copy: making one takes seconds."""
    from opensora.tracking.store import connect

    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        connect(root).search_registered_models()
    return root / "mlflow.db"


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> "Iterator[MlflowServer]":
    """A server that answers; a test that kills it starts it again."""
    from tests.tracking.mlflow_server import MlflowServer

    folder = tmp_path_factory.mktemp("server")
    shutil.copy(mlflow_store, folder)
    server = MlflowServer(folder)
    try:
        server.start_warm()
        yield server
    finally:
        server.close()
