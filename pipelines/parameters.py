"""Parameters of a pipeline as a command line gives them, checked before anything is compiled or sent."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.compile import PipelineError, load

KINDS: Mapping[str, tuple[type, ...]] = {
    "Integer": (int,),
    "Float": (int, float),
    "Boolean": (bool,),
    "List": (list,),
}
EXAMPLES = {
    "Integer": "a whole number, as 16",
    "Float": "a number, as 6000",
    "Boolean": "true or false",
    "List": """a list, as '["download.source=s3://bucket/videos"]'""",
}


def parameters_of(texts: Sequence[str], pipeline: str) -> dict[str, Any]:
    """`shares=16` → {"shares": 16}: text where the pipeline takes text, JSON where it takes anything else.

    Raises:
        PipelineError: the pipeline takes no such parameter, or another kind of value.
    """
    kinds = {name: value.type for name, value in (load(pipeline).component_spec.inputs or {}).items()}
    values: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise PipelineError(f"--parameter {text!r}: expected name=value, as in profile=h800")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise PipelineError(f"pipeline {pipeline} has no parameter {name!r}; {guess}It takes {', '.join(kinds)}")
        values[name] = value if kinds[name] == "String" else _json(name, value, kinds[name])
    return values


def _json(name: str, text: str, kind: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "Boolean"):
        raise PipelineError(f"--parameter {name}={text}: expected {EXAMPLES[kind]}")
    return value
