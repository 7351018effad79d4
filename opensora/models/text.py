"""Text encoders from a local folder: T5 v1.1 (arXiv 1910.10683), or the text half of CLIP (arXiv 2103.00020).

Shapes: `B` batch, `L` text tokens, `Cc` channels of an embedding.
"""

import contextlib
import gc
import json
import logging
import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4
from zipfile import is_zipfile

import torch
from torch import Tensor

from opensora.models.clean_caption import clean_caption
from opensora.step import fingerprint
from opensora.weights import WeightsError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KINDS = {"t5": "t5", "clip": "clip", "clip_text_model": "clip"}  # by `model_type`; `clip` has a vision half too
CLIP_TOKENS = 77  # CLIP was trained on texts of this length
TOKENIZERS = ({"tokenizer.json"}, {"spiece.model"}, {"vocab.json", "merges.txt"})
# The files that Transformers loads, in the order in which it looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
BATCH = 16  # texts that `embed_texts` encodes at once
CACHE_VERSION = 1  # counts changes of what an embedding is made of beside its key, such as how captions are cleaned
LARGE, END = 16 << 20, 1 << 20  # bytes: of a file above LARGE only both ends are hashed
SHOWN = 4  # words on each side of a cut


class TextEncoder:
    """A frozen T5 or CLIP text encoder and its tokenizer; `kind` is `t5` or `clip`.

    Raises:
        WeightsError: the folder is no such encoder, or a file in it is missing, damaged or does not fit.
    """

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.kind = _read_kind(folder)
        _check_files(folder)
        self.tokenizer, encoder = _load(folder, self.kind, dtype)
        self.encoder = encoder.to(device).eval()
        self.device = device

    @torch.no_grad()
    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, Cc] float32 and mask [B, L] (1 for text), both on the CPU.

        T5 reads cleaned captions (see `clean_caption`); both are padded with zeros to L = `max_tokens`. CLIP gives one
        pooled embedding of a text, so L = 1; it reads up to 77 tokens, whatever `max_tokens` is. What is longer is
        cut with a warning.

        Raises:
            ValueError: no text, or no token to read.
        """
        if not texts or max_tokens < 1:
            raise ValueError(f"{len(texts)} texts of at most {max_tokens} tokens: expected at least one of both")
        pooled = self.kind == "clip"
        read = list(texts) if pooled else [clean_caption(text) for text in texts]
        limit = min(CLIP_TOKENS, self.encoder.config.max_position_embeddings) if pooled else max_tokens
        tokens = self.tokenizer(read, max_length=limit, padding="max_length", truncation=True, return_tensors="pt")
        special = self.tokenizer.num_special_tokens_to_add()
        rows = zip(texts, read, tokens.encodings, strict=True)
        for cut in dict.fromkeys(_cut(text, seen, encoding, special) for text, seen, encoding in rows):
            if cut:
                logger.warning(cut)
        tokens = tokens.to(self.device)
        if pooled:
            # Padding comes after the pooled token and attention looks back only: no mask, as in Open-Sora 1.0.
            embeddings = self.encoder(input_ids=tokens.input_ids).pooler_output[:, None]  # [B, 1, Cc]
            return embeddings.float().cpu(), torch.ones(len(texts), 1, dtype=torch.long)
        mask = tokens.attention_mask
        embeddings = self.encoder(input_ids=tokens.input_ids, attention_mask=mask).last_hidden_state  # [B, L, Cc]
        return embeddings.float().masked_fill(mask[..., None] == 0, 0.0).cpu(), mask.cpu()


def embed_texts(
    folder: Path,
    texts: Sequence[str],
    max_tokens: int,
    *,
    cache: Path | None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, L, Cc] float32 and mask [B, L] as of `TextEncoder.encode`, kept in the folder `cache`.

    The encoder is loaded only for texts that are not in the cache, and has left the memory when this returns. A text's
    place in the cache depends on the encoder's files (see `folder_identity`), `dtype`, `max_tokens` and the text. What
    is read from the cache is, bit for bit, what was computed. A damaged file of the cache is made again; a cache
    that cannot be written is a warning.

    Raises:
        ValueError: no text, or no token to read.
        WeightsError: the folder is no text encoder.
    """
    if not texts:
        raise ValueError("no text to embed")
    length = 1 if _read_kind(folder) == "clip" else max_tokens
    paths: dict[str, Path] = {}
    if cache is not None:
        identity = folder_identity(folder)
        for text in texts:
            key = fingerprint(CACHE_VERSION, identity, str(dtype), max_tokens, text)
            paths[text] = cache / key[:2] / f"{key}.safetensors"
    known = {text: row for text, path in paths.items() if (row := _read_cached(path, length)) is not None}
    missing = [text for text in dict.fromkeys(texts) if text not in known]
    for text, row in _embed_missing(folder, missing, max_tokens, device, dtype):
        known[text] = row
        if paths and not _write_cached(paths[text], row):
            paths = {}
    return _pad([known[text] for text in texts], length)


def folder_identity(folder: Path) -> str:
    """sha256 over names, sizes and contents of the folder's files (subfolders are not looked into).

    Of a file above 16 MiB only the first and the last MiB are read: enough to tell published models apart, but a
    change of some weights in the middle of a large file goes unnoticed.
    """
    digest = sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(os.fsencode(path.name) + f"\0{size}\0".encode())
        with path.open("rb") as handle:
            if size > LARGE:
                digest.update(handle.read(END))
                handle.seek(-END, os.SEEK_END)
            digest.update(handle.read())
    return digest.hexdigest()


