"""A tiny encoded data set, so that training tests need neither a VAE nor videos."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora.data.shards import text_key
from opensora.manifest import Clip, part_name, write_part


@pytest.fixture(scope="module", autouse=True)
def no_tracking_server() -> Iterator[None]:
    """Nobody answers there, which training does not care about; making a store for every run would take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        yield


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the encode step's: eight clips of six frames at 32 and 64 pixels, eight times smaller latents."""
    folder = tmp_path_factory.mktemp("encode")
    generator = torch.Generator().manual_seed(0)
    tensors, texts, clips = {}, {}, []
    for index in range(8):
        name = f"clip{index}"
        for size in (32, 64):
            shape = (6, 4, size // 4, size // 4)
            tensors[f"{name}/{size}x{size}/mean"] = torch.randn(shape, generator=generator).half()
            tensors[f"{name}/{size}x{size}/std"] = torch.full(shape, 0.1).half()
        texts[text_key(name)] = torch.randn(3 + index % 3, 64, generator=generator).half()
        clips.append(Clip(name, "x", frames=6, height=64, width=64, caption=name, latent_shard="l", text_shard="t"))
    save_file(tensors, folder / "l")
    save_file(texts, folder / "t")
    write_part(folder / part_name(0), clips)
    (folder / "report.json").write_text('{"step": "encode"}')
    (folder / "fingerprint.json").write_text('"made here"')
    return folder
