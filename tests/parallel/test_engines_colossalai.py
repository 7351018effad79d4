"""ColossalAI's engines on CPUs: DDP as it is; ZeRO and Gemini as pretended_gpu.py has them. tests/gpu has the rest."""

import pytest
import torch

from opensora.config import ConfigError, TrainConfig
from opensora.parallel.engine import build_engine
from tests.conftest import ROOT
from tests.parallel.engine_training import Result, build_model, train
from tests.parallel.test_engines import assert_same, run_processes, settings

PYTHON = ROOT / ".venv-colossalai" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="ColossalAI is not installed: make setup-colossalai")
LOW = {"dtype": "bfloat16"}


def colossal(strategy: str, **fields: object) -> TrainConfig:
    return settings(engine="colossalai", strategy=strategy, **fields)


@pytest.fixture(scope="module")
def alone() -> dict[str, Result]:
    """References on one device, by PyTorch."""
    start, low = train(settings()), train(settings(**LOW))
    return {
        "plain": start,
        "frozen": train(settings(trainable="temporal")),
        "resumed": train(settings(), start),
        "low": low,
        "low sequence": low,
        "low recompute": low,
        "low frozen": train(settings(trainable="temporal", **LOW)),
        "low resumed": train(settings(**LOW), start),
        "low single": train(settings(accumulate=1, **LOW)),
    }


@pytest.fixture(scope="module")
def together(alone: dict[str, Result], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    start = alone["plain"]
    jobs: dict[str, tuple[TrainConfig, Result | None]] = {"refused": (colossal("gemini", **LOW), None)}
    for strategy in ("ddp", "zero1", "zero2"):
        jobs[strategy] = (colossal(strategy), None)
        jobs[f"{strategy} frozen"] = (colossal(strategy, trainable="temporal"), None)
        jobs[f"{strategy} resumed"] = (colossal(strategy), start)
    for strategy in ("zero2", "gemini"):
        jobs[f"{strategy} low"] = (colossal(strategy, **LOW), None)
        jobs[f"{strategy} low frozen"] = (colossal(strategy, trainable="temporal", **LOW), None)
        jobs[f"{strategy} low resumed"] = (colossal(strategy, **LOW), start)
        jobs[f"{strategy} low single"] = (colossal(strategy, accumulate=1, **LOW), None)
        jobs[f"{strategy} low sequence"] = (colossal(strategy, sequence_parallel=2, **LOW), None)
        jobs[f"{strategy} low recompute"] = (colossal(strategy, activation_checkpointing="full", **LOW), None)
    pretended = [name for name in jobs if name.startswith(("zero", "gemini"))]
    return run_processes(tmp_path_factory.mktemp("colossalai"), jobs, str(PYTHON), pretended)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2"])
def test_colossalai_trains_as_one_device(strategy: str, together: dict[str, Result], alone: dict[str, Result]) -> None:
    assert_same(together[strategy], alone["plain"])
    assert_same(together[f"{strategy} frozen"], alone["frozen"])
    assert_same(together[f"{strategy} resumed"], alone["resumed"])
    assert_same(train(settings(), together[strategy]), alone["resumed"])
    assert together[f"{strategy} resumed"].kept
    assert together[strategy].held * 2 == pytest.approx(alone["plain"].held, rel=0.1)


@pytest.mark.parametrize("strategy", ["zero2", "gemini"])
@pytest.mark.parametrize("case", ["low", "low frozen", "low resumed", "low single", "low sequence", "low recompute"])
def test_colossalai_in_bfloat16_trains_like_one_device(
    case: str, strategy: str, together: dict[str, Result], alone: dict[str, Result]
) -> None:
    result, expected = together[f"{strategy} {case}"], alone[case]
    torch.testing.assert_close(result.losses, expected.losses, atol=0, rtol=0.02)
    torch.testing.assert_close(result.norms, expected.norms, atol=0, rtol=0.05)
    assert result.kept  # float32 masters are not rounded
    assert result.model.keys() == expected.model.keys()
    assert result.ema.keys() == expected.ema.keys()
    before, frozen = build_model().state_dict(), result.model.keys() - result.ema.keys()
    assert all(torch.equal(result.model[name], before[name]) for name in frozen)


def test_without_a_gpu_sharded_strategies_are_refused(together: dict[str, Result]) -> None:
    assert together["refused"].error.startswith("strategy gemini of ColossalAI needs a GPU, and none is visible here")


def test_without_colossalai_a_line_says_how_to_get_it() -> None:
    with pytest.raises(ConfigError, match="make setup-colossalai installs it"):
        build_engine(colossal("ddp"))
