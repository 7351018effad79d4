"""How much of its time STDiT spends on more than matrix products, and what its short cuts save. Five minutes on a CPU.

    python -m benchmarks.stdit

Every figure is a ratio of two CPU times measured in turn in the same run, with one thread where it does not say two.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import alternate, save
from opensora.diffusion.guidance import guided
from opensora.models.attention import SelfAttention
from opensora.models.dit import DiT
from opensora.models.stdit import STDiT, STDiTBlock, STDiTConfig

WIDTH, DEPTH, SIDE, TOKENS_OF_TEXT, CAPTION = 1152, 2, 32, 120, 4096
ROUNDS = 5


def config(frames: int) -> STDiTConfig:
    """XL/2 at 256 pixels, two blocks deep."""
    return STDiTConfig((frames, SIDE, SIDE), depth=DEPTH, space_scale=0.5)


def inputs(frames: int, batch: int = 1, device: str = "cpu") -> tuple[Tensor, ...]:
    """Latents, timesteps, text and its mask."""
    x = torch.randn(batch, 4, frames, SIDE, SIDE, device=device)
    text = torch.randn(batch, 1, TOKENS_OF_TEXT, CAPTION, device=device)
    mask = torch.ones(batch, TOKENS_OF_TEXT, device=device)
    return x, torch.full((batch,), 500.0, device=device), text, mask


def build(kind: type[STDiT] | type[DiT], frames: int) -> nn.Module:
    """A model whose weights are not zero: zeros are multiplied as fast, but nothing should hang on that."""
    torch.manual_seed(0)
    model = kind(config(frames))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def step(model: nn.Module, *arguments: Tensor) -> None:
    """One forward and backward pass."""
    model.zero_grad()
    model(*arguments).square().mean().backward()


def step_flops(frames: int) -> int:
    """Floating-point operations of all matrix products of a step, those of attention too, by PyTorch's counter."""
    with torch.device("meta"):
        model, arguments = STDiT(config(frames)), inputs(frames, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(model, *arguments)
    return counter.get_total_flops()


def products(tokens: int) -> tuple[Callable[[], None], int]:
    """The matrix products of one block's linear layers, forward and backward, and their operations."""
    shapes = [(WIDTH, 3 * WIDTH), (WIDTH, 3 * WIDTH), *[(WIDTH, WIDTH)] * 4, (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    tensors = {
        (i, o): (torch.randn(tokens, i), torch.randn(i, o), torch.randn(tokens, o)) for i, o in dict.fromkeys(shapes)
    }

    def run() -> None:
        for shape in shapes:
            x, weight, gradient = tensors[shape]
            x @ weight
            gradient @ weight.t()
            x.t() @ gradient

    return run, sum(3 * 2 * tokens * i * o for i, o in shapes)


def training_step() -> dict[str, float]:
    """CPU time of a training step over that of matrix products with as many operations, fp32, 16x32x32 latents."""
    model, arguments = build(STDiT, 16), inputs(16)
    run, flops = products(16 * (SIDE // 2) ** 2)
    times = alternate({"step": lambda: step(model, *arguments), "products": run}, ROUNDS)
    return {
        "training step / matrix products of equal FLOPs": times["step"] / (times["products"] * step_flops(16) / flops),
        "gflops_of_products_a_cpu_second": flops / times["products"] / 1e9,
    }


@torch.no_grad()
def one_frame_block() -> dict[str, float]:
    """A block with one frame, temporal attention folded to a linear map, over the same block unfolded."""
    block = STDiTBlock(config(1)).eval()
    unfolded = SelfAttention(WIDTH, 16)
    unfolded.load_state_dict(block.attn_temp.state_dict())
    x, text, t0 = torch.randn(1, 256, WIDTH), torch.randn(1, TOKENS_OF_TEXT, WIDTH), torch.randn(1, 6 * WIDTH)
    folded = block.attn_temp

    class Unfolded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:  # [1, 1, S, C]: attention over one frame at each place
            return unfolded(x.transpose(1, 2).flatten(0, 1)).view(x.shape)

    def run(attention: nn.Module) -> None:
        block.attn_temp = attention  # type: ignore[assignment]
        for _ in range(8):
            block(x, text, t0, None, 1, None)

    times = alternate({"folded": lambda: run(folded), "unfolded": lambda: run(Unfolded())}, 3 * ROUNDS)
    return {"one frame: folded block / unfolded block": times["folded"] / times["unfolded"]}


@torch.no_grad()
def guided_step() -> dict[str, float]:
    """A guided sampling step of one frame: text kept and both halves in one batch, over neither; two threads."""
    torch.set_num_threads(2)
    model = build(STDiT, 1).eval()
    ratios = {}
    for tokens in (40, TOKENS_OF_TEXT):  # a sentence or two, and the longest prompt
        x, t, y, mask = inputs(1)
        mask[:, tokens:] = 0
        kept = guided(model, x, y, y, mask, 7.0, "v1")
        batched = guided(lambda *a: model(*a), x, y, y, mask, 7.0, "v1")  # a plain callable: its text is not kept

        def neither(x: Tensor = x, t: Tensor = t, y: Tensor = y, mask: Tensor = mask) -> None:
            model(x, t, y, mask)
            model(x, t, y, mask)

        calls = {
            "both": lambda p=kept, x=x, t=t: p(x, t),
            "batched": lambda p=batched, x=x, t=t: p(x, t),
            "neither": neither,
        }
        times = alternate(calls, 2 * ROUNDS)  # type: ignore[arg-type]
        name = f"one frame, prompt of {tokens} tokens"
        ratios[f"{name}: text kept, one batch / neither"] = times["both"] / times["neither"]
        ratios[f"{name}: one batch / two passes"] = times["batched"] / times["neither"]
    torch.set_num_threads(1)
    return ratios


@torch.no_grad()
def against_dit() -> dict[str, float]:
    """A forward pass of full-attention DiT over STDiT's, same width and depth."""
    ratios = {}
    for frames in (4, 16, 32):
        dit, stdit, arguments = build(DiT, frames), build(STDiT, frames), inputs(frames)
        calls = {"dit": lambda m=dit, a=arguments: m(*a), "stdit": lambda m=stdit, a=arguments: m(*a)}
        times = alternate(calls, 3)  # type: ignore[arg-type]
        ratios[f"DiT / STDiT, forward, {frames} frames"] = times["dit"] / times["stdit"]
    return ratios


def main() -> None:
    """Measure, print a table and keep it."""
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for measure in (training_step, one_frame_block, guided_step, against_dit):
        for name, value in measure().items():
            figures[name] = round(value, 3)
            print(f"{name:<60} {value:.3f}", flush=True)
    print(save("stdit-cpu", {"command": "python -m benchmarks.stdit", "figures": figures}))


if __name__ == "__main__":
    main()
