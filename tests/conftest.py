"""Small models and data that several tests share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_MODEL_CATALOG_URI", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


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
    download.run(config.download, str(base / "demo_videos" / "manifest.csv"), base / "download")
    split.run(config.split, base / "download", base / "split")
    score.run(config.score, base / "split", base / "score")
    return base
