"""The adapter against an environment whose package `vbench` has VBench's interface and files, but no models."""

import json
import os
import sys
import time
import venv
from pathlib import Path

import pytest

from opensora.metrics.vbench_runner import NOT_SET, read_score, run_vbench, why_not

TORCH = """
device = str
class cuda:
    is_available = staticmethod(lambda: False)
"""
# Its evaluate does what each dimension's name is taken for below.
VBENCH = """
import json, os, subprocess, sys, time

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.full_info, self.output = device, full_info_dir, output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, mode="vbench_standard"):
        print("started", name, flush=True)
        if name == "scene":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            with open("pids", "w") as handle:
                handle.write(f"{os.getpid()} {child.pid}")
            time.sleep(600)
        if name == "color":
            raise ImportError("No module named 'detectron2'")
        if name == "human_action":
            return
        score = float("nan") if name == "aesthetic_quality" else 0.25
        seen = {"mode": mode, "prompts": prompt_list, "device": self.device, "full_info": self.full_info}
        seen |= {"proxy": os.environ.get("https_proxy", ""), "path": os.environ.get("PYTHONPATH") in sys.path}
        videos = [{"video_path": os.path.join(videos_path, v), "video_results": 0.25} for v in os.listdir(videos_path)]
        with open(os.path.join(self.output, name + "_eval_results.json"), "w") as handle:
            json.dump({name: [score, videos], "seen": seen}, handle)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The python of an environment of its own."""
    folder = tmp_path_factory.mktemp("vbench-environment")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "vbench").mkdir()
    (packages / "vbench" / "__init__.py").write_text(VBENCH)
    (packages / "torch.py").write_text(TORCH)
    return str(folder / "bin" / "python")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "000.mp4").touch()
    return folder


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_where_it_cannot_run(environment: str, tmp_path: Path, videos: Path) -> None:
    assert why_not(environment) == ""
    assert why_not("") == NOT_SET
    assert "cannot be run" in why_not(str(tmp_path / "absent"))
    outcome = run_vbench(sys.executable, videos, tmp_path / "out", ["scene"])
    assert outcome.scores == {}
    assert "has no package vbench" in outcome.absent["scene"]
    with pytest.raises(ValueError, match=r"\['colour'\] are no dimensions"):
        run_vbench(environment, videos, tmp_path / "out", ["colour"])


def test_scores_and_reasons(environment: str, tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # ours must not reach the other environment
    out, prompts = tmp_path / "out", {"000.mp4": "a red circle"}
    names = ["subject_consistency", "color", "human_action", "aesthetic_quality", "imaging_quality"]
    outcome = run_vbench(environment, videos, out, names, prompts=prompts)
    assert outcome.scores == {"subject_consistency": 0.25, "imaging_quality": 0.25}
    assert outcome.absent.keys() == {"color", "human_action", "aesthetic_quality"}
    assert "No module named 'detectron2'" in outcome.absent["color"]
    assert "left no human_action_eval_results.json" in outcome.absent["human_action"]
    assert "score nan" in outcome.absent["aesthetic_quality"]
    assert (out / "color.log").read_text().startswith("started color")
    seen = json.loads((out / "imaging_quality_eval_results.json").read_text())["seen"]
    assert seen == {
        "mode": "custom_input",
        "prompts": prompts,
        "device": "cpu",
        "full_info": "",
        "proxy": "http://127.0.0.1:9",
        "path": False,
    }
    (out / "imaging_quality_eval_results.json").write_text('{"imaging_quality": [0.5, []]}')
    again = run_vbench(environment, videos, out, ["imaging_quality"])
    assert again.scores == {"imaging_quality": 0.5}  # what is there is not run again


def test_its_own_prompts(environment: str, tmp_path: Path, videos: Path) -> None:
    info = tmp_path / "VBench_full_info.json"
    info.write_text("[]")
    outcome = run_vbench(environment, videos, tmp_path / "out", ["dynamic_degree"], full_info=info, offline=False)
    assert outcome.scores == {"dynamic_degree": 0.25}
    seen = json.loads((tmp_path / "out" / "dynamic_degree_eval_results.json").read_text())["seen"]
    assert (seen["mode"], seen["prompts"], seen["full_info"]) == ("vbench_standard", [], str(info))
    assert seen["proxy"] == os.environ.get("https_proxy", "")


def test_a_dimension_that_hangs_costs_itself_alone(environment: str, tmp_path: Path, videos: Path) -> None:
    out = tmp_path / "out"
    outcome = run_vbench(environment, videos, out, ["scene", "dynamic_degree"], timeout_s=20)
    assert outcome.scores == {"dynamic_degree": 0.25}
    assert "took longer than 20 s" in outcome.absent["scene"]
    pids = [int(pid) for pid in (out / "pids").read_text().split()]
    limit = time.monotonic() + 60
    while not all(is_gone(pid) for pid in pids) and time.monotonic() < limit:
        time.sleep(0.05)
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize("content", ["{", "{}", '{"scene": []}', '{"scene": 3}', "[1]"])
def test_results_of_another_form(tmp_path: Path, content: str) -> None:
    path = tmp_path / "scene_eval_results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="holds no score of scene; delete it"):
        read_score(path, "scene")
