"""Peak memory of `opensora generate` at 64x512x512, with models of the released sizes.

    python -m benchmarks.generate_memory [--depth 28] [--dtype float32]

Four blocks take a quarter of an hour on two CPU cores, most of it the VAE's, and 28 blocks twice as long.
The weights are random, since memory does not depend on them: STDiT-XL/2, a VAE of Stable Diffusion's shape and a text
encoder as wide as T5-XXL, but one thin layer deep. One sampling step stands for all, which need the same memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import save
from opensora.config import load_config
from opensora.generate import Pipeline, choose_sampling, needs
from opensora.models.stdit import STDiT
from opensora.training.checkpoint import describe_checkpoint, save_checkpoint, stdit_config

GIB = 2**30
PROMPT = "a lighthouse on a small island while long waves roll in"


def build(folder: Path, depth: int) -> Path:
    """A checkpoint with its VAE and text encoder below `folder`."""
    from diffusers import AutoencoderKL

    from opensora.demo.text_encoder import build_text_encoder

    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    ).save_pretrained(folder / "vae")
    build_text_encoder(folder / "t5", PROMPT.split(), seed=0, width=4096)
    config = load_config(Path("params.yaml"), "h800", (f"model.depth={depth}", "encode.dtype=float32"))
    model = STDiT(stdit_config(config, "train_highres", 8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    info = {"config": config.model_dump(mode="json"), "stage": "train_highres", "vae": "vae", "text_encoder": "t5"}
    return save_checkpoint(folder / "xl", step=0, model=model.state_dict(), info=info | {"vae_scale": 8})


def main() -> None:
    """Generate one video in a process of its own and compare its peak with what was foretold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = build(folder, chosen.depth)
        described = describe_checkpoint(checkpoint)
        sampling = replace(choose_sampling(described, "dpm_solver", 1), guidance=7.0)
        foretold = needs(Pipeline(described, dtype=chosen.dtype), sampling, 1)
        arguments = ["--sampler", "dpm_solver", "--steps", "1", "--guidance", "7", "--dtype", chosen.dtype]
        command = [sys.executable, "-m", "opensora.cli", "generate", "--checkpoint", str(checkpoint), *arguments]
        start = time.monotonic()
        subprocess.run([*command, "--prompt", PROMPT, "--out", str(folder / "out")], check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        values = {
            "command": f"python -m benchmarks.generate_memory --depth {chosen.depth} --dtype {chosen.dtype}",
            "peak_gib": round(peak / GIB, 2),
            "foretold_gib": round(foretold.peak() / GIB, 2),
            "foretold_parts_gib": {
                phase: {part: round(value / GIB, 2) for part, value in parts.items()}
                for phase, parts in foretold.parts().items()
            },
            "seconds": round(time.monotonic() - start),
        }
    print(json.dumps(values, indent=2))
    print(save(f"generate-memory-depth{chosen.depth}-{chosen.dtype}", values))


if __name__ == "__main__":
    main()
