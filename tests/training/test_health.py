"""Health: spikes are seen and growth is not, and a rollback is remembered through a kill."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from opensora.config import TrainConfig
from opensora.step import StepError
from opensora.training.health import BAD_STEPS, NEVER_A_SPIKE, WARM_UP, Health

CONFIG = TrainConfig(spike_deviations=8.0, max_bad_steps=3, max_rollbacks=2)


def norms(count: int, deviation: float, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0, deviation, count))


def warm(folder: Path, deviation: float = 0.3, steps: int = 2 * WARM_UP, config: TrainConfig = CONFIG) -> Health:
    health = Health(config, folder)
    for norm in norms(steps, deviation):
        health.good(float(norm))
    return health


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(tmp_path: Path, value: float) -> None:
    health = Health(CONFIG.model_copy(update={"spike_deviations": None}), tmp_path)
    assert health.judge(1.0, 1.0) == "ok"
    assert health.judge(value, 1.0) == "skip"
    assert health.judge(1.0, value) == "skip"


@pytest.mark.parametrize(("deviation", "spike"), [(0.05, 5.0), (0.15, 10.0), (0.3, 30.0)])
def test_a_spike_is_skipped_and_growth_is_not(tmp_path: Path, deviation: float, spike: float) -> None:
    health = warm(tmp_path, deviation)
    assert health.judge(1.0, spike) == "skip"
    assert health.judge(1.0, NEVER_A_SPIKE * 0.9) == "ok"
    assert warm(tmp_path, 0.0).judge(1.0, NEVER_A_SPIKE * 0.99) == "ok"


def test_nothing_is_a_spike_before_there_is_enough_to_compare_with(tmp_path: Path) -> None:
    assert warm(tmp_path, steps=WARM_UP - 1).judge(1.0, 1e9) == "ok"
    assert warm(tmp_path, steps=WARM_UP).judge(1.0, 1e9) == "skip"
    assert warm(tmp_path, config=CONFIG.model_copy(update={"spike_deviations": None})).judge(1.0, 1e9) == "ok"


@pytest.mark.parametrize("deviation", [0.1, 0.5])
@pytest.mark.parametrize("change", [1e-3, 1e3])
def test_no_good_step_of_a_run_whose_norms_drift_far_is_skipped(
    tmp_path: Path, deviation: float, change: float
) -> None:
    health = Health(CONFIG, tmp_path)
    drift = change ** np.linspace(0, 1, 4000)
    for norm in norms(4000, deviation, seed=1) * drift * (1 + 50 * np.exp(-np.arange(4000) / 20)):
        assert health.judge(1.0, float(norm)) == "ok"
        health.good(float(norm))


def test_an_accepted_outlier_does_not_hide_the_next(tmp_path: Path) -> None:
    health = warm(tmp_path, 0.1)
    before = health.limit
    health.good(NEVER_A_SPIKE)
    assert health.limit < 1.1 * before


def test_steps_without_gradients_are_no_error(tmp_path: Path) -> None:
    health = Health(CONFIG, tmp_path)
    for _ in range(2 * WARM_UP):
        assert health.judge(1.0, 0.0) == "ok"
        health.good(0.0)
    assert health.limit < 1e-28


def bad(health: Health, step: int) -> None:
    health.bad(step, step + 10, [f"clip {step}"], math.nan, 2.0)


def test_a_bad_step_leaves_its_clips_and_changes_no_limit(tmp_path: Path) -> None:
    health = warm(tmp_path)
    before = health.limit
    bad(health, 7)
    assert health.limit == before
    (line,) = [json.loads(text) for text in (tmp_path / BAD_STEPS).read_text().splitlines()]
    assert line == {
        "step": 7,
        "position": 17,
        "loss": "nan",
        "gradient_norm": 2.0,
        "largest_norm": before,
        "clip_ids": ["clip 7"],
    }


def test_enough_bad_steps_in_a_row_go_back_past_their_data(tmp_path: Path) -> None:
    health = Health(CONFIG, tmp_path)
    for step in (1, 2):
        bad(health, step)
    health.good(1.0)
    for step in (4, 5, 6):
        assert not health.must_roll_back
        bad(health, step)
    assert health.must_roll_back
    assert health.first_bad_step == 4
    health.roll_back(3)
    assert health.skip == {14, 15, 16}
    assert not health.must_roll_back
    again = Health(CONFIG, tmp_path)  # as after a kill, whatever the newest checkpoint is
    assert (again.skip, again.rollbacks) == (health.skip, 1)


def test_a_run_that_goes_back_too_often_ends_with_advice(tmp_path: Path) -> None:
    health = Health(CONFIG, tmp_path)
    for start in (0, 10):
        for step in range(start, start + 3):
            bad(health, step)
        health.roll_back(start)
    again = Health(CONFIG, tmp_path)
    for step in range(20, 23):
        bad(again, step)
    with pytest.raises(StepError, match=r"steps 20 to 22 were bad, and the run has gone back 2 times .*; lower lr"):
        again.roll_back(20)


def test_a_resumed_run_judges_as_one_never_stopped(tmp_path: Path) -> None:
    health = warm(tmp_path)
    bad(health, 200)
    bad(health, 201)
    resumed = Health(CONFIG, tmp_path)
    resumed.load_state_dict(json.loads(json.dumps(health.state_dict())))
    assert resumed.limit == health.limit
    for one in (health, resumed):
        bad(one, 202)
        assert (one.must_roll_back, one.first_bad_step) == (True, 200)


def test_what_a_checkpoint_keeps_is_not_changed_by_later_steps(tmp_path: Path) -> None:
    health = warm(tmp_path)
    bad(health, 200)
    kept = health.state_dict()
    before = json.dumps(kept)
    bad(health, 201)
    health.good(1.0)
    assert json.dumps(kept) == before


def test_a_line_that_a_kill_tore_is_passed_over(tmp_path: Path) -> None:
    health = Health(CONFIG, tmp_path)
    for step in range(3):
        bad(health, step)
    health.roll_back(0)
    path = tmp_path / BAD_STEPS
    path.write_bytes(path.read_bytes() + b'{"step": 9, "posi')
    again = Health(CONFIG, tmp_path)
    assert again.skip == {10, 11, 12}
    bad(again, 9)
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 9
    assert Health(CONFIG, tmp_path).skip == {10, 11, 12}


def test_one_process_writes_and_all_pass_over_the_same(tmp_path: Path) -> None:
    ranks = [Health(CONFIG, tmp_path, rank) for rank in (1, 0)]
    for step in range(3):
        for health in ranks:
            bad(health, step)
    for health in ranks:
        health.roll_back(0)
    assert ranks[0].skip == ranks[1].skip == {10, 11, 12}
    assert len((tmp_path / BAD_STEPS).read_text().splitlines()) == 4
