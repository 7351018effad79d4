"""One stage's training steps on random data, by the engine and the parts of the real loop, to count what they hold."""

from collections.abc import Iterable

import torch

from opensora.config import Config, TrainConfig
from opensora.models.checkpointing import set_activation_checkpointing
from opensora.models.stdit import STDiT
from opensora.parallel.engine import build_engine
from opensora.training.ema import Ema
from opensora.training.freeze import freeze
from opensora.training.train import build_objective
from opensora.training_memory import stage_model


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages; counters, which are scalars, are left out."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor.ndim)


class StepRun:
    """Model, engine and averages of a stage; `step` trains on one random batch. Close it in the end."""

    def __init__(self, config: Config, stage: str) -> None:
        train: TrainConfig = getattr(config, stage)
        self.train, self.engine = train, build_engine(train)
        self.model = STDiT(stage_model(config, train)).to(self.engine.device).train()
        freeze(self.model, train.trainable)
        set_activation_checkpointing(self.model, train.activation_checkpointing)
        self.forward = self.engine.prepare(self.model, train)
        self.ema = Ema(self.engine.own_parameters(), train.ema_decay)
        self.objective = build_objective(train)
        self.gradient_bytes = self.done = 0

    def step(self) -> None:
        shape, batch, device = self.model.config, self.train.batch_size, self.engine.device
        latents = torch.randn(batch, shape.in_channels, *shape.input_size, device=device)
        text = torch.randn(batch, 1, shape.model_max_length, shape.caption_channels, device=device)
        mask = torch.ones(batch, shape.model_max_length, device=device)
        times = self.objective.sample_timesteps(batch, torch.Generator()).to(device)
        noise = torch.randn_like(latents)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.train.dtype == "bfloat16"):
            losses = self.objective.training_losses(self.forward, latents, times, noise, text, mask)
            loss = losses["loss"].mean()
        self.engine.backward(loss)
        self.gradient_bytes = nbytes(value.grad for value in self.model.parameters() if value.grad is not None)
        self.engine.gradient_norm(self.train.clip_norm)
        self.engine.step(self.train.lr)
        self.ema.update(self.done)
        self.done += 1

    def close(self) -> None:
        self.engine.close()