def _read_kind(folder: Path) -> str:
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder} is no text encoder: it has no config.json; put the folder of a T5 or CLIP there")
    config = _read_json(path)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in KINDS:
        raise WeightsError(f"{path} says model_type {model_type!r}, expected one of {', '.join(KINDS)}")
    return KINDS[model_type]


def _check_files(folder: Path) -> None:
    """Raises WeightsError for what is missing or damaged, before anything heavy is loaded."""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    if not any(names <= present for names in TOKENIZERS):
        expected = ", or ".join(" with ".join(sorted(names, reverse=True)) for names in TOKENIZERS)
        raise WeightsError(f"{folder} has no tokenizer; put there {expected}")
    found = next((name for name in WEIGHTS if name in present), None)
    if found is None:
        others = sorted(name for name in present if name.endswith((".safetensors", ".bin")))
        hint = f"; {', '.join(others)} cannot be read under such a name" if others else ""
        raise WeightsError(f"{folder} has no weights; put there {', or '.join(WEIGHTS)} with its parts{hint}")
    parts = [found]
    if found.endswith(".index.json"):
        index = _read_json(folder / found)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise WeightsError(f"{folder / found} is damaged: it has no weight_map; download it again")
        parts = sorted({str(name) for name in index["weight_map"].values()})
        absent = [name for name in parts if name not in present]
        if absent:
            raise WeightsError(f"{folder} lacks {', '.join(absent)}, which {found} names; download what is missing")
    for name in parts:
        _check_weights(folder / name)


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is damaged: {error}; download it again") from error


def _check_weights(path: Path) -> None:
    """Raises WeightsError for a file cut short or a pickle of more than tensors; reads little more than names."""
    from safetensors import safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        else:
            torch.load(path, map_location="meta", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # damaged bytes raise anything; the libraries' texts advise to trust the file
        raise WeightsError(
            f"{path} is damaged, or holds more than tensors; nothing in it was run; download it again"
        ) from error


def _load(folder: Path, kind: str, dtype: torch.dtype) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the bar of a tiny file says nothing
    verbosity = transformers_logging.get_verbosity()
    # AutoTokenizer knows none for `clip_text_model`; for T5 it takes the class that the folder's files are of.
    tokenizer_class, model_class = (CLIPTokenizer, CLIPTextModel) if kind == "clip" else (AutoTokenizer, T5EncoderModel)
    try:
        tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        transformers_logging.set_verbosity_error()  # what is too much (a decoder, a vision half) is as expected
        model, report = model_class.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # Transformers and tokenizers raise anything for files that are damaged or do not fit
        reason = (str(error).splitlines() or [""])[0]
        raise WeightsError(f"the {kind} in {folder} cannot be loaded: {type(error).__name__}: {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    wrong = [f"missing {name}" for name in sorted(report["missing_keys"])]
    wrong += [
        f"{name} is {list(found)}, expected {list(expected)}"
        for name, found, expected in sorted(report["mismatched_keys"])
    ]
    if wrong:  # Transformers would go on with random values
        raise WeightsError(f"the weights in {folder} do not fit its config.json: {'; '.join(wrong)}")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer, model


def _cut(given: str, read: str, encoding: "Encoding", special: int) -> str | None:
    """Where a text was cut, in words; None if it is whole.

    Args:
        given, read: the text before and after cleaning.
        encoding: its tokens; what did not fit is its `overflowing`.
        special: how many tokens a tokenizer adds, such as `</s>`.
    """
    if not encoding.overflowing:
        return None
    kept = len(encoding.ids)
    total = kept + sum(sum(rest.attention_mask) - special for rest in encoding.overflowing)
    end = max(end for _, end in encoding.offsets)  # characters of `read`; special tokens span none
    return (
        f"the text {_words(given.split()[:SHOWN])}… has {total} tokens, and {kept} are read: "
        f"up to …{_words(read[:end].split()[-SHOWN:])}; lost from {_words(read[end:].split()[:SHOWN])}… on"
    )


def _words(words: list[str]) -> str:
    return repr(" ".join(words))


def _embed_missing(
    folder: Path, texts: list[str], max_tokens: int, device: str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Each text with the embeddings of its tokens [n, Cc], n ≤ L; the encoder is freed at the end."""
    if not texts:
        return
    encoder = TextEncoder(folder, device, dtype)
    try:
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            embeddings, mask = encoder.encode(batch, max_tokens)
            for text, row, present in zip(batch, embeddings, mask, strict=True):
                yield text, row[: int(present.sum())].clone()
    finally:
        del encoder
        gc.collect()  # modules of Transformers refer to themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _pad(rows: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """B rows [n, Cc], each with its own n ≤ L, as embeddings [B, L, Cc] and mask [B, L]."""
    embeddings = torch.zeros(len(rows), length, rows[0].shape[1])
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        embeddings[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return embeddings, mask


def _read_cached(path: Path, length: int) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        row = load(path.read_bytes())["embeddings"]
    except (OSError, SafetensorError, KeyError):
        return None
    fits = row.dtype == torch.float32 and row.ndim == 2 and 0 < len(row) <= length
    return row if fits else None


def _write_cached(path: Path, row: Tensor) -> bool:
    """False, with a warning, if it cannot be written."""
    from safetensors.torch import save

    part = path.with_name(f"{path.name}.{uuid4().hex}.part")  # other processes may write the same text
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(save({"embeddings": row}))
        part.replace(path)  # not synced: what a crash leaves damaged is made again
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        logger.warning("embeddings of texts are not kept: %s cannot be written (%s)", path.parent, error.strerror)
        return False
    return True
