"""Run a compiled pipeline on this machine with KFP's own local runner."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.compile import PipelineError

ROOT = Path(__file__).resolve().parents[1]


def run_local(compiled: Path, parameters: Mapping[str, Any], artifacts: Path) -> Any:
    """Run it task by task, each in a process of its own; returns the pipeline's output.

    Args:
        artifacts: folder of KFP's small manifests.

    Raises:
        PipelineError: a task failed; its last line says why.
    """
    from kfp import components, local

    # The tasks' processes find the code of this checkout, as images hold it.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if "python3" in str(artifacts.resolve()):
        raise PipelineError(f"KFP's local runner rewrites `python3` in paths: choose other folders than {artifacts}")
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(artifacts), raise_on_error=True)
    pipeline = components.load_component_from_file(str(compiled))
    try:
        return pipeline(**parameters).output
    except RuntimeError as error:
        raise PipelineError(f"the pipeline failed: {error}; the lines above say why") from error
