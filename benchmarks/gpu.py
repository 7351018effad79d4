"""Training steps of STDiT-XL/2 on one GPU: time, share of the GPU's own ceiling, memory; and what it is compared with.

    python -m benchmarks.gpu                         # ten minutes; benchmarks/results/gpu-<name>.json
    python -m benchmarks.gpu --parts ceilings steps  # some of it

A step is forward, backward, clipping, fused AdamW and the averages of all weights, with bfloat16 autocast over float32
weights. Random data and weights. Each part records its own failure and the others go on; the file is written after each
measurement, so that what was measured is kept when time runs out. With `--tiny` it runs on a CPU, to try the script.
"""

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import RESULTS, machine
from benchmarks.published import as_published
from opensora.diffusion.iddpm import IDDPM
from opensora.models import temporal_kernel
from opensora.models.checkpointing import set_activation_checkpointing
from opensora.models.dit import DiT
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.training.compiling import compile_blocks
from opensora.training.ema import Ema

XL = STDiTConfig((16, 64, 64))
TINY = STDiTConfig((4, 8, 8), hidden_size=32, depth=2, num_heads=2, caption_channels=16, model_max_length=8)
SIZES = {"16x256x256": (16, 32, 32), "16x512x512": (16, 64, 64), "64x512x512": (64, 64, 64)}  # latents
TINY_SIZES = {"16x256x256": (2, 4, 4), "16x512x512": (2, 8, 8), "64x512x512": (8, 8, 8)}
GIB = 2**30
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Variant:
    """One way to make a step."""

    size: str
    batch: int | None = 1  # None: as many samples as fit
    model: str = "stdit"  # or published, dit
    checkpointing: str = "none"
    compiled: bool = False
    attention: str = ""  # PyTorch's kernel that is tried first; empty: PyTorch's own order
    temporal_kernel: bool = True
    rounds: int = 8
    profiled: bool = False  # also say which kernels take the time

    @property
    def name(self) -> str:
        parts = [self.model, self.size, self.checkpointing, "compiled" if self.compiled else "eager"]
        parts += [self.attention] if self.attention else []
        parts += [] if self.temporal_kernel else ["without temporal kernel"]
        return " ".join([*parts, f"batch {self.batch}" if self.batch else "full card"])


# In the order of what matters, for a run that is cut off.
STEPS = [
    Variant("16x512x512", 4, compiled=True, profiled=True),
    Variant("64x512x512", checkpointing="selective", compiled=True, rounds=3, profiled=True),
    Variant("64x512x512", checkpointing="full", rounds=3),
    Variant("64x512x512", model="published", checkpointing="full", rounds=3),
    Variant("16x512x512", model="published"),
    Variant("16x512x512", 4, checkpointing="selective", compiled=True),
    Variant("16x256x256", 12, compiled=True),
    Variant("64x512x512", checkpointing="full", compiled=True, rounds=3),
    Variant("16x512x512"),
    Variant("16x512x512", temporal_kernel=False),
    Variant("16x512x512", 4, checkpointing="full", compiled=True),
    Variant("16x512x512", checkpointing="selective"),
    Variant("16x512x512", checkpointing="full"),
    Variant("16x256x256", 8),
    Variant("16x512x512", compiled=True),
    Variant("64x512x512", model="dit", checkpointing="full", rounds=1),
    Variant("16x512x512", model="dit", rounds=4),
    Variant("16x512x512", None, checkpointing="selective", compiled=True),
    Variant("16x256x256", None, checkpointing="selective", compiled=True),
]


