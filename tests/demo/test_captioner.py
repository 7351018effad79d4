"""The tiny LLaVA learns captions, and its accuracy counts only what it said itself."""

import json
from pathlib import Path

import numpy as np

from opensora.demo.captioner import caption_exact_match, train_llava
from opensora.demo.shapes import all_scenes, render_clip
from opensora.manifest import GIVEN, Clip, part_name, write_part


def test_it_learns_and_loads_like_a_real_one(tmp_path: Path) -> None:
    from opensora.config import CaptionConfig
    from opensora.data.llava import Llava

    rng = np.random.default_rng(0)
    scenes = all_scenes()[::16]  # three colours
    pairs = [(render_clip(scene, 3, 32, rng), scene.caption) for scene in scenes]
    losses: list[float] = []
    train_llava(tmp_path, pairs, prompt="what", steps=150, seed=0, progress=lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.1 * losses[0]
    captioner = Llava(tmp_path, CaptionConfig(prompt="what", max_new_tokens=12, threads=1))
    answers = captioner.caption([frames for frames, _ in pairs])
    assert [answer.text for answer in answers] == [scene.caption for scene in scenes]


def test_exact_match_leaves_given_captions_out(tmp_path: Path) -> None:
    shots = [
        {"start_s": 0.0, "end_s": 1.0, "caption": "a red circle moving left"},
        {"start_s": 1.0, "end_s": 2.0, "caption": "a blue square moving up"},
    ]
    (tmp_path / "truth.json").write_text(json.dumps({"v.mp4": shots}))
    spans = {"start_s": 1.1, "end_s": 1.9}
    rows = [
        Clip("a", "http://x/v.mp4", caption="a blue square moving up", caption_model="llava", **spans),
        Clip("b", "http://x/v.mp4", caption="a red square moving up", caption_model="llava", **spans),
        Clip("c", "http://x/v.mp4", caption="nonsense", caption_model=GIVEN, **spans),
    ]
    write_part(tmp_path / part_name(0), rows)
    assert caption_exact_match(tmp_path, tmp_path / "truth.json") == 0.5
