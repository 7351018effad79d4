"""A tiny CLIP and tiny aesthetic heads, in the files in which the large ones are published."""

import json
from pathlib import Path

import torch

FEATURES = 8  # of an image or a text
PROCESSOR = {
    "feature_extractor_type": "CLIPFeatureExtractor",  # as OpenAI's folders say
    "do_resize": True,
    "size": 8,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 8,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def build_clip(folder: Path) -> Path:
    """Write an untrained CLIP with 16-wide halves, its tokenizer and its image processor."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    special = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), **size, **special}
    vision = {**size, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=FEATURES))
    model.save_pretrained(folder)
    return folder


def build_mlp_head(path: Path, width: int = FEATURES) -> Path:
    """Of the form of LAION's improved aesthetic predictor: 6 × the first feature + 5."""
    sizes = [width, 1024, 128, 64, 16, 1]
    state = {}
    for name, before, after in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        state[f"layers.{name}.weight"] = torch.zeros(after, before)
        state[f"layers.{name}.weight"][0, 0] = {0: 2.0, 4: 3.0}.get(name, 1.0)
        state[f"layers.{name}.bias"] = torch.zeros(after)
    state["layers.7.bias"][0] = 5.0
    torch.save(state, path)
    return path


def build_linear_head(path: Path) -> Path:
    """Of the form of LAION's aesthetic-predictor: the first feature − 2 × the second + 4."""
    weight = torch.zeros(1, FEATURES)
    weight[0, :2] = torch.tensor([1.0, -2.0])
    torch.save({"weight": weight, "bias": torch.tensor([4.0])}, path)
    return path
