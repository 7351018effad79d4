"""The training runtime and the job by hand, against Kubeflow's own models and the launcher: no kubectl is needed."""

import importlib

import yaml

from components.launch import arguments
from components.step import Job
from components.trainjob import TrainJob
from tests.conftest import ROOT


def round_trip(model: str, document: dict) -> None:
    """Kubeflow's own models drop what they do not know without a word: nothing may be missing afterwards."""
    models = importlib.import_module("kubeflow_trainer_api.models")
    again = getattr(models, model).from_dict(document).to_dict()
    assert again == document


def test_the_runtime_survives_kubeflows_own_models() -> None:
    runtime = yaml.safe_load((ROOT / "k8s" / "base" / "training-runtime.yaml").read_text())
    round_trip("TrainerV1alpha1ClusterTrainingRuntime", runtime)


def test_the_job_by_hand_is_what_the_launcher_makes() -> None:
    template = yaml.safe_load((ROOT / "k8s" / "trainjob.yaml").read_text())
    round_trip("TrainerV1alpha1TrainJob", template)
    trainer = template["spec"]["trainer"]
    made = TrainJob(
        name=template["metadata"]["name"],
        namespace="opensora",
        stage="train_video",
        image=trainer["image"],
        args=tuple(arguments("train_video", Job("h800", [], "/runs/first", "", ""))),
        nodes=8,
        gpus_per_node=8,
        env={item["name"]: item["value"] for item in trainer["env"]},
    )
    assert made.document() == template
