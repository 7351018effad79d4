"""A few steps of a small STDiT by any engine, for tests; `python -m` it in each process of a run of several.

Arguments: a folder, and the names of the scenarios to train one after the other. Rank 0 leaves `NAME.pt` there.
"""

import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opensora.config import ConfigError, TrainConfig
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.parallel.engine import Engine, build_engine
from opensora.training.ema import Ema

SHAPE = STDiTConfig(
    input_size=(4, 6, 6),
    hidden_size=16,
    depth=2,
    num_heads=2,
    caption_channels=8,
    model_max_length=5,
    class_dropout_prob=0.0,
)
STEPS, BATCH, LIMIT, LR, DECAY = 3, 4, 0.5, 1e-2, 0.9  # BATCH samples a micro-batch, over all processes
State = dict[str, Tensor]


@dataclass
class Result:
    """What a run left: of every step the mean loss and the gradient norm, at the end the whole states."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    model: State = field(default_factory=dict)
    optimizer: State = field(default_factory=dict)
    ema: State = field(default_factory=dict)
    held: int = 0  # elements of this process's averages
    kept: bool = True  # what was loaded is what would be saved
    error: str = ""


def build_model(trainable: str = "all") -> STDiT:
    torch.manual_seed(0)
    model = STDiT(SHAPE)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        parameter.requires_grad_(trainable == "all" or "attn_temp" in name)
    return model


def micro_batch(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, text, mask and target of one micro-batch over all processes."""
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(BATCH, 4, *SHAPE.input_size, generator=generator)
    t = 999 * torch.rand(BATCH, generator=generator)
    text = torch.randn(BATCH, 1, 5, 8, generator=generator)
    mask = (torch.arange(5) < torch.randint(1, 6, (BATCH, 1), generator=generator)).long()
    return x, t, text, mask, torch.randn(BATCH, 8, *SHAPE.input_size, generator=generator)


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(config: TrainConfig, start: Result | None = None, engine: Engine | None = None) -> Result:
    """STEPS steps, of which the first goes on where `start` ended; the result is whole on rank 0."""
    engine = engine or build_engine(config)
    model = build_model(config.trainable)
    if config.activation_checkpointing == "full":
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    module = engine.prepare(model, config)
    ema = Ema(engine.own_parameters(), DECAY)
    first = 0
    if start:
        engine.load_model_state(start.model)
        engine.load_optimizer_state(start.optimizer)
        ema.load(engine.distribute(start.ema if engine.rank == 0 else None))
        first = STEPS
    result = Result(held=sum(share.numel() for share in ema.shares().values()))
    if start:
        saved = engine.model_state(), engine.optimizer_state(), engine.collect(ema.shares())
        expected = start.model, start.optimizer, start.ema
        result.kept = engine.rank != 0 or all(map(same, saved, expected))
    share = BATCH // engine.data_world_size
    mine = slice(engine.data_rank * share, (engine.data_rank + 1) * share)
    for step in range(first, first + STEPS):
        total = 0.0
        for index in range(config.accumulate):
            x, t, text, mask, target = (
                part[mine].to(engine.device) for part in micro_batch(step * config.accumulate + index)
            )
            low = config.dtype == "bfloat16"
            with engine.accumulating(index == config.accumulate - 1):
                with torch.autocast(engine.device.type, torch.bfloat16, enabled=low):
                    loss = (module(x, t, text, mask) - target).square().mean() / config.accumulate
                engine.backward(loss)
            total += float(loss.detach())
        result.losses += engine.mean([total])
        result.norms.append(engine.gradient_norm(LIMIT))
        if step == 1:
            engine.clear()  # as after a bad step
        else:
            engine.step(LR)
            ema.update(step)
    result.model, result.optimizer = engine.model_state(), engine.optimizer_state()
    result.ema = engine.collect(ema.shares())
    engine.close()
    return result


def main(folder: Path, names: list[str]) -> None:
    ports = os.environ["TEST_PORTS"].split(",")
    for name, port in zip(names, ports, strict=False):
        os.environ["MASTER_PORT"] = port
        fields = torch.load(folder / f"{name}.job", weights_only=False)
        config: TrainConfig = fields["config"]
        engine = None
        if fields["pretended"]:
            from tests.parallel.pretended_gpu import build_pretended

            engine = build_pretended(config)
        try:
            result = train(config, fields["start"], engine)
        except ConfigError as error:
            result = Result(error=str(error))
        if os.environ["RANK"] == "0":
            torch.save(result, folder / f"{name}.pt")


if __name__ == "__main__":
    from tests.parallel import engine_training  # so that its classes have that name in the files

    engine_training.main(Path(sys.argv[1]), sys.argv[2:])
