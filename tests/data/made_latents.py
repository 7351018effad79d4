"""A tiny encoded data set whose numbers say which clip and frame they are of."""

from pathlib import Path

import torch

from opensora.data.buckets import Bucket
from opensora.data.shards import text_key, write_tensors
from opensora.manifest import Clip, part_name, write_part

BUCKETS = [Bucket(3, 8, 8, 2, interval=2), Bucket(2, 8, 16, 1)]


def write_latents(folder: Path) -> Path:
    """Six square clips and three wide ones; frame `i` of clip `n` is 100·n + i everywhere, without deviation."""
    tensors, texts, clips = {}, {}, []
    for index in range(9):
        width = 8 if index < 6 else 16
        frames = torch.arange(10.0)[:, None, None, None].expand(10, 4, 2, width // 4) + 100 * index
        tensors[f"c{index}/8x{width}/mean"] = frames.half()
        tensors[f"c{index}/8x{width}/std"] = torch.zeros_like(frames).half()
        texts[text_key(f"t{index}")] = torch.ones(2 + index % 2, 5).half()
        about = {"frames": 10, "height": 8, "width": width, "caption": f"t{index}"}
        clips.append(Clip(f"c{index}", "x", **about, latent_shard="l", text_shard="t"))
    clips.append(Clip("short", "x", frames=4, height=8, width=8, latent_shard="l", text_shard="t"))
    write_tensors(folder / "l", tensors)
    write_tensors(folder / "t", texts)
    write_part(folder / part_name(0), clips)
    return folder
