"""A tiny LLaVA that learns the embedded world's captions, saved in the form that Transformers loads."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensora.demo.shapes import all_scenes, parse_caption
from opensora.manifest import GIVEN, read_manifest

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SIZE, PATCH = 32, 8  # pixels
WIDTH, LAYERS, HEADS = 96, 2, 4
BATCH, PEAK_LR = 48, 1e-3
PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"


def train_llava(
    folder: Path,
    pairs: Sequence[tuple[np.ndarray, str]],
    *,
    prompt: str,
    steps: int,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train on (frames uint8 [P, H, W, 3], caption) pairs and save model and processor to `folder`.

    The loss counts the caption's tokens alone. The learning rate rises over 20 steps and falls linearly to zero.
    `progress` is called with the steps done and the loss.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    processor, model = _build(prompt, [caption for _, caption in pairs])
    pixels, tokens = _tensors(processor, pairs, prompt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / max(steps, 1))
    )
    start = tokens.shape[1] - _caption_length(processor, pairs)
    model.train()
    for step in range(steps):
        chosen = torch.from_numpy(rng.integers(len(pairs), size=min(BATCH, len(pairs))))
        ids = tokens[chosen]
        labels = ids.clone()
        labels[:, :start] = -100
        labels[ids == processor.tokenizer.pad_token_id] = -100
        loss = model(
            input_ids=ids,
            attention_mask=(ids != processor.tokenizer.pad_token_id).long(),
            pixel_values=pixels[chosen].flatten(0, 1),
            labels=labels,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, loss.item())
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def _build(prompt: str, captions: list[str]) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    texts = [prompt, *captions, *(scene.caption for scene in all_scenes())]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: index for index, word in enumerate([PAD, BOS, EOS, UNKNOWN, IMAGE, *words])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=vocabulary[PAD],
        bos_token_id=vocabulary[BOS],
        eos_token_id=vocabulary[EOS],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary[IMAGE],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = vocabulary[EOS]
    model.generation_config.pad_token_id = vocabulary[PAD]
    return processor, model


def _caption_length(processor: Any, pairs: Sequence[tuple[np.ndarray, str]]) -> int:
    return max(len(processor.tokenizer(caption, add_special_tokens=False).input_ids) for _, caption in pairs) + 1


def _tensors(processor: Any, pairs: Sequence[tuple[np.ndarray, str]], prompt: str) -> "tuple[Tensor, Tensor]":
    """Pixels [M, P, 3, H, W] and token ids [M, prompt + caption], the captions padded on the right."""
    import torch
    from PIL import Image

    count = len(pairs[0][0])
    pixels = [
        processor.image_processor([Image.fromarray(frame) for frame in frames], return_tensors="pt").pixel_values
        for frames, _ in pairs
    ]
    head = processor(
        images=[[Image.fromarray(frame) for frame in pairs[0][0]]],
        text=[IMAGE * count + " " + prompt],
        return_tensors="pt",
    ).input_ids[0]
    tokenizer = processor.tokenizer
    tail = torch.full((len(pairs), _caption_length(processor, pairs)), tokenizer.pad_token_id)
    for row, (_, caption) in zip(tail, pairs, strict=True):
        ids = [*tokenizer(caption, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        row[: len(ids)] = torch.tensor(ids)
    return torch.stack(pixels), torch.cat([head.expand(len(pairs), -1), tail], dim=1)


def caption_exact_match(manifest: Path, truth: Path) -> float:
    """Share of LLaVA's captions (given ones are left out) that name the shot's colour, shape and direction."""
    shots = json.loads(truth.read_text())
    right = total = 0
    for clip in read_manifest(manifest):
        if not clip.caption_model or clip.caption_model == GIVEN:
            continue
        total += 1
        middle = (clip.start_s + clip.end_s) / 2
        name = Path(clip.source).name
        shot = next(shot for shot in shots[name] if shot["start_s"] <= middle < shot["end_s"])
        right += parse_caption(clip.caption) == parse_caption(shot["caption"])
    return right / total if total else float("nan")
