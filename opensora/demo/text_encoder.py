"""A tiny frozen T5 with a word-level tokenizer, as a folder that Transformers loads like a real one.

Its weights are random: for a few dozen words a random encoder tells captions apart as well as a trained one.
"""

from collections.abc import Iterable
from pathlib import Path

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
WIDTH = 64  # channels of an embedding
LAYERS = 2
HEADS = 4
MAX_WORDS = 64  # words a caption


def build_text_encoder(folder: Path, words: Iterable[str], seed: int, width: int = WIDTH) -> None:
    """Write a T5 encoder and its tokenizer for `words` into `folder`.

    Text of other words becomes `<unk>`; every text ends with `</s>`, and case does not matter. The same words and
    seed give the same weights.

    Args:
        width: channels of an embedding.
    """
    import torch
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # the bar of a tiny file says nothing
    tokens = [PAD, EOS, UNKNOWN, *sorted({word.lower() for word in words})]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=MAX_WORDS,
        padding_side="right",
    )
    config = T5Config(
        vocab_size=len(tokens),
        d_model=width,
        d_kv=WIDTH // HEADS,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        dropout_rate=0.0,
        pad_token_id=vocabulary[PAD],
        eos_token_id=vocabulary[EOS],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5EncoderModel(config)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    model.save_pretrained(folder)
