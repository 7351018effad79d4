"""ColossalAI's sharded strategies on a real GPU, in one process, against PyTorch's engine there."""

import pytest
import torch

from tests.parallel.engine_training import Result, train
from tests.parallel.test_engines import assert_same, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]
LOW = {"dtype": "bfloat16"}


@pytest.fixture(scope="module", autouse=True)
def colossalai() -> None:
    pytest.importorskip("colossalai", reason="ColossalAI is not installed: make setup-colossalai")


@pytest.fixture(scope="module")
def start() -> Result:
    return train(settings())


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2"])
def test_float32_equals_torch(strategy: str, start: Result) -> None:
    config = settings(engine="colossalai", strategy=strategy)
    result = train(config)
    assert_same(result, start)
    resumed = train(config, result)
    assert resumed.kept
    assert_same(resumed, train(settings(), start))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "gemini"])
def test_bfloat16_trains_like_torch(strategy: str, accumulate: int) -> None:
    plain = settings(accumulate=accumulate, **LOW)
    config = settings(engine="colossalai", strategy=strategy, accumulate=accumulate, **LOW)
    first, expected = train(config), train(plain)
    second, further = train(config, first), train(plain, expected)
    for result, reference in ((first, expected), (second, further)):
        torch.testing.assert_close(result.losses, reference.losses, atol=0, rtol=0.02)
        torch.testing.assert_close(result.norms, reference.norms, atol=0, rtol=0.05)
    assert second.kept  # float32 masters and moments came back unrounded
