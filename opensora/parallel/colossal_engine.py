"""ColossalAI's Booster as engines: DDP, LowLevelZero (stages 1 and 2), Gemini.

The plugins compute in bfloat16 by rounding the model itself, their float32 masters included. So the exact weights are
put into the masters after that, buffers are saved as they were, and timesteps, for which bfloat16 has too few digits,
are kept from being rounded.
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about its own use of older PyTorch
    from colossalai.booster import Booster
    from colossalai.booster.plugin import GeminiPlugin, LowLevelZeroPlugin, TorchDDPPlugin
    from colossalai.nn.optimizer import FusedAdam, HybridAdam
    from colossalai.zero.gemini import gemini_optimizer

from opensora.config import ConfigError, TrainConfig
from opensora.parallel.engine import Engine, Kind
from opensora.parallel.join import join_alone
from opensora.parallel.optimizer import build_optimizer, decay_groups, set_updates, start_state
from opensora.parallel.shares import Range, Shares, even_ranges, row_ranges
from opensora.parallel.torch_engine import TorchEngine

log = logging.getLogger(__name__)


def build_colossal_engine(config: TrainConfig) -> Engine:
    """The engine of `config.strategy`; joins the process group.

    Raises:
        ConfigError: ZeRO or Gemini without a GPU, or Gemini in float32.
    """
    if config.strategy != "ddp" and not torch.cuda.is_available():
        raise ConfigError(
            f"strategy {config.strategy} of ColossalAI needs a GPU, and none is visible here; "
            "train with strategy=ddp, or with engine=torch and strategy=fsdp, which shard on CPUs too"
        )
    match config.strategy:
        case "zero1" | "zero2":
            return ZeroEngine(config)
        case "gemini":
            if config.dtype != "bfloat16":
                raise ConfigError("strategy gemini computes in bfloat16; set dtype=bfloat16")
            return GeminiEngine(config)
        case _:
            return ColossalDdpEngine(config)


def fastest_adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """HybridAdam or FusedAdam if ColossalAI's kernels load, which takes a CUDA toolkit; else PyTorch's fused AdamW."""
    kind = _usable_adam()
    return kind(decay_groups(model, config.weight_decay), lr=config.lr) if kind else build_optimizer(model, config)


@cache
def _usable_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """The first of ColossalAI's optimizers whose kernels compile and load here; tried, and logged, once."""
    for kind in (HybridAdam, FusedAdam) if torch.cuda.is_available() else ():
        try:
            kind([nn.Parameter(torch.zeros(1, device="cuda"))])
        except Exception as error:  # compilers fail in many ways
            log.info("optimizer: %s is not usable here: %s", kind.__name__, str(error).partition("\n")[0])
        else:
            log.info("optimizer: ColossalAI's %s", kind.__name__)
            return kind
    return None


