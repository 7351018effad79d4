"""One stage's training steps without data or engine, to count what they hold."""

from collections.abc import Iterable

import torch

from opensora.config import Config, TrainConfig
from opensora.models.checkpointing import set_activation_checkpointing
from opensora.models.stdit import STDiT
from opensora.parallel.optimizer import build_optimizer
from opensora.training.checkpoint import stdit_config
from opensora.training.ema import Ema
from opensora.training.train import build_objective
from opensora.training_memory import vae_scale


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages; counters, which are scalars, are left out."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor.ndim)


class StepRun:
    """Model, optimizer and averages of a stage on one device; `step` trains on one random batch."""

    def __init__(self, config: Config, stage: str, device: torch.device) -> None:
        train: TrainConfig = getattr(config, stage)
        self.train, self.device = train, device
        self.model = STDiT(stdit_config(config, stage, vae_scale(config))).to(device).train()
        set_activation_checkpointing(self.model, train.activation_checkpointing)
        self.optimizer = build_optimizer(self.model, train)
        self.ema = Ema(dict(self.model.named_parameters()), train.ema_decay)
        self.objective = build_objective(train)
        self.gradient_bytes = 0
        self.done = 0

    def step(self) -> None:
        shape, batch = self.model.config, self.train.batch_size
        latents = torch.randn(batch, shape.in_channels, *shape.input_size, device=self.device)
        text = torch.randn(batch, 1, shape.model_max_length, shape.caption_channels, device=self.device)
        mask = torch.ones(batch, shape.model_max_length, device=self.device)
        times = self.objective.sample_timesteps(batch, torch.Generator()).to(self.device)
        noise = torch.randn_like(latents)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.dtype == "bfloat16"):
            losses = self.objective.training_losses(self.model, latents, times, noise, text, mask)
            loss = losses["loss"].mean()
        loss.backward()
        gradients = [value.grad for value in self.model.parameters() if value.grad is not None]
        self.gradient_bytes = nbytes(gradients)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip_norm)
        del gradients
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.done)
        self.done += 1
