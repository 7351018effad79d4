"""TransNetV2 by a small ONNX file that answers by the difference of frames, so that its answers are known."""

from pathlib import Path

import numpy as np
import pytest

from opensora.config import SplitConfig
from opensora.data.cut import ClipWriter
from opensora.data.detectors import TransNetV2, check_transnetv2
from opensora.data.shots import scan_video
from opensora.weights import WeightsError

HEIGHT, WIDTH = 27, 48


@pytest.fixture(scope="module")
def transnetv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`output` of a frame is the mean difference from the next one over 100, within its window; as in the real file,
    the last frame before a cut is high."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    def numbers(name: str, *values: int) -> object:
        return numpy_helper.from_array(np.array(values, np.int64), name)

    nodes = [
        helper.make_node("Cast", ["input"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Slice", ["x", "one", "end", "time"], ["later"]),
        helper.make_node("Slice", ["x", "zero", "last", "time"], ["earlier"]),
        helper.make_node("Sub", ["later", "earlier"], ["difference"]),
        helper.make_node("Abs", ["difference"], ["size"]),
        helper.make_node("ReduceMean", ["size"], ["mean"], axes=[2, 3, 4], keepdims=0),
        helper.make_node("Pad", ["mean", "pads"], ["padded"]),
        helper.make_node("Div", ["padded", "hundred"], ["share"]),
        helper.make_node("Unsqueeze", ["share", "two"], ["output"]),
    ]
    given = [
        *[numbers("one", 1), numbers("end", 1 << 40), numbers("zero", 0), numbers("last", -1), numbers("time", 1)],
        *[numbers("pads", 0, 0, 0, 1), numbers("two", 2)],
        numpy_helper.from_array(np.array(100, np.float32), "hundred"),
    ]
    frames = helper.make_tensor_value_info("input", TensorProto.UINT8, [2, 100, HEIGHT, WIDTH, 3])
    scores = helper.make_tensor_value_info("output", TensorProto.FLOAT, [2, 100, 1])
    graph = helper.make_graph(nodes, "difference", [frames], [scores], given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path = tmp_path_factory.mktemp("onnx") / "transnetv2.onnx"
    onnx.save(model, path)
    return path


def shots(detector: TransNetV2, levels: list[int]) -> list[tuple[int, int]]:
    """Of frames of these grey levels."""
    for level in levels:
        detector.push(np.full((HEIGHT, WIDTH, 3), level, np.uint8))
    return detector.shots(len(levels))


@pytest.mark.parametrize("edges", [[0, 40], [0, 24, 49, 50 + 25, 124, 125 + 25, 230], [0, 100, 200, 300], [0, 333]])
def test_hard_cuts_are_found_wherever_a_window_begins(transnetv2: Path, edges: list[int]) -> None:
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    levels = [20 + 120 * (number % 2) for number, (start, end) in enumerate(spans) for _ in range(start, end)]
    assert shots(TransNetV2(transnetv2, 0.5, 5), levels) == spans


def test_a_gradual_transition_lies_in_no_shot(transnetv2: Path) -> None:
    levels = [10] * 60 + [70, 130, 190] + [250] * 60
    assert shots(TransNetV2(transnetv2, 0.5, 5), levels) == [(0, 60), (63, 123)]
    assert shots(TransNetV2(transnetv2, 0.7, 5), levels) == [(0, 123)]  # 60 levels from frame to frame


def test_a_shot_that_is_too_short_is_merged(transnetv2: Path) -> None:
    levels = [20] * 40 + [140] * 3 + [20] * 40
    assert shots(TransNetV2(transnetv2, 0.5, 5), levels) == [(0, 40), (40, 83)]
    assert shots(TransNetV2(transnetv2, 0.5, 3), levels) == [(0, 40), (40, 43), (43, 83)]


def test_a_video_is_scanned_by_it(transnetv2: Path, tmp_path: Path) -> None:
    from fractions import Fraction

    writer = ClipWriter(tmp_path / "a.mp4", 96, 64, Fraction(24), crf=10, gop=30)
    for level in [30] * 30 + [200] * 90 + [60] * 20:
        writer.add_rgb(np.full((64, 96, 3), level, np.uint8))
    writer.finish()
    scan = scan_video(tmp_path / "a.mp4", SplitConfig(detector="transnetv2"), transnetv2)
    assert scan.shots == [(0, 30), (30, 120), (120, 140)]


def test_another_file_is_refused_before_any_video(transnetv2: Path, tmp_path: Path) -> None:
    import onnx

    check_transnetv2(transnetv2)
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(WeightsError, match="no ONNX file that can be read"):
        check_transnetv2(tmp_path / "text.onnx")
    model = onnx.load(transnetv2)
    model.graph.node[-1].input[0] = "mean"  # 99 frames of 100
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 99
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(WeightsError, match=r"`output` is \[2, 99, 1\], expected \[2, 100, 1\]"):
        check_transnetv2(tmp_path / "other.onnx")
    model.graph.input[0].name = model.graph.node[0].input[0] = "frames"
    onnx.save(model, tmp_path / "named.onnx")
    with pytest.raises(WeightsError, match="no TransNetV2"):
        check_transnetv2(tmp_path / "named.onnx")
