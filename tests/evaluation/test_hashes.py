"""What makes a clip beside its checkpoint is told apart by its bytes."""

import shutil
from pathlib import Path

import pytest

from opensora.evaluation.hashes import PACKAGE, SOURCES, hash_code, hash_sources
from tests.test_architecture import own_imports

# Imported by the sources, and no part of a clip or a number: settings, places, processes.
PLAIN = {"config", "progress", "step", "weights", "generation_memory"}
PLAIN |= {f"evaluation.{name}" for name in ("hashes", "kept", "share")}
PLAIN |= {f"data.{name}" for name in ("clip_table", "shards")}  # which clips, and where they lie
PLAIN |= {f"data.{name}" for name in ("clock", "container", "damage")}  # reading what comes from outside


def test_a_changed_source_is_other_code(tmp_path: Path) -> None:
    package = tmp_path / "opensora"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    found = [hash_sources(package)]
    assert found == [hash_code()]
    for name in ("generate.py", "diffusion/iddpm.py", "metrics/suite.py", "demo/shapes.py"):
        (package / name).write_text((package / name).read_text() + "# another\n")
        found.append(hash_sources(package))
    assert len(set(found)) == 5
    (package / "promote.py").write_text("")
    assert hash_sources(package) == found[-1]
    (package / "generate.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"generate\.py"):
        hash_sources(package)


def test_all_that_the_sources_import_counts() -> None:
    places = [PACKAGE / name for name in SOURCES]
    files = {file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])}
    assert len(files) > 30
    known = {".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in files}
    used = {name for file in files if file != PACKAGE / "training" / "checkpoint.py" for name in own_imports(file)}
    assert {name for name in used - known - PLAIN if not (PACKAGE / name.replace(".", "/")).is_dir()} == set()
