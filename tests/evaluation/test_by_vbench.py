"""VBench's own prompts are generated five times, named as it looks for them, and give its total."""

import json
from pathlib import Path

import numpy as np
import pytest

from opensora.clip_file import write_clip
from opensora.config import ConfigError, EvaluateConfig, load_config
from opensora.evaluation.by_vbench import measure_by_vbench
from opensora.evaluation.plan import Plan, make_plan
from opensora.evaluation.prompts import evaluation_prompts
from opensora.metrics.vbench import DIMENSIONS, MEASURES, SAMPLES, final_scores
from opensora.metrics.vbench_runner import CUSTOM, NOT_SET
from tests.conftest import ROOT
from tests.metrics.vbench_environment import build_environment

PROMPTS = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering", "scene"]},
    {"prompt_en": "a person swimming in ocean", "dimension": ["dynamic_degree", "motion_smoothness"]},
]
# A score is the share of the videos asked for that are there.
VBENCH = """
import json, os

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.full_info, self.output = full_info_dir, output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, mode="vbench_standard"):
        names = list(prompt_list)
        if mode == "vbench_standard":
            with open(self.full_info) as handle:
                names = [f"{entry['prompt_en']}-{number}.mp4" for entry in json.load(handle) for number in range(5)]
        there = set(os.listdir(videos_path))
        score = len(there & set(names)) / max(len(names), len(there))
        with open(os.path.join(self.output, name + "_eval_results.json"), "w") as handle:
            json.dump({name: [score, []]}, handle)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_environment(tmp_path_factory.mktemp("vbench-total"), VBENCH, "0.1.5")


def config_with(**values: object) -> EvaluateConfig:
    return load_config(ROOT / "params.yaml", "smoke").evaluate.model_copy(update=values)


def benchmark(tmp_path: Path) -> str:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(PROMPTS))
    return str(path)


def clips_of(plan: Plan, folder: Path, frames: int = 4) -> list[dict]:
    """A clip of every prompt, and its row."""
    folder.mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (len(plan.prompts), frames, 32, 32, 3), dtype=np.uint8)
    files = [write_clip(folder / f"clip{number}", clip, 8).name for number, clip in enumerate(pictures)]
    return [{"file": file, "shape": [frames, 32, 32]} for file in files]


def test_its_prompts_come_five_times_with_a_seed_each(tmp_path: Path) -> None:
    config = config_with(prompts=(), prompts_file=benchmark(tmp_path), seed=7)
    pairs = evaluation_prompts(config)
    assert [seed for _, seed in pairs] == list(range(7, 7 + 2 * SAMPLES))
    assert [text for text, _ in pairs] == [entry["prompt_en"] for entry in PROMPTS for _ in range(SAMPLES)]
    with pytest.raises(ConfigError, match=r"measured alone; set evaluate\.prompts=\[\]"):
        evaluation_prompts(config.model_copy(update={"prompts": ("a cat",)}))
    Path(config.prompts_file).write_text("{}")
    with pytest.raises(ConfigError, match="expected a list of prompts"):
        evaluation_prompts(config)
    with pytest.raises(ConfigError, match=r"prompts_file: .*absent\.json"):
        evaluation_prompts(config.model_copy(update={"prompts_file": str(tmp_path / "absent.json")}))


def test_all_dimensions_give_the_total(environment: str, tmp_path: Path) -> None:
    config = config_with(prompts=(), prompts_file=benchmark(tmp_path), vbench=environment)
    plan = make_plan(config, None, {}, tmp_path / "cache")
    rows = clips_of(plan, tmp_path / "clips")
    metrics, absent = measure_by_vbench(plan, rows, tmp_path / "clips", tmp_path / "videos")
    assert absent == {}
    total = final_scores(dict.fromkeys(DIMENSIONS, 1.0))
    expected = dict.fromkeys(DIMENSIONS, 1.0) | total
    measured = {name.removeprefix("vbench_"): value for name, value in metrics.items() if name.startswith("vbench_")}
    assert measured == expected
    assert set(metrics) - {f"vbench_{name}" for name in expected} == set(MEASURES) - {"temporal_flickering_still"}

    alone = make_plan(config.model_copy(update={"vbench": ""}), None, {}, tmp_path / "cache")
    found, absent = measure_by_vbench(alone, rows, tmp_path / "clips", tmp_path / "videos")
    assert found == {name: value for name, value in metrics.items() if not name.startswith("vbench_")}
    assert absent == {"vbench": NOT_SET}


def test_other_prompts_have_six_dimensions_and_no_total(environment: str, tmp_path: Path) -> None:
    plan = make_plan(config_with(prompts=("a cat", "a dog"), vbench=environment), None, {}, tmp_path / "cache")
    rows = clips_of(plan, tmp_path / "clips")
    metrics, absent = measure_by_vbench(plan, rows, tmp_path / "clips", tmp_path / "videos")
    assert metrics == {f"vbench_{name}": 1.0 for name in CUSTOM}
    assert absent.keys() == {"vbench_total"}
    assert absent["vbench_total"].startswith("10 of 16 dimensions lack: temporal_flickering, ")

    kept = next((tmp_path / "clips").glob("vbench-*/dynamic_degree_eval_results.json"))
    kept.write_text('{"dynamic_degree": [0.5, []]}')  # what was measured once is not measured again
    again, _ = measure_by_vbench(plan, rows, tmp_path / "clips", tmp_path / "others")
    assert again["vbench_dynamic_degree"] == 0.5

    pictures = clips_of(plan, tmp_path / "pictures", frames=1)
    found = measure_by_vbench(plan, pictures, tmp_path / "pictures", tmp_path / "none")
    assert found == ({}, {"vbench": "the last stage makes pictures"})
