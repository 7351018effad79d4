"""Is this machine ready? Each check says what it saw and, where that will not do, what to do."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from opensora.config import Config

GIB = 2**30
DISK_GIB = 10  # of the demo and its environment, with room to spare
DECODERS = ("h264", "hevc", "vp9", "av1")
TIMEOUT_S = 10


@dataclass(frozen=True)
class Finding:
    """What a check saw. A warning does not stop the chain; a failure does."""

    name: str
    state: Literal["ok", "warning", "failure"]
    seen: str
    advice: str = ""


def examine(config: "Config", root: Path) -> Iterator[Finding]:
    """Check this machine for a profile, whose results go below `root`; one finding after the other."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        lambda: _torch(config),
        _video,
        lambda: _space(root),
        lambda: _weights(config),
        _dvc,
        lambda: _mlflow(root),
    ]
    for check in checks:
        yield from check()


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding("Python", "ok" if good else "failure", version, "" if good else "install Python 3.11 or newer")


def _torch(config: "Config") -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("PyTorch", "failure", str(error), "run `make setup`")
        return
    yield Finding("PyTorch", "ok", torch.__version__)
    if not torch.cuda.is_available():
        needed = config.profile in ("single_gpu", "h800")
        advice = f"profile {config.profile} needs one: check the driver by nvidia-smi, or choose the profile demo"
        yield Finding("GPU", "failure" if needed else "ok", "none", advice if needed else "")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Finding(
            f"GPU {index}", "ok", f"{about.name}, {about.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
        )


def _video() -> Iterator[Finding]:
    """Write a clip as the chain does and read it back as training does."""
    import av
    import numpy as np

    missing = [name for name in DECODERS if name not in av.codecs_available]
    yield Finding(
        "decoders",
        "warning" if missing else "ok",
        f"{len(DECODERS) - len(missing)} of {len(DECODERS)}" + (f", without {', '.join(missing)}" if missing else ""),
        "videos of these codecs will be dropped; install PyAV's own wheel (pip install av)" if missing else "",
    )
    from opensora.clip_file import write_clip
    from opensora.data.video import read_frames

    advice = "install PyAV's own wheel (pip install av)"
    frames = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        try:
            write_clip(path, frames, 8)
        except Exception as error:
            yield Finding(
                "H.264", "failure", f"cannot be written: {error}", "install PyAV's own wheel (pip install av)"
            )
            return
        read = read_frames(path.read_bytes())
    good = read.shape == frames.shape
    seen = f"{len(read)} of {len(frames)} frames written and read back by PyAV {av.__version__}"
    yield Finding("H.264", "ok" if good else "failure", seen, "" if good else advice)


def _space(root: Path) -> Iterator[Finding]:
    there = next(path for path in (root.resolve(), *root.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free / GIB
    advice = f"free some, or give --workdir on a larger disk: the demo needs {DISK_GIB} GiB, your own videos more"
    yield Finding("disk", "ok" if free >= DISK_GIB else "warning", f"{free:.0f} GiB free at {there}", advice)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free / GIB
        advice = "mount a memory volume there: processes that read training data pass batches through it"
        yield Finding("/dev/shm", "ok" if size >= 1 else "warning", f"{size:.1f} GiB free", advice)


def _weights(config: "Config") -> Iterator[Finding]:
    from opensora.chain import chain_steps, look_for_weights
    from opensora.weights import MISSING, NoWeights

    for name, readers, place in look_for_weights(config, chain_steps(config)):
        what = f"weights {name}"
        if isinstance(place, Path):
            yield Finding(what, "ok", str(place))
        elif config.offline or not isinstance(place, NoWeights):
            yield Finding(what, "failure", f"{place.reason} (for {', '.join(readers)})", MISSING)
        else:
            yield Finding(what, "warning", f"{place.reason}; it will be asked of the hub", "needs a connection")


def _dvc() -> Iterator[Finding]:
    from subprocess import run

    command = Path(sys.executable).with_name("dvc")
    if not command.is_file():
        yield Finding(
            "DVC", "warning", "not installed beside this Python", "run `make setup`; `opensora run` needs none"
        )
        return
    if not Path(".dvc").is_dir():
        yield Finding("DVC", "warning", "no .dvc here", "run inside the project's folder, or `dvc init --no-scm`")
        return
    done = run([command, "remote", "list"], capture_output=True, text=True, timeout=60, check=False)
    remotes = [" ".join(line.split()) for line in done.stdout.splitlines()]
    advice = "`dvc remote add -d store s3://bucket/folder`, to share data and results; without one they stay here"
    yield Finding("DVC remote", "ok" if remotes else "warning", "; ".join(remotes) or "none", "" if remotes else advice)


def _mlflow(root: Path) -> Iterator[Finding]:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith("http"):
        yield Finding("MLflow", "ok", uri or f"a file below {root}")
        return
    import requests

    from opensora.tracking.redact import redact

    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    login = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    address = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search"
    try:  # /health answers even to those whom the server refuses
        answer = requests.post(address, json={"max_results": 1}, auth=login, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        advice = "start the server or unset MLFLOW_TRACKING_URI; training goes on without it and sends its points later"
        yield Finding("MLflow", "failure", f"{redact(uri)}: {type(error).__name__}", advice)
        return
    advice = {
        401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        403: "add this name of the server to its --allowed-hosts, or this user to its permissions",
    }.get(answer.status_code, "look at the server's log")
    yield Finding("MLflow", "ok" if answer.ok else "failure", f"{redact(uri)}: HTTP {answer.status_code}", advice)


def show(findings: Iterator[Finding]) -> bool:
    """Print a line a finding, as they come; returns whether none is a failure."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    marks = {"ok": "[green]ok[/]     ", "warning": "[yellow]warning[/]", "failure": "[red]failure[/]"}
    good = True
    for finding in findings:
        console.print(f"{marks[finding.state]}  {escape(f'{finding.name}: {finding.seen}')}")
        if finding.advice and finding.state != "ok":
            console.print(f"         → {finding.advice}", markup=False)
        good &= finding.state != "failure"
    return good
