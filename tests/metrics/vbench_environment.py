"""An environment with a package `vbench` that a test writes: VBench's interface and files, without the models."""

import venv
from pathlib import Path

TORCH = """
device = str
class cuda:
    is_available = staticmethod(lambda: False)
"""


def build_environment(folder: Path, vbench: str, version: str) -> str:
    """The python of an environment whose `vbench` is the given code, of the given version."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "vbench").mkdir()
    (packages / "vbench" / "__init__.py").write_text(vbench)
    (packages / f"vbench-{version}.dist-info").mkdir()
    about = f"Metadata-Version: 2.1\nName: vbench\nVersion: {version}\n"
    (packages / f"vbench-{version}.dist-info" / "METADATA").write_text(about)
    (packages / "torch.py").write_text(TORCH)
    return str(folder / "bin" / "python")
