"""Memory is counted before anything is loaded, and what would fit is said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opensora import generation_memory
from opensora.generation_memory import GIB, Generation, MemoryShort, check_memory, text_encoder_bytes
from opensora.models.stdit import STDiT, STDiTConfig

XL = STDiTConfig((64, 64, 64))


def asked(vae: Path, text_encoder: Path, **changes: object) -> Generation:
    values = {"model": XL, "batch_size": 4, "guided": True, "dtype": "float32", "vae_scale": 8} | changes
    return Generation(vae=vae, text_encoder=text_encoder, text_dtype="bfloat16", **values)  # type: ignore[arg-type]


def test_the_model_s_bytes_are_its_parameters(vae: Path, text_encoder: Path) -> None:
    parts = asked(vae, text_encoder, dtype="bfloat16").parts()
    assert parts["sampling"]["model"] == 759_620_768 * 2


def test_the_text_encoder_s_bytes_are_its_parameters(text_encoder: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    for kind in ("relu", "gated-gelu"):
        config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=2, feed_forward_proj=kind)
        config.save_pretrained(tmp_path)
        matrices = sum(value.numel() for value in T5EncoderModel(config).parameters() if value.ndim == 2)
        tables = 32 * 2  # of relative positions, not counted
        assert text_encoder_bytes(tmp_path, 4) == 4 * (matrices - tables)
    xxl = {"model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "num_heads": 64, "num_layers": 24}
    (tmp_path / "config.json").write_text(json.dumps(xxl | {"d_ff": 10240, "feed_forward_proj": "gated-gelu"}))
    assert 8.5 * GIB < text_encoder_bytes(tmp_path, 2) < 9 * GIB


def test_activations_are_what_a_block_really_holds() -> None:
    """The peak of a pass without gradients, counted tensor by tensor, is within a tenth of the estimate."""
    config = STDiTConfig((4, 32, 32), hidden_size=128, depth=2, num_heads=4, caption_channels=32)
    model = STDiT(config).eval()
    inputs = torch.randn(2, 4, 4, 32, 32), torch.tensor([1.0, 2.0]), torch.randn(2, 1, 8, 32)
    with torch.no_grad(), Live() as live:
        model(*inputs)
    tokens = 2 * 4 * 16 * 16
    assert live.peak == pytest.approx(generation_memory.LIVE_TENSORS * tokens * 128 * 4, rel=0.1)


class Live(torch.overrides.TorchFunctionMode):
    """Counts the bytes of the tensors that functions made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, int] = {}

    def __torch_function__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        import weakref

        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage().data_ptr() in self.seen:
                continue
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            self.seen[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.seen.pop(key, 0)


@pytest.mark.parametrize(
    ("free_gib", "expected"),
    [
        (1000.0, None),
        (20.0, "--batch-size 2"),
        (10.0, "--batch-size 1"),
        (6.0, "--batch-size 1 --dtype bfloat16"),
        (4.0, "--batch-size 1 --dtype bfloat16 --frames "),
        (1.0, "no smaller setting"),
    ],
)
def test_too_little_memory_is_said_with_what_would_fit(
    vae: Path, text_encoder: Path, monkeypatch: pytest.MonkeyPatch, free_gib: float, expected: str | None
) -> None:
    monkeypatch.setattr(generation_memory, "free_memory", lambda device: free_gib * GIB)
    generation = asked(vae, text_encoder)
    if expected is None:
        check_memory(generation, "cpu")
        return
    with pytest.raises(MemoryShort) as error:
        check_memory(generation, "cpu")
    assert expected in str(error.value)
    assert f"{free_gib:.1f} GiB are free on cpu" in str(error.value)
    assert "model 2.8" in str(error.value)


def test_less_is_needed_for_less(vae: Path, text_encoder: Path) -> None:
    one = asked(vae, text_encoder, batch_size=1)
    assert asked(vae, text_encoder).peak() > one.peak() > replace(one, guided=False).peak()
    assert one.peak() > replace(one, model=replace(XL, input_size=(16, 64, 64))).peak()


def test_free_memory_is_that_of_the_machine() -> None:
    import psutil

    assert 0 < generation_memory.free_memory("cpu") <= psutil.virtual_memory().total
