"""Untrained models of a few thousand weights, in the files in which the large ones are published."""

import json
from pathlib import Path

import torch

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
WIDTH = 16
SIZE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def build_videomae(folder: Path) -> Path:
    """A VideoMAE of 4 frames of 16×16 as it comes from pretraining, with its decoder."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    decoder = {
        "decoder_hidden_size": 8,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
    }
    config = VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, tubelet_size=2, **SIZE, **decoder)
    torch.manual_seed(0)
    VideoMAEForPreTraining(config).save_pretrained(folder)
    write_processor(folder, "VideoMAEImageProcessor", 16)
    return folder


def build_dino(folder: Path) -> Path:
    """A DINOv2 of 14×14 frames."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(image_size=14, patch_size=7, mlp_ratio=2, **SIZE)).save_pretrained(folder)
    write_processor(folder, "BitImageProcessor", 14)
    return folder


def write_processor(folder: Path, kind: str, size: int) -> None:
    """The image processor's file."""
    about = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
