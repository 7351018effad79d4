"""The released sampler's numbers and the model that they were made with."""

import json

import pytest
import torch
from safetensors.torch import load_file

from opensora.models.stdit import STDiT, STDiTConfig
from tests.shared import shared

Numbers = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def released() -> Numbers:
    return load_file(shared("fixtures/fixture_iddpm.safetensors"))


@pytest.fixture(scope="session")
def released_inputs() -> Numbers:
    return load_file(shared("fixtures/fixture_a.safetensors"))


@pytest.fixture(scope="session")
def released_model(released_inputs: Numbers) -> STDiT:
    config = json.loads(shared("fixtures/fixture_a.json").read_text())["config"]
    model = STDiT(STDiTConfig(**{**config, "input_size": tuple(config["input_size"])})).eval()
    model.load_state_dict({name[3:]: value for name, value in released_inputs.items() if name.startswith("sd.")})
    return model.requires_grad_(False)
