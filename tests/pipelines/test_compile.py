"""What is compiled: every step, no installation at run time, images as a registry names them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from components.image_names import IMAGES
from opensora.chain import ALL_STEPS
from pipelines.compile import PIPELINES, PipelineError, compile_pipeline

pytest.importorskip("kfp", reason="the extra `kubeflow` is not installed")
DIGEST = "@sha256:" + "0" * 64


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("compiled")
    images = {name: f"registry.example/{name}{DIGEST}" for name in IMAGES}
    documents = {}
    for name in PIPELINES:
        assert compile_pipeline(name, folder / f"{name}.yaml", images, {}) == []
        documents[name] = list(yaml.safe_load_all((folder / f"{name}.yaml").read_text()))
    return documents


def task_names(document: dict) -> set[str]:
    """Of all components, those inside loops and pipelines too."""
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "dag" in node:
                found.update(node["dag"]["tasks"])
            for value in node.values():
                walk(value)

    walk(document)
    return found


def test_the_full_pipeline_holds_every_step(compiled: dict[str, list[dict]]) -> None:
    names = {name.replace("-", "_") for name in task_names(compiled["full"][0])}
    assert set(ALL_STEPS) <= names


@pytest.mark.parametrize("name", PIPELINES)
def test_nothing_is_installed_when_a_task_starts(compiled: dict[str, list[dict]], name: str) -> None:
    for executor in compiled[name][0]["deploymentSpec"]["executors"].values():
        container = executor["container"]
        assert "pip install" not in " ".join([*container["command"], *container["args"]])
        assert container["image"].startswith("registry.example/")
        assert container["image"].endswith(DIGEST)


def test_every_task_has_limits_and_a_place(compiled: dict[str, list[dict]]) -> None:
    definition, platform = compiled["full"]
    executors = definition["deploymentSpec"]["executors"]
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, executor in executors.items():
        resources = executor["container"]["resources"]
        assert {"resourceCpuLimit", "resourceMemoryLimit"} <= set(resources), name
        assert placed[name]["nodeSelector"]["labels"]["opensora/pool"] in ("cpu", "captioning"), name
        assert [mount["mountPath"] for mount in placed[name]["pvcMount"]] == ["/runs"], name
    online = {name for name, config in placed.items() if "opensora/internet" in str(config.get("podMetadata", ""))}
    assert {name.removeprefix("exec-") for name in online} == {"download"}


def test_only_content_decides_what_is_cached(compiled: dict[str, list[dict]]) -> None:
    cached: dict[str, bool] = {}

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            for name, task in (node.get("dag") or {}).get("tasks", {}).items():
                cached[name] = bool(task.get("cachingOptions", {}).get("enableCache"))
            for value in node.values():
                walk(value)

    walk(compiled["full"][0])
    never = ("train-image", "train-video", "train-highres", "evaluate", "promote")
    assert not any(cached[name] for name in never)
    assert all(cached[name] for name in ("download", "split", "score", "caption", "encode"))


def test_parameters_become_defaults(tmp_path: Path) -> None:
    compile_pipeline("data", tmp_path / "data.yaml", {}, {"profile": "h800", "shares": 16})
    inputs = yaml.safe_load((tmp_path / "data.yaml").read_text().split("\n---")[0])["root"]["inputDefinitions"]
    values = inputs["parameters"]
    assert (values["profile"]["defaultValue"], values["shares"]["defaultValue"]) == ("h800", 16.0)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="unknown pipeline 'ful'; one of data"):
        compile_pipeline("ful", tmp_path / "x.yaml", {}, {})
    with pytest.raises(PipelineError, match="unknown image 'opensora'"):
        compile_pipeline("data", tmp_path / "x.yaml", {"opensora": "x"}, {})
    assert not list(tmp_path.iterdir())
