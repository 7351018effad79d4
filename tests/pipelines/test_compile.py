"""What is compiled: every step, no installation at run time, images as a registry names them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.image_names import IMAGES
from opensora.chain import ALL_STEPS
from opensora.config import load_config
from opensora.doctor_cluster import TASKS
from opensora.kubeflow import TASK_QUEUE
from pipelines.compile import PIPELINES, PipelineError, compile_pipeline
from pipelines.parameters import parameters_of
from tests.conftest import ROOT

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


def tasks(document: dict) -> Iterator[tuple[str, dict, str]]:
    """(name, task, executor) of all tasks that run a container, those inside loops and pipelines too."""
    components = document["components"]
    dags = [document["root"]["dag"], *(value["dag"] for value in components.values() if "dag" in value)]
    for dag in dags:
        for name, task in dag["tasks"].items():
            if label := components[task["componentRef"]["name"]].get("executorLabel"):
                yield name, task, label


def test_the_full_pipeline_holds_every_step(compiled: dict[str, list[dict]]) -> None:
    names = {name.replace("-", "_") for name, _, _ in tasks(compiled["full"][0])}
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
    shown = {label: task["taskInfo"]["name"] for _, task, label in tasks(definition)}
    online = {shown[label] for label, config in placed.items() if "opensora/internet" in str(config)}
    assert online == {"download", "download, one share"}
    with_gpu = {shown[label] for label, executor in executors.items() if "accelerator" in str(executor["container"])}
    assert with_gpu == {"caption, one share", "encode, one share", "evaluate"}
    assert with_gpu == {shown[label] for label, config in placed.items() if "captioning" in str(config)}


def test_a_task_has_the_cpus_and_gpus_that_the_profile_uses(compiled: dict[str, list[dict]]) -> None:
    """Of h800: a CPU for each worker, also to finish what a share left, and a GPU for each process of evaluation."""
    config = load_config(ROOT / "params.yaml", "h800")
    definition, platform = compiled["full"]
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    shown = {task["taskInfo"]["name"]: label for _, task, label in tasks(definition)}

    def given(task: str) -> tuple[int, int, dict]:
        resources = definition["deploymentSpec"]["executors"][shown[task]]["container"]["resources"]
        gpus = resources.get("accelerator", {})
        assert gpus.get("resourceType", "nvidia.com/gpu") == "nvidia.com/gpu"
        return int(resources["resourceCpuLimit"]), int(gpus.get("resourceCount", 0)), placed[shown[task]]

    for step in ("download", "split", "score"):
        for task in (step, f"{step}, one share"):
            assert given(task)[:2] == (getattr(config, step).workers, 0), task
    for step in ("caption", "encode"):
        cpus, gpus, _ = given(f"{step}, one share")
        assert gpus == getattr(config, step).workers
        assert cpus >= gpus * getattr(config, step).threads
    cpus, gpus, place = given("evaluate")
    assert gpus == config.evaluate.processes <= config.hardware.gpus_per_node
    assert cpus >= 2 * gpus
    (shm,) = place["emptyDirMounts"]
    assert (shm["mountPath"], shm["medium"], shm["sizeLimit"]) == ("/dev/shm", "Memory", f"{16 * gpus}Gi")


def test_the_doctor_knows_the_largest_task_of_each_pool(compiled: dict[str, list[dict]]) -> None:
    quantity = pytest.importorskip("kubernetes.utils.quantity").parse_quantity
    definition, platform = compiled["full"]
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    largest: dict[str, dict[str, Any]] = {}
    for label, executor in definition["deploymentSpec"]["executors"].items():
        resources = executor["container"]["resources"]
        asked = {"cpu": resources["resourceCpuLimit"], "memory": resources["resourceMemoryLimit"]}
        if "accelerator" in resources:
            asked["nvidia.com/gpu"] = resources["accelerator"]["resourceCount"]
        pool = largest.setdefault(placed[label]["nodeSelector"]["labels"]["opensora/pool"], {})
        for name, amount in asked.items():
            pool[name] = max(pool.get(name, 0), quantity(amount))
    assert largest == {pool: {name: quantity(value) for name, value in most.items()} for pool, most in TASKS.items()}


def test_every_task_stands_in_a_queue_with_a_flavor_of_its_pool(compiled: dict[str, list[dict]]) -> None:
    found = list(yaml.safe_load_all((ROOT / "k8s" / "base" / "queues.yaml").read_text()))
    local, whole, *_ = (one for one in found if one["metadata"]["name"] == TASK_QUEUE)
    local, whole = sorted((local, whole), key=lambda one: one["kind"], reverse=True)
    assert local["spec"]["clusterQueue"] == whole["metadata"]["name"]
    flavors = {one["metadata"]["name"]: one["spec"] for one in found if one["kind"] == "ResourceFlavor"}
    (group,) = whole["spec"]["resourceGroups"]
    pools = {flavors[flavor["name"]]["nodeLabels"]["opensora/pool"] for flavor in group["flavors"]}
    definition, platform = compiled["full"]
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert definition["deploymentSpec"]["executors"].keys() == placed.keys()
    for name, place in placed.items():
        assert place["podMetadata"]["labels"]["kueue.x-k8s.io/queue-name"] == TASK_QUEUE, name
        assert place["nodeSelector"]["labels"]["opensora/pool"] in pools, name


@pytest.mark.parametrize("name", PIPELINES)
def test_a_task_is_retried_however_long_it_took(compiled: dict[str, list[dict]], name: str) -> None:
    day = 24 * 3600
    for task_name, task, _ in tasks(compiled[name][0]):
        if task_name == "check-weights":
            assert "retryPolicy" not in task  # a second look sees the same, a minute later
            continue
        policy = task["retryPolicy"]
        assert policy["maxRetryCount"] == 2, task_name
        assert int(policy["backoffMaxDuration"].removesuffix("s")) >= 14 * day, task_name


@pytest.mark.parametrize("name", PIPELINES)
def test_weights_are_looked_for_before_anything_else(compiled: dict[str, list[dict]], name: str) -> None:
    outermost = compiled[name][0]["root"]["dag"]["tasks"]
    before = {task: set(value.get("dependentTasks", ())) for task, value in outermost.items()}
    assert [task for task, others in before.items() if not others] == ["check-weights"]
    steps = outermost["check-weights"]["inputs"]["parameters"]["steps"]["runtimeValue"]["constant"]
    own = {task.replace("-", "_") for task, _, _ in tasks(compiled[name][0])} & set(ALL_STEPS)
    assert set(steps) == own - {"demo_videos", "demo_models"}


def test_without_the_cache_no_task_reads_it(tmp_path: Path) -> None:
    compile_pipeline("full", tmp_path / "full.yaml", {}, {}, cache=False)
    definition = next(yaml.safe_load_all((tmp_path / "full.yaml").read_text()))
    assert not [name for name, task, _ in tasks(definition) if task["cachingOptions"].get("enableCache")]
    assert "enableCache" not in str(definition)


CACHED = {
    "data": {"list-shares", "demo-videos", "download", "split", "score", "demo-models", "caption", "encode", "share"},
    "training": set(),
    "release": set(),
}
NEVER = {
    "data": {"check-weights", "version"},  # a remote may have been emptied
    "training": {"check-weights", "restore", "train-image", "train-video", "train-highres"},
    "release": {"check-weights", "trained", "evaluate", "promote"},
}


@pytest.mark.parametrize("name", PIPELINES)
def test_only_content_decides_what_is_cached(compiled: dict[str, list[dict]], name: str) -> None:
    cached, never = CACHED.get(name, CACHED["data"]), NEVER.get(name, set().union(*NEVER.values()))
    if name == "full":
        never = never - {"restore", "trained"}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for task_name, task, _ in tasks(compiled[name][0]):
        found[bool(task["cachingOptions"].get("enableCache"))].add(re.sub(r"-\d+$", "", task_name))
    assert found == {True: cached, False: never}


def test_what_is_cached_is_told_of_which_code_and_data_it_is(compiled: dict[str, list[dict]]) -> None:
    for name, task, _ in tasks(compiled["full"][0]):
        if task["cachingOptions"].get("enableCache") and name != "list-shares":
            assert {"data_revision", "code_revision"} <= set(task["inputs"]["parameters"]), name


def test_loops_stand_in_no_exit_handler(compiled: dict[str, list[dict]]) -> None:
    for documents in compiled.values():
        assert "ALL_UPSTREAM_TASKS_COMPLETED" not in str(documents)


def test_captions_by_a_server_take_no_gpu(compiled: dict[str, list[dict]]) -> None:
    definition = compiled["data"][0]
    shown = {task["taskInfo"]["name"]: label for _, task, label in tasks(definition)}
    executor = definition["deploymentSpec"]["executors"][shown["caption by a server, one share"]]
    assert "accelerator" not in executor["container"]["resources"]
    dags = [value["dag"]["tasks"] for value in definition["components"].values() if "dag" in value]
    conditions = [
        task["triggerPolicy"]["condition"] for dag in dags for task in dag.values() if "triggerPolicy" in task
    ]
    assert len(conditions) == 2
    assert all("caption_on_gpu'] == true" in condition for condition in conditions)
    assert definition["root"]["inputDefinitions"]["parameters"]["caption_on_gpu"]["defaultValue"] is True


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("share=3", "has no parameter 'share'; did you mean shares"),
        ("shares=many", "shares=many: expected a whole number"),
        ("caption_on_gpu=1", "expected true or false"),
        ("overrides=download.source=x", "expected a list"),
        ("shares", "expected name=value"),
    ],
)
def test_a_wrong_parameter_is_named(text: str, reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        parameters_of([text], "full")


def test_text_stays_text_and_the_rest_is_read() -> None:
    texts = ["data_revision=123", "shares=16", "budget_dollars=6000", 'overrides=["a.b=1"]', "caption_on_gpu=false"]
    assert list(parameters_of(texts, "full").values()) == ["123", 16, 6000, ["a.b=1"], False]


@pytest.mark.parametrize("name", ["training", "release"])
def test_pipelines_that_are_submitted_take_no_artifact(compiled: dict[str, list[dict]], name: str) -> None:
    assert "artifacts" not in compiled[name][0]["root"]["inputDefinitions"]  # nobody could give it


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