class Session:
    """Where figures go, and when to stop."""

    def __init__(self, out: Path, tiny: bool, limit: float) -> None:
        self.out, self.tiny, self.end = out, tiny, time.monotonic() + limit
        self.device = torch.device("cpu" if tiny else "cuda")
        self.sizes, self.config = (TINY_SIZES, TINY) if tiny else (SIZES, XL)
        self.data: dict = {"machine": machine(), "ceilings": {}, "kernels": {}, "steps": {}, "errors": {}}

    @contextmanager
    def part(self, kind: str, name: str, least: float = 5) -> Iterator[dict]:
        """Collects a measurement's figures; skipped ones and failures are recorded, and nothing is raised."""
        figures: dict = {}
        start = time.monotonic()
        try:
            if start + least > self.end:
                raise TimeoutError("not measured: no time was left")
            yield figures
        except Exception as error:
            self.data["errors"][f"{kind}: {name}"] = "".join(traceback.format_exception(error)[-4:])[-3000:]
            print(f"{name:<62} {type(error).__name__}: {str(error)[:120]}", flush=True)
        if figures:
            figures["wall_s"] = round(time.monotonic() - start, 1)
            self.data[kind][name] = figures
        self.write()
        self.forget()

    def write(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.data, indent=1) + "\n")

    def forget(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def milliseconds(self, call: Callable[[], object], rounds: int, warm: int = 2) -> float:
        """Median of single calls, by the GPU's own clock."""
        for _ in range(warm):
            call()
        if self.device.type == "cpu":
            times = []
            for _ in range(rounds):
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            return statistics.median(times)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in zip(marks[:-1], marks[1:], strict=True))


def ceilings(session: Session) -> None:
    """What the GPU reaches at all: a large matrix product, and a copy (bytes read and written)."""
    side, count = (64, 2**10) if session.tiny else (8192, 2**31)
    with session.part("ceilings", "matrix product") as figures:
        left, right = (torch.randn(side, side, device=session.device, dtype=torch.bfloat16) for _ in range(2))
        figures["tflops"] = round(2 * side**3 / session.milliseconds(lambda: left @ right, 20, 5) / 1e9, 1)
        print(f"bf16 product of {side}: {figures['tflops']} TFLOP/s", flush=True)
    with session.part("ceilings", "copy") as figures:
        source = torch.empty(count, device=session.device, dtype=torch.bfloat16).normal_()
        target = torch.empty_like(source)
        figures["gb_per_s"] = round(2 * source.nbytes / session.milliseconds(lambda: target.copy_(source), 10, 3) / 1e6)
        print(f"copy: {figures['gb_per_s']} GB/s", flush=True)


def tensor(session: Session, *shape: int) -> Tensor:
    """Random numbers that take a gradient."""
    return torch.randn(shape, device=session.device, dtype=torch.bfloat16, requires_grad=True)


def clock(session: Session, name: str, call: Callable[..., Tensor], inputs: list[Tensor], flops: int) -> None:
    """Time of an operation forward, and with its backward pass."""
    with session.part("kernels", name, 2) as figures:
        gradient = torch.randn_like(call(*inputs))

        def both() -> None:
            torch.autograd.grad(call(*inputs), inputs, gradient)

        forward = session.milliseconds(lambda: call(*inputs), 10)
        whole = session.milliseconds(both, 10)
        figures.update(forward_ms=round(forward, 3), both_ms=round(whole, 3))
        figures["tflops_forward"] = round(flops / forward / 1e9)
        figures["tflops_backward"] = round(2 * flops / max(whole - forward, 1e-6) / 1e9)
        rates = f"{figures['tflops_forward']} and {figures['tflops_backward']} TFLOP/s"
        print(f"{name:<62} {forward:8.3f} ms, with backward {whole:8.3f} ms; {rates}", flush=True)


