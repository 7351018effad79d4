"""`opensora plan` prints a table or JSON, and exits with 2 where a stage does not fit."""

import json

import pytest
from typer.testing import CliRunner

from opensora.cli import app
from opensora.config import ConfigError
from tests.conftest import ROOT

PARAMS = ("--params", str(ROOT / "params.yaml"))


def invoke(*arguments: str):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, ["plan", *PARAMS, *arguments], env={"COLUMNS": "80"})


def test_the_table_of_the_published_recipe() -> None:
    result = invoke("--profile", "h800")
    assert result.exit_code == 0
    for text in (
        "759,620,768",
        "16x256x256",
        "2,808",
        "1,920",
        "zero2",
        "GPU-hours",
        "optimizer",
        "15% of 989 TFLOP/s",
    ):
        assert text in result.output
    assert "…" not in result.output  # three stages fit 80 columns


def test_json_has_every_figure() -> None:
    result = invoke("--profile", "h800", "--gpus", "8", "--gpu", "h100", "--stage", "train_video", "--json")
    (stage,) = json.loads(result.output)
    assert stage["gpus"] == 8
    assert stage["fits"]
    assert stage["parameters"] == 759_620_768
    assert stage["memory"]["peak"] <= stage["usable"]
    assert stage["gpu_hours"] == pytest.approx(stage["step_seconds"] * stage["steps"] * 8 / 3600)


def test_what_does_not_fit_ends_with_an_error_after_its_table() -> None:
    result = invoke("--profile", "single_gpu", "--gpu", "rtx4090", "--set", "train_video.batch_size=64")
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2
    assert "fits" in result.output
    assert "--set train_video.batch_size=" in str(result.exception)


def test_without_a_gpu_memory_alone_is_said() -> None:
    result = invoke("--profile", "demo")
    assert result.exit_code == 0
    assert "give --gpu" in result.output
    assert "GPU-hours" not in result.output.replace("GPU-hours, published", "")
    assert isinstance(invoke("--profile", "demo", "--stage", "train_vidoe").exception, ConfigError)
