"""Weights load strictly, offline, and never run code."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from opensora.weights import WeightsError, fault, find_weights, load_strict, load_tensors


def test_a_local_folder_comes_first_and_offline_opens_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "t5").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "t5" / "model.safetensors")
    assert find_weights("t5", tmp_path, offline=True) == tmp_path / "t5"
    assert find_weights(str(tmp_path / "t5"), Path("elsewhere"), offline=True) == tmp_path / "t5"
    with pytest.raises(WeightsError, match=r"neither .* is a folder"):
        find_weights("vae", tmp_path, offline=True)


def test_tensors_load_from_both_forms_and_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        assert torch.equal(load_tensors(tmp_path / name)["a"], tensors["a"])
    side = tmp_path / "a.pth.sha256"
    side.write_text(sha256((tmp_path / "a.pth").read_bytes()).hexdigest() + "  a.pth")
    load_tensors(tmp_path / "a.pth")
    side.write_text("0" * 64)
    with pytest.raises(WeightsError, match="download it again"):
        load_tensors(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="no weights file"):
        load_tensors(tmp_path / "none.pth")


def test_weights_that_are_not_whole_are_found_by_a_look(tmp_path: Path) -> None:
    folder, parts = tmp_path / "t5", ["model-1.safetensors", "model-2.safetensors"]
    folder.mkdir()

    def look(*files: str) -> str:
        return fault(folder, files)

    assert "t5 holds no weights: expected one of model.safetensors, " in look()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", parts, strict=True))})
    )
    save_file({"a": torch.zeros(1000)}, folder / parts[0])
    assert look().endswith("t5 lacks model-2.safetensors, which model.safetensors.index.json names")
    save_file({"b": torch.zeros(1000)}, folder / parts[1])
    assert look() == ""
    assert look("tokenizer.json|spiece.model").endswith("t5 lacks tokenizer.json or spiece.model")
    (folder / "spiece.model").touch()
    assert look("tokenizer.json|spiece.model") == ""

    whole = (folder / parts[1]).read_bytes()
    for length in (0, 7, 40, len(whole) - 1):  # as a copy that broke off leaves it
        (folder / parts[1]).write_bytes(whole[:length])
        assert parts[1] in look(), length
    with pytest.raises(WeightsError, match="cut short: 4071 of 4072 bytes; copy or download it again"):
        find_weights("t5", tmp_path, offline=True)

    torch.save({"a": torch.zeros(1000)}, tmp_path / "PixArt.pth")
    assert fault(tmp_path / "PixArt.pth") == ""
    whole = (tmp_path / "PixArt.pth").read_bytes()
    (tmp_path / "PixArt.pth").write_bytes(whole[:-1000])
    assert fault(tmp_path / "PixArt.pth").endswith("PixArt.pth is cut short")
    (tmp_path / "PixArt.pth").write_bytes(b"")
    assert fault(tmp_path / "PixArt.pth").endswith("PixArt.pth is empty")


class Evil:
    def __reduce__(self) -> tuple:
        return (Path("/tmp/should-not-exist-opensora").touch, ())


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="holds more than tensors"):
        load_tensors(tmp_path / "evil.pth")
    assert not Path("/tmp/should-not-exist-opensora").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.pth"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(WeightsError, match=f"{name} is damaged"):
            load_tensors(tmp_path / name)


def test_strict_loading_names_everything_that_does_not_fit() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = dict(module.state_dict())
    load_strict(module, state)
    state["0.weight"] = torch.zeros(3, 5)
    state["extra"] = torch.zeros(1)
    del state["1.bias"]
    with pytest.raises(WeightsError) as error:
        load_strict(module, state)
    for text in ("missing 1.bias", "unexpected extra", "0.weight is [3, 5], expected [3, 2]"):
        assert text in str(error.value)


def test_allowed_gaps_keep_their_initial_values() -> None:
    module = nn.Linear(2, 2)
    before = module.bias.detach().clone()
    load_strict(module, {"weight": torch.ones(2, 2)}, allow_missing=("bia*",))
    assert torch.equal(module.bias, before)
    assert torch.equal(module.weight, torch.ones(2, 2))