def temporal(session: Session) -> None:
    """Attention over the frames of two videos at 512 pixels: PyTorch's and our kernel, and how close ours is."""
    space, heads, width = (16, 2, 16) if session.tiny else (1024, XL.num_heads, XL.hidden_size // XL.num_heads)
    for frames in (16, 32, 64):
        qkv = tensor(session, 2, frames, space * heads, 3, width)
        flops = 8 * frames**2 * space * heads * width
        clock(session, f"temporal attention of {frames} frames, PyTorch", in_time, [qkv], flops)
        if session.device.type != "cuda":
            continue
        for share in (16, 8):
            temporal_kernel.FRAMES_A_WARP = share
            name = f"temporal attention of {frames} frames, own kernel, {share} frames a warp"
            clock(session, name, temporal_kernel.attend, [qkv], flops)
        temporal_kernel.FRAMES_A_WARP = 16
        with session.part("kernels", f"error of the own kernel, {frames} frames") as figures:
            figures.update(kernel_error(qkv[:, :, :4096].detach()))
            print(f"own kernel, {frames} frames, relative error: {figures}", flush=True)


def kernels(session: Session) -> None:
    """Matrix products and attention of a block for two videos of 16x512x512, by PyTorch's kernels."""
    batch, frames, space, text, heads, width = (
        (1, 4, 16, 8, 2, 16) if session.tiny else (2, 16, 1024, 120, XL.num_heads, XL.hidden_size // XL.num_heads)
    )
    channels = heads * width

    tokens = batch * frames * space
    for rows, columns in (
        (channels, 3 * channels),
        (channels, channels),
        (channels, 4 * channels),
        (4 * channels, channels),
    ):
        inputs = [tensor(session, tokens, rows), tensor(session, columns, rows), tensor(session, columns)]
        clock(session, f"linear {rows} to {columns}", F.linear, inputs, 2 * tokens * rows * columns)

    def spatial(qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v)

    for name, backend in {"default": None, **BACKENDS}.items():
        with sdpa_kernel(backend) if backend else nullcontext():
            qkv = tensor(session, batch * frames, space, 3, heads, width)
            clock(session, f"spatial attention, {name}", spatial, [qkv], 4 * tokens * space * channels)
            keys, values = (tensor(session, batch, heads, text, width) for _ in range(2))
            keep = torch.ones(batch, 1, 1, text, device=session.device, dtype=torch.bool)
            keep[:, :, :, text // 2 :] = False
            for kept, word in ((keep, "masked"), (None, "no mask")):
                for groups in (1, frames):
                    q = tensor(session, batch * groups, tokens // batch // groups, heads, width)
                    clock(
                        session,
                        f"text attention in {groups} groups, {word}, {name}",
                        lambda q, k, v, kept=kept, groups=groups: to_text(q, k, v, kept, groups),
                        [q, keys, values],
                        4 * tokens * text * channels,
                    )


def in_time(qkv: Tensor) -> Tensor:
    """Attention of [B, T, H, 3, D] by PyTorch."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def to_text(q: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None, groups: int) -> Tensor:
    """q [B·G, M, A, D], keys and values [B, A, L, D]."""
    keys, values = (part.repeat_interleave(groups, 0) for part in (keys, values))
    keep = None if keep is None else keep.repeat_interleave(groups, 0)
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=keep)


def kernel_error(qkv: Tensor) -> dict[str, float]:
    """Relative errors of our kernel and of PyTorch's against float32, outputs and gradients."""
    results = []
    for call, x in ((in_time, qkv.float()), (temporal_kernel.attend, qkv), (in_time, qkv)):
        x = x.clone().requires_grad_()
        out = call(x)
        generator = torch.Generator(x.device).manual_seed(0)
        gradient = torch.randn(out.shape, device=x.device, generator=generator).to(qkv.dtype)
        results.append((out.detach().float(), torch.autograd.grad(out, x, gradient.to(out.dtype))[0].float()))
    exact, ours, theirs = results
    return {
        f"{who} {what}": float((found[index] - exact[index]).norm() / exact[index].norm())
        for who, found in (("ours", ours), ("torch", theirs))
        for index, what in enumerate(("out", "gradient"))
    }


class Training:
    """A model with its optimizer and averages, in training."""

    def __init__(self, kind: str, config: STDiTConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.model: nn.Module = (DiT if kind == "dit" else STDiT)(config)
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.02)
        if kind == "published":
            as_published(self.model)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0, fused=True)
        self.ema = Ema(dict(self.model.named_parameters()), 0.9999)
        self.device, self.steps = device, 0

    def prepare(self, variant: Variant) -> None:
        """Take on a variant's checkpointing and compilation."""
        set_activation_checkpointing(self.model, variant.checkpointing)
        for block in self.model.blocks:
            block._compiled_call_impl = None
        if variant.compiled:
            compile_blocks(self.model)

    def step(self, x0: Tensor, t: Tensor, noise: Tensor, text: Tensor, mask: Tensor) -> None:
        """As the loop makes it, without reading any figure back."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = IDDPM().training_losses(self.model, x0, t, noise, text, mask)["loss"].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.steps)
        self.steps += 1


def inputs(config: STDiTConfig, size: tuple[int, int, int], batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """Latents, timesteps, noise, text of which two thirds are in use, and its mask."""
    x0, noise = (torch.randn(batch, config.in_channels, *size, device=device) for _ in range(2))
    text = torch.randn(batch, 1, config.model_max_length, config.caption_channels, device=device)
    mask = torch.ones(batch, config.model_max_length, device=device)
    mask[:, 2 * config.model_max_length // 3 :] = 0
    return x0, torch.randint(0, 1000, (batch,), device=device), noise, text, mask


@cache
def step_flops(dit: bool, config: STDiTConfig, size: tuple[int, int, int]) -> int:
    """Operations of a sample's matrix products, forward and backward, by PyTorch's counter; without recomputation."""

    def count(depth: int) -> int:
        with torch.device("meta"):
            model = (DiT if dit else STDiT)(replace(config, depth=depth))
            x, t, _, text, mask = inputs(config, size, 1, torch.device("meta"))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(x, t, text, mask).mean().backward()
        return counter.get_total_flops()

    one, two = count(1), count(2)
    return one + (config.depth - 1) * (two - one)


def steps(session: Session, wanted: list[str]) -> None:
    """All variants of a training step; the models are built once a kind."""
    kinds: dict[str, Training] = {}
    a_sample: dict[tuple, int] = {}  # bytes, by what decides them
    for variant in STEPS:
        if wanted and not any(word in variant.name for word in wanted):
            continue
        if variant.model not in kinds:  # one at a time on the card
            kinds.clear()
            session.forget()
        with session.part("steps", variant.name, 10) as figures:
            if variant.model not in kinds:
                kinds[variant.model] = Training(variant.model, session.config, session.device)
            training = kinds[variant.model]
            training.prepare(variant)
            batch = variant.batch or fitting(session, variant, a_sample, training)
            measure_step(session, variant, training, batch, figures)
            key = (variant.model, variant.size, variant.checkpointing)
            a_sample[key] = max(a_sample.get(key, 0), figures["activation_bytes_a_sample"])


def fitting(session: Session, variant: Variant, a_sample: dict[tuple, int], training: Training) -> int:
    """Samples that fit, by what the same step took for one, compiled or not."""
    if session.tiny:
        return 2
    known = a_sample.get((variant.model, variant.size, variant.checkpointing))
    if known is None:
        figures: dict = {}
        eager = replace(variant, batch=1, compiled=False, rounds=1)
        training.prepare(eager)
        measure_step(session, eager, training, 1, figures)
        training.prepare(variant)
        known = figures["activation_bytes_a_sample"]
    room = 0.93 * torch.cuda.get_device_properties(0).total_memory - states(training)
    return max(1, min(32, int(room // known)))


def states(training: Training) -> int:
    """Bytes of weights, gradients, two moments and averages, float32."""
    return 5 * 4 * sum(parameter.numel() for parameter in training.parameters)


def measure_step(session: Session, variant: Variant, training: Training, batch: int, figures: dict) -> None:
    """Time and memory of a step."""
    size = session.sizes[variant.size]
    data = inputs(session.config, size, batch, session.device)
    cuda = session.device.type == "cuda"
    fits = temporal_kernel.fits
    order = sorted(BACKENDS, key=lambda name: name != variant.attention) if variant.attention else []
    backends = [*(BACKENDS[name] for name in order), SDPBackend.MATH]
    try:
        if not variant.temporal_kernel:
            temporal_kernel.fits = lambda qkv: False
        with sdpa_kernel(backends, set_priority=True) if order else nullcontext():
            start = time.monotonic()
            training.step(*data)
            if cuda:
                torch.cuda.synchronize()
            first = time.monotonic() - start
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            milliseconds = session.milliseconds(lambda: training.step(*data), variant.rounds, 1)
            if variant.profiled and cuda:
                figures["kernels"] = profile(lambda: training.step(*data))
    finally:
        temporal_kernel.fits = fits
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    flops = batch * step_flops(variant.model == "dit", session.config, size)
    rate = flops / milliseconds / 1e9
    ceiling = session.data["ceilings"].get("matrix product", {}).get("tflops")
    figures.update(
        batch=batch,
        step_ms=round(milliseconds, 2),
        first_step_s=round(first, 1),
        samples_per_s=round(1e3 * batch / milliseconds, 3),
        tflops=round(rate, 1),
        share_of_ceiling=round(rate / ceiling, 3) if ceiling else None,
        peak_gib=round(peak / GIB, 2),
        states_gib=round(states(training) / GIB, 2),
        activation_bytes_a_sample=int(max(peak - states(training), 0) / batch),
        **{key: value for key, value in vars(variant).items() if key not in ("batch", "rounds", "profiled")},
    )
    share = f"{figures['share_of_ceiling']:.1%}" if ceiling else "?"
    print(
        f"{variant.name:<62} B {batch:<3} {milliseconds:9.1f} ms  {figures['samples_per_s']:8.3f} samples/s  "
        f"{rate:6.1f} TFLOP/s  {share:>6}  {figures['peak_gib']:6.1f} GiB",
        flush=True,
    )


def profile(call: Callable[[], object]) -> dict[str, list[float]]:
    """Milliseconds and launches of the kernels that take most of a call's time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)[:40]
    return {row.key[:100]: [round(row.self_device_time_total / 1e3, 3), row.count] for row in rows}


def ratios(session: Session) -> dict[str, float]:
    """The goals' comparisons: throughput of ours over that of the others, same size."""
    best: dict[tuple[str, str], float] = {}
    for figures in session.data["steps"].values():
        key = (figures["model"], figures["size"])
        best[key] = max(best.get(key, 0.0), figures["samples_per_s"])
    return {
        f"{size}: STDiT / {other}, best of each": round(best["stdit", size] / best[other, size], 2)
        for size in session.sizes
        for other in ("published", "dit")
        if {("stdit", size), (other, size)} <= best.keys()
    }


def main() -> None:
    """Measure, print and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file; by the GPU's name in benchmarks/results/ unless given")
    parser.add_argument("--parts", nargs="+", choices=("ceilings", "temporal", "kernels", "steps"), default=None)
    parser.add_argument("--only", nargs="+", default=[], help="steps whose name holds one of these words")
    parser.add_argument("--limit", type=float, default=540, help="seconds in all, after which nothing new is begun")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU, to try the script")
    chosen = parser.parse_args()
    if chosen.tiny:
        torch.set_num_threads(1)
    name = "gpu-tiny" if chosen.tiny else f"gpu-{torch.cuda.get_device_name().lower().replace(' ', '-')}"
    session = Session(chosen.out or RESULTS / f"{name}.json", chosen.tiny, chosen.limit)
    parts = chosen.parts or ["ceilings", "temporal", "steps", "kernels"]
    for part in parts:
        match part:
            case "ceilings":
                ceilings(session)
            case "temporal":
                temporal(session)
            case "kernels":
                kernels(session)
            case "steps":
                steps(session, chosen.only)
    session.data["ratios"] = ratios(session)
    session.write()
    for name, value in session.data["ratios"].items():
        print(f"{name:<62} {value:.2f}")
    print(session.out)


if __name__ == "__main__":
    main()