class ColossalDdpEngine(TorchEngine):
    """DDP by Booster: as TorchEngine but for who wraps the model and goes back through it."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        _join_if_alone(self)

    def backward(self, loss: Tensor) -> None:
        self._booster.backward(loss, self._boosted)

    def _build_optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        return fastest_adamw(model, config)

    def _wrap(self, model: nn.Module) -> nn.Module:
        self._booster = Booster(plugin=TorchDDPPlugin(broadcast_buffers=False, gradient_as_bucket_view=True))
        boosted, self._boosted, *_ = self._booster.boost(model, self._optimizer)
        self._wrapped = boosted.module
        return boosted


class ZeroEngine(Engine):
    """LowLevelZero: gradients are summed as in DDP (1) or in shards (2); masters and moments are shards in both."""

    _optimizer: Any  # LowLevelZeroOptimizer

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        _join_if_alone(self)
        self._keeps_gradients = config.strategy == "zero1"

    def prepare(self, model: nn.Module, config: TrainConfig) -> nn.Module:
        self._take(model, config)
        exact = _exact_weights(model)
        plugin = LowLevelZeroPlugin(
            stage=1 if self._keeps_gradients else 2,
            precision="bf16" if config.dtype == "bfloat16" else "fp32",
            max_norm=config.clip_norm,
            cast_inputs=False,
            overlap_communication=self.device.type == "cuda",
        )
        boosted, self._optimizer, *_ = Booster(plugin=plugin).boost(model, fastest_adamw(model, config))
        start_state(self._optimizer.optim)
        learning, frozen = self._shapes_by_use()
        frozen_ranges = even_ranges(frozen, self.world_size)
        ranges = zip(_flat_ranges(learning, self.world_size), frozen_ranges, strict=True)
        self._shares = Shares(learning | frozen, [one | other for one, other in ranges], self.rank, self.device)
        self._frozen = {name: self._shares.cut(exact[name], name) for name in frozen_ranges[self.rank]}
        self._clip_norm = config.clip_norm
        self._fill("weights", exact)
        return boosted

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        # Stage 2 keeps no whole gradients, so it adds every micro-batch's to its shards.
        return nullcontext() if last or not self._keeps_gradients else self._optimizer.no_sync()

    def backward(self, loss: Tensor) -> None:
        self._optimizer.backward(loss)

    def gradient_norm(self, limit: float) -> float:
        """The norm; `step` clips to it, in float32."""
        assert limit == self._clip_norm, f"ColossalAI was told to clip to {self._clip_norm}, not {limit}"
        groups = range(len(self._optimizer.param_groups))
        gradients = [part for group in groups for part in self._optimizer.get_working_grads_by_group_id(group)]
        norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in gradients]
        return _norm_over_shards(torch.stack(norms).square().sum())

    def _masters(self) -> dict[str, Tensor]:
        """This process's flat float32 shards of what learns, with padding at the end."""
        shards = self._optimizer.get_working_to_master_map()
        return {name: shards[id(self._parameters[name])] for name in self._learning}

    def _own(self, kind: Kind) -> dict[str, Tensor]:
        masters = self._masters()
        if kind != "weights":
            masters = {name: self._optimizer.optim.state[shard][kind] for name, shard in masters.items()}
        own = self._shares.own
        shards = {name: shard[: own[name][1] - own[name][0]] for name, shard in masters.items() if name in own}
        return shards | self._frozen if kind == "weights" else shards

    @torch.no_grad()
    def _fill(self, kind: Kind, whole: Mapping[str, Tensor]) -> None:
        for name, shard in self._own(kind).items():
            shard.copy_(self._shares.cut(whole[name], name))
        if kind == "weights":
            for name, parameter in self._parameters.items():
                parameter.data.copy_(whole[name])

    def _set_steps(self, updates: int) -> None:
        set_updates(self._optimizer.optim, updates)


