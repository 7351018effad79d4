"""The frame VAE: shapes, scaling, micro-batches that bound memory, tiles without seams, and damaged folders."""

import json
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from opensora.models import vae as vae_module
from opensora.models.vae import FrameVAE, SharedNorms, cut, load_autoencoder
from opensora.weights import WeightsError

SAFETENSORS = "diffusion_pytorch_model.safetensors"
BIN = "diffusion_pytorch_model.bin"


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """A frame uint8 [H, W, 3] of soft colours with a fine texture in some stripes."""
    rng = np.random.default_rng(seed)
    spots = torch.from_numpy(rng.uniform(0, 1, (1, 3, max(2, height // 24), max(2, width // 24))))
    soft = nn.functional.interpolate(spots, size=(height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    y, x = np.mgrid[:height, :width]
    texture = np.sin(x * rng.uniform(0.3, 1)) * np.sin(y * rng.uniform(0.3, 1)) * (np.sin(x / 20) > 0)
    return ((soft + 0.12 * texture[..., None]).clip(0, 1) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VAE of four pixels a latent that has learnt soft pictures with some texture."""
    from opensora.demo.autoencoder import train_vae

    frames = torch.from_numpy(np.stack([picture(64, 64, seed) for seed in range(64)])).permute(0, 3, 1, 2).contiguous()
    folder = tmp_path_factory.mktemp("trained")
    train_vae(frames, steps=150, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(vae: Path, tmp_path: Path) -> Path:
    """A copy of the untrained VAE's folder, for a test to damage."""
    return Path(shutil.copytree(vae, tmp_path / "vae"))


def miniature(folder: Path, **changes: object) -> Path:
    """A folder with an untrained VAE like Stable Diffusion's: eight pixels a latent, attention in the middle."""
    from diffusers import AutoencoderKL

    settings = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            **(settings | changes),
        ).save_pretrained(folder)
    return folder


def test_encode_and_decode_work_frame_by_frame(vae: Path) -> None:
    model = FrameVAE(vae)
    frames = noise(5, 32, 48, 3)
    mean, deviation = model.encode(frames, micro_batch=2)
    assert (model.scale, model.channels) == (4, 4)
    assert mean.shape == deviation.shape == (5, 4, 8, 12)
    assert (deviation > 0).all()
    alone, _ = model.encode(frames[3:4])
    torch.testing.assert_close(alone[0], mean[3], atol=1e-5, rtol=1e-4)

    video = model.decode(mean.transpose(0, 1)[None], micro_batch=3)
    assert video.shape == (1, 5, 32, 48, 3)
    assert video.dtype == np.uint8
    one = model.decode(mean[3:4].transpose(0, 1)[None])
    assert np.abs(one[0, 0].astype(int) - video[0, 3]).max() <= 1


def test_the_scaling_factor_is_applied_both_ways(vae: Path) -> None:
    model = FrameVAE(vae)
    frames = np.full((1, 32, 32, 3), 90, np.uint8)
    mean, _ = model.encode(frames)
    before = model.decode(mean.transpose(0, 1)[None])
    model.factor *= 3
    scaled, _ = model.encode(frames)
    torch.testing.assert_close(scaled, 3 * mean, atol=1e-5, rtol=1e-4)
    assert np.abs(model.decode(scaled.transpose(0, 1)[None]).astype(int) - before).max() <= 1


def test_factor_shift_and_channels_come_from_the_config(tmp_path: Path) -> None:
    folder = miniature(tmp_path / "vae", latent_channels=6, scaling_factor=0.5, shift_factor=2.0)
    model = FrameVAE(folder)
    assert (model.scale, model.channels, model.factor, model.shift) == (8, 6, 0.5, 2.0)
    frames = noise(2, 16, 24, 3)
    mean, deviation = model.encode(frames)
    with torch.no_grad():
        raw = model.vae.encode(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
        pixels = model.vae.decode(raw.mean).sample
    torch.testing.assert_close(mean, (raw.mean - 2) * 0.5)
    torch.testing.assert_close(deviation, raw.std * 0.5)  # a shift moves no spread
    expected = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    made = model.decode(mean.transpose(0, 1)[None])[0]
    assert np.abs(made.astype(int) - expected).max() <= 1


def test_a_bf16_vae_says_nearly_the_same(vae: Path, capsys: pytest.CaptureFixture) -> None:
    exact, coarse = FrameVAE(vae), FrameVAE(vae, dtype=torch.bfloat16)
    assert next(coarse.vae.parameters()).dtype == torch.bfloat16
    frames = noise(2, 32, 32, 3)
    (mean, _), (other, deviation) = exact.encode(frames), coarse.encode(frames)
    assert other.dtype == deviation.dtype == torch.float32
    torch.testing.assert_close(other, mean, atol=0.05 * float(mean.abs().max()), rtol=0)
    latents = mean.transpose(0, 1)[None]
    assert np.abs(coarse.decode(latents.bfloat16()).astype(int) - exact.decode(latents)).max() <= 8
    assert "float32" not in capsys.readouterr().err  # no warning of diffusers about a cast


def test_sizes_that_do_not_fit_are_named_with_the_nearest_that_do(vae: Path) -> None:
    model = FrameVAE(vae)
    with pytest.raises(ValueError, match=r"33x50 pixels .* 4 pixels a latent.* is 32x48"):
        model.encode(noise(1, 33, 50, 3))
    with pytest.raises(ValueError, match="nearest size that does is 4x4"):
        model.encode(noise(1, 1, 4, 3))
    with pytest.raises(ValueError, match=r"uint8 \[M, H, W, 3\], got float64 \[1, 4, 4, 3\]"):
        model.encode(noise(1, 4, 4, 3).astype(float))
    with pytest.raises(ValueError, match=r"\[B, 4, T, h, w\], got \[1, 3, 2, 4, 4\]"):
        model.decode(torch.zeros(1, 3, 2, 4, 4))
    with pytest.raises(ValueError, match="micro_batch must be at least 1"):
        model.decode(torch.zeros(1, 4, 2, 4, 4), micro_batch=-1)


class Seen:
    """The shapes of what a VAE's decoder and encoder are given."""

    def __init__(self, model: FrameVAE) -> None:
        self.decoded: list[tuple[int, ...]] = []
        self.encoded: list[tuple[int, ...]] = []
        model.vae.decoder.register_forward_pre_hook(lambda _, inputs: self.decoded.append(tuple(inputs[0].shape)))
        model.vae.encoder.register_forward_pre_hook(lambda _, inputs: self.encoded.append(tuple(inputs[0].shape)))


def test_micro_batches_hold_a_budget_of_pixels_and_change_nothing(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FrameVAE(vae)
    seen = Seen(model)
    frames = noise(7, 32, 32, 3)
    whole, spread = model.encode(frames)
    video = model.decode(whole.transpose(0, 1)[None])
    assert (len(seen.encoded), len(seen.decoded)) == (1, 1)

    monkeypatch.setattr(vae_module, "BATCH_PIXELS", 3 * 32 * 32 + 5)
    mean, deviation = model.encode(frames)
    parts = model.decode(whole.transpose(0, 1)[None])
    assert [shape[0] for shape in seen.encoded[1:]] == [shape[0] for shape in seen.decoded[1:]] == [3, 3, 1]
    torch.testing.assert_close(mean, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(deviation, spread, atol=1e-5, rtol=1e-4)
    assert np.abs(parts.astype(int) - video).max() <= 1

    model.decode(whole.transpose(0, 1)[None], micro_batch=5)  # what the caller asks for wins
    assert [shape[0] for shape in seen.decoded[4:]] == [5, 2]
    model.decode(torch.zeros(1, 4, 2, 32, 32))  # larger than the budget: one at a time
    assert [shape[0] for shape in seen.decoded[6:]] == [1, 1]


def test_the_default_budget_suits_frames_of_all_sizes(vae: Path) -> None:
    model = FrameVAE(vae)
    assert model._frames_at_once(64, 64, None) == 256
    assert model._frames_at_once(512, 512, None) == 4
    assert model._frames_at_once(1080, 1920, None) == 1
    assert model.tile >= 512


@pytest.mark.parametrize("size", [1, 5, 24, 25, 26, 41, 47, 48, 49, 100, 101, 240])
@pytest.mark.parametrize(("overlap", "unit"), [(8, 4), (8, 1), (1, 8), (0, 1), (11, 2)])
def test_tiles_are_alike_and_add_up(size: int, overlap: int, unit: int) -> None:
    spans = cut(size, 24, overlap, unit)
    assert {span.length for span in spans} == {spans[0].length}
    assert spans[0].length <= 24
    assert spans[0].start == 0
    assert spans[-1].start + spans[-1].length == size
    assert all(first.start + first.length - second.start >= overlap for first, second in pairwise(spans))
    assert len(spans) == 1 or spans[0].length >= 24 // 2  # no slivers
    total = torch.zeros(size * unit)
    for span in spans:
        total[span.part(unit)] += span.fade
    torch.testing.assert_close(total, torch.ones_like(total))


def border_jump(frame: np.ndarray, rows: list[int], columns: list[int]) -> float:
    """Mean difference of the pixels on both sides of rows and columns of a frame uint8 [H, W, 3], grey levels."""
    levels = frame.astype(float)
    across = [np.abs(levels[row] - levels[row - 1]).mean() for row in rows]
    along = [np.abs(levels[:, column] - levels[:, column - 1]).mean() for column in columns]
    return float(np.mean(across + along))


def borders(size: int, model: FrameVAE) -> list[int]:
    """Pixels where a tile begins or ends in a frame's height or width of `size` latents, and where its fade does."""
    spans = cut(size, model.tile // model.scale, model.overlap // model.scale, model.scale)
    places = set()
    for span in spans:
        first, last = span.start * model.scale, (span.start + span.length) * model.scale
        inside = [place + first for place in range(1, len(span.fade)) if not span.fade[place - 1 : place + 1].prod()]
        places |= {first, last, *inside[:1], *inside[-1:]}
    return sorted(place for place in places if 0 < place < size * model.scale)


@pytest.mark.parametrize("seed", [1000, 1001])
def test_tiles_leave_no_seams(trained: Path, seed: int) -> None:
    model = FrameVAE(trained)
    frame = picture(212, 268, seed)  # 53 by 67 latents, which no grid of tiles divides
    mean, _ = model.encode(frame[None])
    latents = mean.transpose(0, 1)[None]
    whole = model.decode(latents)[0, 0]
    model.tile, model.overlap = 96, 32
    seen = Seen(model)
    tiled = model.decode(latents)[0, 0]
    assert max(max(shape[2:]) for shape in seen.decoded) <= 96 // 4  # memory is a tile's
    assert tiled.shape == whole.shape
    error = np.abs(tiled.astype(float) - whole)
    assert error.mean() < 4
    assert np.quantile(error, 0.99) < 25
    rows, columns = borders(53, model), borders(67, model)
    assert len(rows) >= 4
    assert border_jump(tiled, rows, columns) < 1.15 * border_jump(whole, rows, columns) + 0.1

    naive = np.concatenate(  # the same measures find the seams of tiles that do not overlap
        [
            np.concatenate([model.decode(part)[0, 0] for part in row.split(23, dim=-1)], axis=1)
            for row in latents.split(18, dim=-2)
        ]
    )
    rows, columns = [72, 144], [92, 184]
    assert border_jump(naive, rows, columns) > 3 * border_jump(whole, rows, columns)
    assert border_jump(tiled, rows, columns) < 1.15 * border_jump(whole, rows, columns) + 0.1
    assert np.abs(naive.astype(float) - whole).mean() > 1.5 * error.mean()


def test_sharing_statistics_keeps_the_colours(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FrameVAE(trained)
    frame = picture(212, 268, 1000)
    whole, _ = model.encode(frame[None])
    latents = whole.transpose(0, 1)[None]
    exact = model.decode(latents).astype(float)
    model.tile, model.overlap = 96, 32
    encoded, deviation = model.encode(frame[None])
    assert encoded.shape == deviation.shape == whole.shape
    assert (deviation > 0).all()
    shared = float((encoded - whole).abs().mean()), np.abs(model.decode(latents) - exact).mean()
    monkeypatch.setattr(SharedNorms, "share", lambda self: None)
    encoded, _ = model.encode(frame[None])
    own = float((encoded - whole).abs().mean()), np.abs(model.decode(latents) - exact).mean()
    assert shared[0] < 0.7 * own[0]
    assert shared[1] < 0.5 * own[1]
    assert shared[0] < 0.06 * float(whole.std())


@pytest.mark.parametrize("size", [(1, 25), (25, 1), (7, 50), (49, 25)])
def test_large_frames_of_odd_sizes_keep_their_frames_apart(tmp_path: Path, size: tuple[int, int]) -> None:
    model = FrameVAE(miniature(tmp_path / "vae"))  # attention and eight pixels a latent
    model.tile, model.overlap = 192, 64
    latents = torch.randn(2, 4, 3, *size, generator=torch.Generator().manual_seed(0))
    video = model.decode(latents, micro_batch=4)
    assert video.shape == (2, 3, size[0] * 8, size[1] * 8, 3)
    alone = model.decode(latents[1:, :, 2:])
    assert np.abs(alone[0, 0].astype(int) - video[1, 2]).max() <= 1
    mean, deviation = model.encode(video[1], micro_batch=2)
    assert mean.shape == deviation.shape == (3, 4, *size)
    alone_mean, _ = model.encode(video[1, 2:])
    torch.testing.assert_close(alone_mean[0], mean[2], atol=1e-4, rtol=1e-3)


def test_frames_up_to_the_limit_are_computed_whole(vae: Path) -> None:
    model = FrameVAE(vae)
    latents = torch.randn(1, 4, 1, 24, 16, generator=torch.Generator().manual_seed(0))
    before = model.decode(latents)
    model.tile, model.overlap = 96, 32
    seen = Seen(model)
    np.testing.assert_array_equal(model.decode(latents), before)
    assert seen.decoded == [(1, 4, 24, 16)]
    model.decode(torch.zeros(1, 4, 1, 25, 16))
    assert len(seen.decoded) == 1 + 2 * 2  # two tiles, twice each
    np.testing.assert_array_equal(model.decode(latents), before)  # nothing of the tiles' statistics is left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_shared_by_one_tile_are_its_own(tmp_path: Path, dtype: torch.dtype) -> None:
    model = FrameVAE(miniature(tmp_path / "vae"), dtype=dtype)
    latents = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad(), SharedNorms(model.vae) as norms:
        plain = model.vae.decode(latents).sample
        norms.share()
        shared = model.vae.decode(latents).sample
        assert len(norms.noted) == len([m for m in model.vae.decoder.modules() if isinstance(m, nn.GroupNorm)])
        other = model.vae.decode(latents * 2).sample
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(shared, plain, atol=tolerance, rtol=tolerance)
    assert (other - model.vae.decode(latents * 2).sample).abs().max() > 0.01  # its own statistics play no part


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        FrameVAE(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_no_vae_is_refused_in_a_line(damaged: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "no config.json")
    config = json.loads((damaged / "config.json").read_text())
    for changes, message in (
        ({"_class_name": "UNet2DConditionModel"}, "describes UNet2DConditionModel, expected AutoencoderKL"),
        ({"_class_name": None}, "describes no model"),
        ({"norm_num_groups": 7}, "no VAE that can be built: .*divisible"),
        ({"down_block_types": ["Imagined"] * 3}, "no VAE that can be built: Imagined does not exist"),
        ({"latent_channels": 8}, r"conv_in.weight is \[32, 4, 3, 3\], expected \[32, 8, 3, 3\]"),
    ):
        (damaged / "config.json").write_text(json.dumps(config | changes))
        refuse(damaged, message)
    for text, message in (("[1]", "describes no model"), ('{"_class', "is damaged"), ("", "is damaged")):
        (damaged / "config.json").write_text(text)
        refuse(damaged, message)


def test_missing_weights_are_an_error_not_random_numbers(damaged: Path) -> None:
    state = load((damaged / SAFETENSORS).read_bytes())
    lost = state.pop("decoder.conv_out.bias")
    save_file(state, damaged / SAFETENSORS)
    refuse(damaged, "missing decoder.conv_out.bias$")
    save_file({**state, "decoder.conv_out.bias": lost, "more": lost.clone()}, damaged / SAFETENSORS)
    refuse(damaged, "unexpected more$")
    save_file({**state, "decoder.conv_out.bias": torch.zeros(4)}, damaged / SAFETENSORS)
    refuse(damaged, r"decoder.conv_out.bias is \[4\], expected \[3\]")
    (damaged / SAFETENSORS).unlink()
    refuse(damaged, f"no VAE weights in .*{SAFETENSORS} nor {BIN}")


@pytest.mark.parametrize("share", [0, 0.00001, 0.3, 0.999])
def test_truncated_weights_are_refused(damaged: Path, share: float) -> None:
    state = load((damaged / SAFETENSORS).read_bytes())
    data = (damaged / SAFETENSORS).read_bytes()
    (damaged / SAFETENSORS).write_bytes(data[: int(len(data) * share)])
    refuse(damaged, f"{SAFETENSORS} is damaged")
    (damaged / SAFETENSORS).unlink()
    for zipped in (True, False):
        torch.save(state, damaged / BIN, _use_new_zipfile_serialization=zipped)
        data = (damaged / BIN).read_bytes()
        (damaged / BIN).write_bytes(data[: int(len(data) * share)])
        refuse(damaged, f"{BIN} is damaged")


class Evil:
    """Unpickled, it would create a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable, tuple]:
        return open, (str(self.trace), "w")


def test_a_bin_file_is_read_and_runs_no_code(damaged: Path, tmp_path: Path) -> None:
    state = load((damaged / SAFETENSORS).read_bytes())
    expected, _ = FrameVAE(damaged).encode(noise(1, 8, 8, 3))
    (damaged / SAFETENSORS).unlink()
    torch.save(state, damaged / BIN)
    torch.testing.assert_close(FrameVAE(damaged).encode(noise(1, 8, 8, 3))[0], expected)

    trace = tmp_path / "trace"
    torch.save({**state, "decoder.conv_out.bias": 3}, damaged / BIN)
    refuse(damaged, f"{BIN}: .*shape")
    for save in (lambda value: torch.save(value, damaged / BIN), lambda value: _pickle(value, damaged / BIN)):
        save({**state, "evil": Evil(trace)})
        refuse(damaged, f"{BIN} is damaged, or holds more than tensors")
        assert not trace.exists()
    pickle.loads(pickle.dumps(Evil(trace))).close()
    assert trace.exists()  # the file would have done it


def _pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def test_names_of_the_old_release_are_understood(tmp_path: Path) -> None:
    folder = miniature(tmp_path / "vae")
    expected, _ = FrameVAE(folder).encode(noise(1, 16, 16, 3))
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state: dict[str, Tensor] = {}
    for name, tensor in load((folder / SAFETENSORS).read_bytes()).items():
        for new, before in old.items():
            name = name.replace(new, before)
        state[name] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in state
    save_file(state, folder / SAFETENSORS)
    torch.testing.assert_close(FrameVAE(folder).encode(noise(1, 16, 16, 3))[0], expected, rtol=0, atol=0)


def test_loading_leaves_the_random_numbers_alone(vae: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert not load_autoencoder(vae).training
    torch.testing.assert_close(torch.rand(3), expected)
