"""One parent a chain and one child a step, also when processes of several pods begin at the same moment."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from opensora.tracking.chains import finish_step, join_chain

STEPS = [f"step{number}" for number in range(12)]


def join(base: Path, step: str) -> str:
    folder = base.parent / step
    folder.mkdir(parents=True, exist_ok=True)
    return join_chain(base, step, folder)[0].parent.name


def test_steps_that_begin_at_once_share_a_parent(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, get_context("spawn")) as pool:
        chains = list(pool.map(join, [tmp_path / ".mlflow"] * len(STEPS), STEPS))
    assert len(set(chains)) == 1
    state = json.loads((tmp_path / ".mlflow" / "current.json").read_text())
    assert set(state["steps"]) == set(STEPS)


def test_a_stopped_step_goes_on_in_its_run_though_another_chain_has_begun(tmp_path: Path) -> None:
    base = tmp_path / ".mlflow"
    first = join(base, "train_image")
    finish_step(base / first / "train_image")
    assert join(base, "train_video") == first  # and is killed
    second = join(base, "train_image")
    assert second != first
    assert join(base, "train_video") == first
    finish_step(base / first / "train_video")
    assert join(base, "train_video") == second


def test_a_step_whose_work_was_thrown_away_begins_anew(tmp_path: Path) -> None:
    base = tmp_path / ".mlflow"
    first = join(base, "evaluate")
    (tmp_path / "evaluate" / "tracking.json").unlink()  # other values: its folder was emptied
    assert join(base, "evaluate") != first


def test_the_end_of_an_older_run_does_not_end_the_newer(tmp_path: Path) -> None:
    base = tmp_path / ".mlflow"
    first = join(base, "promote")
    (tmp_path / "promote" / "tracking.json").unlink()
    second = join(base, "promote")
    finish_step(base / first / "promote")
    assert join(base, "promote") == second


def test_a_state_of_another_version_begins_a_chain(tmp_path: Path) -> None:
    base = tmp_path / ".mlflow"
    base.mkdir()
    for text in ('{"group": "a", "steps": {"evaluate": "open"}}', "{", '{"chain": "a", "steps": []}'):
        (base / "current.json").write_text(text)
        assert len(join(base, "evaluate")) == 12