class GeminiEngine(Engine):
    """Gemini: weights too are shards, of chunks that are gathered where they are needed; all stays on the GPU."""

    _optimizer: Any  # GeminiOptimizer
    _pending = False  # gradients lie where Gemini keeps the weights

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        _join_if_alone(self)

    def prepare(self, model: nn.Module, config: TrainConfig) -> nn.Module:
        self._take(model, config)
        exact = _exact_weights(model)
        plugin = GeminiPlugin(
            precision="bf16",
            max_norm=config.clip_norm,
            enable_gradient_accumulation=config.accumulate > 1,
            enable_async_reduce=self.device.type == "cuda",
            min_chunk_size_m=min(32.0, sum(weight.numel() for weight in exact.values()) / 2**20),
        )
        optimizer = fastest_adamw(model, config)
        if type(optimizer) is torch.optim.AdamW:
            optimizer = GeminiAdamW(optimizer.param_groups, lr=config.lr)
        model.register_forward_pre_hook(_timesteps_from_bits)
        boosted, self._optimizer, *_ = Booster(plugin=plugin).boost(model, optimizer)
        self._clip_norm = config.clip_norm
        self._note_shards(exact)
        self._fill("weights", exact)
        return _TimestepsAsBits(boosted)

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext()  # Gemini keeps no whole gradients: it adds every micro-batch's to its shards

    def backward(self, loss: Tensor) -> None:
        self._pending = True
        self._optimizer.backward(loss)

    def gradient_norm(self, limit: float) -> float:
        """The norm; `step` clips to it, in float32."""
        assert limit == self._clip_norm, f"ColossalAI was told to clip to {self._clip_norm}, not {limit}"
        squares = sum(self._gradient_chunk(chunk).l2_norm for chunk in self._chunks())
        return _norm_over_shards(torch.tensor(squares, device=self.device))

    def step(self, lr: float) -> None:
        self._pending = False
        super().step(lr)

    def clear(self) -> None:
        if self._pending:  # as GeminiOptimizer does after an overflow
            self._optimizer._clear_global_norm()
            self._optimizer.zero_grad()
            self._weights_from_masters()
            self._optimizer.module.chunk_manager.accumulating_grads = False
            self._pending = False

    def _note_shards(self, exact: Mapping[str, Tensor]) -> None:
        """Which range of each parameter this process has, and the optimizer's stand-in for it."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        optimizer = self._optimizer
        own: dict[str, Range] = {}
        self._stand_ins: dict[str, nn.Parameter] = {}
        for number, stand_in in optimizer.id_to_fake_params.items():
            name = names[id(optimizer.id_to_real_params[number])]
            _, start, length = optimizer.get_offsets(number)
            own[name] = (start, start + length)
            self._stand_ins[name] = stand_in
            place = {"device": stand_in.device, "dtype": torch.float32}
            optimizer.optim.state[stand_in] = {
                "step": 0,
                "exp_avg": torch.zeros(length, **place),
                "exp_avg_sq": torch.zeros(length, **place),
            }
        learning, frozen = self._shapes_by_use()
        frozen_ranges = even_ranges(frozen, self.world_size)
        ranges: list[dict[str, Range]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(ranges, own | frozen_ranges[self.rank])
        self._shares = Shares(learning | frozen, ranges, self.rank, self.device)
        self._frozen = {name: self._shares.cut(exact[name], name) for name in frozen_ranges[self.rank]}

    def _chunks(self) -> list[Any]:
        return list(self._optimizer.chunk16_set)

    def _gradient_chunk(self, chunk: Any) -> Any:
        return chunk if self._optimizer.module.chunk_manager.reuse_fp16_chunk else chunk.grad_chunk

    def _weights_from_masters(self) -> None:
        for chunk in self._chunks():
            chunk.optim_update()

    def _own(self, kind: Kind) -> dict[str, Tensor]:
        if kind != "weights":
            return {name: self._optimizer.optim.state[stand_in][kind] for name, stand_in in self._stand_ins.items()}
        optimizer, masters = self._optimizer, {}
        for name, stand_in in self._stand_ins.items():
            start, stop = optimizer.param_to_range[stand_in]
            masters[name] = optimizer.param_to_chunk16[stand_in].paired_chunk.payload[start:stop]
        return masters | self._frozen

    @torch.no_grad()
    def _fill(self, kind: Kind, whole: Mapping[str, Tensor]) -> None:
        for name, shard in self._own(kind).items():
            shard.copy_(self._shares.cut(whole[name], name))
        if kind == "weights":
            self._weights_from_masters()
            for name, parameter in self._parameters.items():
                if not parameter.requires_grad:
                    parameter.data.copy_(whole[name])

    def _set_steps(self, updates: int) -> None:
        set_updates(self._optimizer.optim, updates)


class GeminiAdamW(torch.optim.Optimizer):
    """PyTorch's fused AdamW in the form that Gemini calls: bfloat16 gradients, float32 weights, its own scaling."""

    def __init__(self, groups: list[dict], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: None = None, div_scale: float = -1) -> None:  # type: ignore[override]
        """Update; gradients are divided by `div_scale` first if that is positive."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [self.state[parameter] for parameter in parameters]
            for state in states:
                state["step"] += 1
            gradients = [parameter.grad.float() for parameter in parameters]
            if div_scale > 0:
                torch._foreach_div_(gradients, div_scale)
            torch._fused_adamw_(
                [parameter.data for parameter in parameters],
                gradients,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(states[0]["step"]), device=parameters[0].device)] * len(states),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


gemini_optimizer._AVAIL_OPTIM_LIST.add(GeminiAdamW)  # it asks by type, and its own three need a compiler


class _TimestepsAsBits(nn.Module):
    """Calls a Gemini model, which rounds every floating input to bfloat16, with the bits of float32 timesteps."""

    def __init__(self, boosted: nn.Module) -> None:
        super().__init__()
        self.boosted = boosted

    def forward(self, x: Tensor, timestep: Tensor, *rest: Tensor | None) -> Tensor:
        return self.boosted(x, timestep.float().view(torch.int32), *rest)


def _timesteps_from_bits(module: nn.Module, inputs: tuple) -> tuple:
    x, timestep, *rest = inputs
    return x, timestep.view(torch.float32), *rest


def _exact_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().float().cpu().clone() for name, parameter in model.named_parameters()}


def _flat_ranges(shapes: Mapping[str, torch.Size], processes: int) -> list[dict[str, Range]]:
    """LowLevelZero's shards: every flattened parameter is padded at the end and cut into equal parts."""
    return row_ranges({name: torch.Size([shape.numel()]) for name, shape in shapes.items()}, processes)


def _norm_over_shards(squares: Tensor) -> float:
    """The norm of what has that sum of squares on this process."""
    dist.all_reduce(squares)
    return float(squares.sqrt())


def _join_if_alone(engine: Engine) -> None:
    if engine.world_size == 1:
        join_alone(engine.device)  # ColossalAI wants a process group in any case
