"""Weights load strictly, offline, and never run code."""

from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from opensora.weights import WeightsError, find_weights, load_strict, load_tensors


def test_a_local_folder_comes_first_and_offline_opens_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "t5").mkdir()
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
