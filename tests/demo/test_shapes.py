"""The renderer and the detector agree, and captions and held-out combinations are what they claim."""

from collections import Counter

import numpy as np
import pytest

from opensora.demo.shapes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Detection,
    all_scenes,
    detect,
    held_out_scenes,
    parse_caption,
    render_clip,
)


@pytest.mark.parametrize(("size", "frames"), [(32, 8), (64, 8), (32, 16)])
def test_detector_reads_every_scene(size: int, frames: int) -> None:
    rng = np.random.default_rng(size + frames)
    for scene in all_scenes():
        clip = render_clip(scene, frames, size, rng)
        assert clip.shape == (frames, size, size, 3)
        assert clip.dtype == np.uint8
        assert detect(clip) == Detection(scene.colour, scene.shape, scene.direction)


def test_detector_sees_nothing_where_nothing_is() -> None:
    grey = np.full((8, 32, 32, 3), 50, dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 60, (8, 32, 32, 3), dtype=np.uint8)
    assert detect(grey) == Detection(None, None, None)
    assert detect(noise) == Detection(None, None, None)


def test_still_object_has_no_direction() -> None:
    scene = all_scenes()[0]
    clip = render_clip(scene, 8, 32, np.random.default_rng(0))
    assert detect(clip[:1]) == Detection(scene.colour, scene.shape, None)
    assert detect(np.repeat(clip[:1], 8, axis=0)) == Detection(scene.colour, scene.shape, None)


def test_same_seed_same_pixels() -> None:
    scene = all_scenes()[7]
    one, two, other = (render_clip(scene, 8, 32, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_captions_parse_back() -> None:
    scenes = all_scenes()
    assert len({scene.caption for scene in scenes}) == 48
    assert all(parse_caption(scene.caption) == scene for scene in scenes)
    assert parse_caption("  A Red  CIRCLE moving left. ") == scenes[0]
    for text in ("", "a red circle", "a pink circle moving left", "a red circle moving left now"):
        assert parse_caption(text) is None


def test_held_out_scenes_are_balanced_and_learnable() -> None:
    held = held_out_scenes()
    assert len(set(held)) == 8
    assert set(Counter(scene.colour for scene in held).values()) == {2}
    assert set(Counter(scene.direction for scene in held).values()) == {2}
    assert {scene.shape for scene in held} == set(SHAPES)
    seen = set(all_scenes()) - set(held)
    for pair in ("colour", "shape"), ("colour", "direction"), ("shape", "direction"):
        pairs = {tuple(getattr(scene, name) for name in pair) for scene in seen}
        sizes = {"colour": len(COLOURS), "shape": len(SHAPES), "direction": len(DIRECTIONS)}
        assert len(pairs) == sizes[pair[0]] * sizes[pair[1]]
