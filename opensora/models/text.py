"""The text encoder: T5 v1.1 (arXiv 1910.10683) through Transformers, from a local folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class TextEncoder:
    """A frozen T5 encoder and its tokenizer."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # the bar of a tiny file says nothing
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.encoder = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=dtype).to(device).eval()
        self.device = device

    @torch.no_grad()
    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, Cc] float32 and mask [B, L] (1 for text), both padded to L = `max_tokens`."""
        tokens = self.tokenizer(
            list(texts), max_length=max_tokens, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.device)
        embeddings = self.encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask
        return embeddings.float().cpu() * mask.cpu()[..., None], mask.cpu()
