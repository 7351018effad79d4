"""Averages follow the live weights, need no copies of them, and refuse what does not fit."""

import pytest
import torch

from opensora.training.ema import Ema


def test_moves_by_the_share_that_the_decay_leaves() -> None:
    live = torch.tensor([1.0, 2.0])
    ema = Ema({"a": live}, decay=0.9)
    live.copy_(torch.tensor([2.0, 4.0]))
    ema.update(10_000)
    torch.testing.assert_close(ema.shares()["a"], torch.tensor([1.1, 2.2]))


def test_early_steps_forget_the_start() -> None:
    live = torch.zeros(1)
    ema = Ema({"a": live}, decay=0.9999)
    live.fill_(1.0)
    ema.update(0)
    torch.testing.assert_close(ema.shares()["a"], torch.tensor([0.9]))  # 1 − 1/10


def test_averages_are_float32_of_half_precision_weights_too() -> None:
    live = torch.ones(3, dtype=torch.bfloat16)
    ema = Ema({"a": live}, decay=0.999)
    live.fill_(2.0)
    for step in range(20_000, 20_010):
        ema.update(step)
    average = ema.shares()["a"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((3,), 2 - 0.999**10))


def test_a_process_that_holds_nothing_may_update() -> None:
    Ema({}, 0.9).update(3)


def test_averages_travel() -> None:
    live = {"a": torch.zeros(2), "b": torch.zeros(3)}
    ema = Ema(live, 0.9)
    ema.load({"a": torch.ones(2), "b": torch.full((3,), 2.0)})
    assert ema.shares()["b"].tolist() == [2.0, 2.0, 2.0]
    assert live["b"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "shares", [{"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(4)}, {"a": torch.ones(2), "c": torch.ones(3)}]
)
def test_averages_that_do_not_fit_are_named(shares: dict[str, torch.Tensor]) -> None:
    ema = Ema({"a": torch.zeros(2), "b": torch.zeros(3)}, 0.9)
    with pytest.raises(ValueError, match=r"averages do not fit.*\bb\b"):
        ema.load(shares)
    assert ema.shares()["a"].tolist() == [0.0, 0.0]  # nothing was taken over
