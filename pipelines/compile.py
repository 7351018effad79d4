"""Compile a pipeline to YAML, its images pinned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from components.image_names import IMAGES

PIPELINES = ("data", "training", "release", "full")


class PipelineError(RuntimeError):
    """A pipeline cannot be compiled or run; the message says why and what to do."""


def load(name: str) -> Any:
    """The pipeline of that name; imports KFP, which takes a second."""
    match name:
        case "data":
            from pipelines.data import data_pipeline as pipeline
        case "training":
            from pipelines.training import training_pipeline as pipeline
        case "release":
            from pipelines.release import release_pipeline as pipeline
        case "full":
            from pipelines.full import full_pipeline as pipeline
        case _:
            raise PipelineError(f"unknown pipeline {name!r}; one of {', '.join(PIPELINES)}")
    return pipeline


def compile_pipeline(
    name: str, output: Path, images: Mapping[str, str], parameters: Mapping[str, Any], cache: bool = True
) -> list[str]:
    """Write the pipeline's YAML; returns the images that are not pinned by digest.

    Args:
        images: what a registry calls each image of `components.image_names`: name → `registry/name@sha256:…`.
        parameters: new defaults.
        cache: false lets no task take its result from KFP's cache.

    Raises:
        PipelineError: an image is unknown.
    """
    from kfp import compiler

    for image in images:
        if image not in IMAGES:
            raise PipelineError(f"unknown image {image!r}; one of {', '.join(IMAGES)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.stem}.part.yaml")
    compiler.Compiler().compile(load(name), str(part), pipeline_parameters=dict(parameters))
    documents = list(yaml.load_all(part.read_text(), yaml.CSafeLoader))  # ten times as fast as in Python
    part.unlink()
    used = set()
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        container = executor["container"]
        container["image"] = images.get(container["image"], container["image"])
        used.add(container["image"])
    if not cache:
        _disable_cache(documents[0])
    output.write_text(yaml.dump_all(documents, Dumper=yaml.CSafeDumper, sort_keys=True))
    return sorted(image for image in used if "@sha256:" not in image)


def _disable_cache(definition: dict[str, Any]) -> None:
    """Of all tasks: KFP's own switch, `enable_caching`, reaches those of the outermost pipeline alone."""
    dags = [definition["root"]["dag"], *(part["dag"] for part in definition["components"].values() if "dag" in part)]
    for dag in dags:
        for task in dag["tasks"].values():
            task["cachingOptions"] = {}
