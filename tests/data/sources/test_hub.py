"""Data sets of a hub, over HTTP: listed by the hub's own client, brought file by file, each row with its reason."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from opensora.clip_file import write_clip
from opensora.config import DownloadConfig
from opensora.data.sources.hub import bring_from_hub, list_data_set
from opensora.data.sources.partial import DownloadError
from opensora.manifest import Clip, Span, read_manifest
from opensora.step import StepError
from tests.conftest import ROOT
from tests.data.file_server import FileServer, file_server

NAME = "someone/films"


@dataclass
class Hub:
    """A server with the paths of the Hugging Face hub that listing and bringing a data set ask for."""

    web: FileServer
    store: FileServer  # where large files lie, on another host, as the hub's do

    def put(self, files: dict[str, bytes], revision: str = "main") -> None:
        """Make these the files of a revision of the data set; videos are large files."""
        tree = []
        for path, data in files.items():
            entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
            url = f"/datasets/{NAME}/resolve/{revision}/{path}"
            if path.endswith(".mp4"):
                digest = sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
                self.store.files[f"/{digest}"] = data
                self.web.redirects[url] = f"{self.store.url}/{digest}"
            else:
                self.web.files[url] = data
            tree.append(entry)
        # The client asks for the tree page by page; one is enough here.
        self.web.files[f"/api/datasets/{NAME}/tree/{revision}?recursive=true&expand=false"] = json.dumps(tree).encode()


@contextmanager
def running_hub() -> Iterator[Hub]:
    with file_server() as web, file_server() as store:
        web.url = web.url.replace("127.0.0.1", "localhost")  # another host than the store: the token stays with it
        yield Hub(web, store)


PROGRAM = """
import sys
from pathlib import Path
from opensora.config import DownloadConfig, ExecutorConfig
from opensora.data.download import run

config = DownloadConfig(allow_private_hosts=True, retries=0, timeout_s=60, max_bad_share=0.9, max_mib=1)
run(config, sys.argv[1], Path(sys.argv[2]), ExecutorConfig(kind="sequential"))
"""


def download(hub: Hub, source: str, output: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The step in a process whose environment names the hub, as a user's would."""
    home = {"HF_HOME": str(output.parent / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env = os.environ | home | {"HF_ENDPOINT": hub.web.url, "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", PROGRAM, source, str(output)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)


def video(folder: Path, seed: int) -> bytes:
    import numpy as np

    frames = np.random.default_rng(seed).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    return write_clip(folder / f"made{seed}.mp4", frames, 8).read_bytes()


def rows(output: Path) -> dict[str, Clip]:
    return {row.source.partition(NAME)[2]: row for row in read_manifest(output)}


def test_a_data_set_of_a_hub(tmp_path: Path) -> None:
    good, second, late = (video(tmp_path, seed) for seed in range(3))
    side = json.dumps([{"start_s": 0, "end_s": 0.5, "caption": "a door opens"}]).encode()
    with running_hub() as hub:
        hub.put(
            {
                "README.md": b"# films",
                "a b.mp4": good,
                "a b.captions.json": side,
                "deep/видео.mp4": second,
                "huge.mp4": bytes(3 << 20),
                "lost.mp4": b"gone",
            }
        )
        del hub.store.files[f"/{sha256(b'gone').hexdigest()}"]
        done = download(hub, f"hf://datasets/{NAME}", tmp_path / "download", HF_TOKEN="hf_secret")
        assert done.returncode == 0, done.stderr
        found = rows(tmp_path / "download")
        assert {name: row.reason for name, row in found.items() if not row.kept} == {
            "/huge.mp4": "too large: 3 MiB, the limit is 1",
            "/lost.mp4": "dead link: HTTP 404",
        }
        assert {name for name, row in found.items() if row.kept} == {"/a b.mp4", "/deep/видео.mp4"}
        assert found["/a b.mp4"].source == f"hf://datasets/{NAME}/a b.mp4"
        assert found["/a b.mp4"].source_sha256 == sha256(good).hexdigest()
        assert found["/a b.mp4"].spans == (Span(0.0, 0.5, "a door opens"),)
        assert all(request.headers["authorization"] == "Bearer hf_secret" for request in hub.web.log)
        assert all("authorization" not in request.headers for request in hub.store.log)
        assert "hf_secret" not in "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*.json*"))

        # The data set changes: what is the same by its hash is not asked for again.
        hub.store.log.clear()
        hub.put({"a b.mp4": good, "deep/видео.mp4": late})
        assert download(hub, f"hf://datasets/{NAME}", tmp_path / "download").returncode == 0
        assert [request.path for request in hub.store.log] == [f"/{sha256(late).hexdigest()}"]
        assert rows(tmp_path / "download")["/deep/видео.mp4"].source_sha256 == sha256(late).hexdigest()


def test_data_sets_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.web.url)
        for source, said in {
            f"hf://datasets/{NAME}": "could not be listed|no data set",
            "hf://datasets/no one/films": "names no data set",
            f"hf://datasets/{NAME}/deep/a.mp4": "names more than a data set",
        }.items():
            with pytest.raises(StepError, match=said):
                list(list_data_set(source))
        hub.put({"a.mp4": b"one", "readme.md": b""}, "v2")
        assert [item.url for item in list_data_set(f"hf://datasets/{NAME}@v2")] == [f"hf://datasets/{NAME}@v2/a.mp4"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StepError, match=r"could not be listed.*[Oo]ffline"):
        list(list_data_set(f"hf://datasets/{NAME}"))
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        bring_from_hub(f"hf://datasets/{NAME}/a.mp4", tmp_path / "a.mp4", DownloadConfig())
