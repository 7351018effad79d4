"""The text encoders: both kinds load, padding is empty, long texts are cut in the open, the cache gives the same.

Past 400 lines because a T5 and a CLIP are built here in the files in which the large ones are published.
"""

import io
import json
import logging
import random
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from opensora.models import text as module
from opensora.models.text import TextEncoder, embed_texts, folder_identity
from opensora.weights import WeightsError

TEXTS = ["a red circle moving left", "a square", "a blue triangle moving up"]
WORDS = "a the red blue green large small circle square triangle moves moving left right up down over grass and sand"
LONG = "a red circle moving left " * 400  # 2,000 words
T5_NAMES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
T5_EXTRA = [f"<extra_id_{index}>" for index in range(100)]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """What a file holds, read so that the file may then be written."""
    return load(path.read_bytes())


@pytest.fixture(scope="module", params=["with extra tokens", "without"])
def released_t5(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 v1.1, decoder and all, in the files in which the large ones are published."""
    import sentencepiece
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5-v1_1")
    rng = random.Random(0)
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choices(WORDS.split(), k=8)) for _ in range(40)]),
        model_writer=pieces,
        model_type="unigram",
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    extra = T5_EXTRA if request.param == "with extra tokens" else None
    names = {**T5_NAMES, "additional_special_tokens": extra}
    (folder / "special_tokens_map.json").write_text(json.dumps(names if extra else T5_NAMES))
    settings = {**names, "extra_ids": len(extra or ()), "model_max_length": 512, "tokenizer_file": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = T5Config(
        vocab_size=256, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    torch.manual_seed(0)
    state = T5ForConditionalGeneration(config).state_dict()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    shards = {f"pytorch_model-0000{part + 1}-of-00002.bin": list(state)[part::2] for part in range(2)}
    for name, keys in shards.items():
        torch.save({key: state[key] for key in keys}, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module", params=["clip_text_model", "clip"])
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP: its text half alone, or both halves."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz<>/"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    special = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), **size, **special}
    torch.manual_seed(0)
    if request.param == "clip":
        vision = {**size, "image_size": 8, "patch_size": 4}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    else:
        model = CLIPTextModel(CLIPTextConfig(**text))
    model.save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("red cat") == ["red</w>", "c", "a", "t</w>"]
    return folder


@pytest.fixture
def noise(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log, and in it what Transformers says, which keeps its lines to itself."""
    logging.getLogger("transformers").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("transformers").removeHandler(caplog.handler)


def test_embeddings_and_masks(text_encoder: Path) -> None:
    encoder = TextEncoder(text_encoder)
    both, mask = encoder.encode(["a red circle moving left", "a square"], 8)
    assert both.shape == (2, 8, 64)
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert (both[mask == 0] == 0).all()
    alone, _ = encoder.encode(["a square"], 8)
    torch.testing.assert_close(alone[0], both[1], atol=1e-5, rtol=1e-4)
    cut, mask = encoder.encode(["a red circle moving left"], 3)
    assert cut.shape == (1, 3, 64)
    assert mask.tolist() == [[1, 1, 1]]
    for texts, tokens in (([], 8), (["a square"], 0)):
        with pytest.raises(ValueError, match="at least one of both"):
            encoder.encode(texts, tokens)


def test_directions_differ(text_encoder: Path) -> None:
    left, right = TextEncoder(text_encoder).encode(["moving left", "moving right"], 4)[0]
    assert (left - right).norm() > 0.1 * left.norm()


def test_a_released_t5_loads_and_reads_cleaned_captions(released_t5: Path, noise: pytest.LogCaptureFixture) -> None:
    from sentencepiece import SentencePieceProcessor

    encoder = TextEncoder(released_t5)
    caption = "a red circle moves over overgrown grass"
    pieces = SentencePieceProcessor(model_file=str(released_t5 / "spiece.model"))
    assert encoder.tokenizer(caption).input_ids == [*pieces.encode(caption), pieces.eos_id()]
    saved = {}
    for path in released_t5.glob("*.bin"):
        saved |= torch.load(path, weights_only=True)
    own = encoder.encoder.state_dict()
    assert own
    assert all(torch.equal(saved[name], tensor) for name, tensor in own.items())
    nasty = "A RED <b>circle</b> moves over overgrown grass www.example.com/a"
    assert torch.equal(encoder.encode([nasty], 40)[0], encoder.encode([caption], 40)[0])
    assert not noise.records


def test_clip_gives_its_pooled_output_for_the_text_as_it_is(clip: Path, noise: pytest.LogCaptureFixture) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    texts = ["red cat", "a <b> dog"]
    encoder = TextEncoder(clip)
    assert not noise.records
    embeddings, mask = encoder.encode(texts, 5)
    assert embeddings.shape == (2, 1, 16)
    assert mask.tolist() == [[1], [1]]
    tokens = CLIPTokenizer.from_pretrained(clip)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(clip)(**tokens).pooler_output
    torch.testing.assert_close(embeddings[:, 0], expected, atol=1e-5, rtol=1e-4)
    assert (expected[0] - expected[1]).norm() > 0.1


def test_a_clip_saved_by_older_versions_loads(clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip, tmp_path / "clip")
    state = tensors(clip / "model.safetensors")
    old = {name if "_model." in name else f"text_model.{name}": tensor for name, tensor in state.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(TextEncoder(folder).encode(["red cat"], 77)[0], TextEncoder(clip).encode(["red cat"], 77)[0])


def test_bfloat16_is_close_and_results_are_float32(released_t5: Path, clip: Path) -> None:
    for folder in (released_t5, clip):
        full, _ = TextEncoder(folder).encode(TEXTS, 40)
        half, _ = TextEncoder(folder, dtype=torch.bfloat16).encode(TEXTS, 40)
        assert half.dtype == torch.float32
        assert not torch.equal(half, full)
        assert (half - full).norm() < 0.03 * full.norm()


def test_a_long_text_is_cut_as_by_the_tokenizer_and_says_where(
    text_encoder: Path, noise: pytest.LogCaptureFixture
) -> None:
    encoder = TextEncoder(text_encoder)
    embeddings, mask = encoder.encode(["a square", LONG, LONG], 120)
    (record,) = noise.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "the text 'a red circle moving'… has 2001 tokens, and 120 are read: "
        "up to …'a red circle moving'; lost from 'left a red circle'… on"
    )
    assert mask.sum(1).tolist() == [3, 120, 120]
    tokens = encoder.tokenizer(LONG, max_length=120, truncation=True, return_tensors="pt")
    assert tokens.input_ids[0, -1] == encoder.tokenizer.eos_token_id
    with torch.no_grad():
        expected = encoder.encoder(**tokens).last_hidden_state[0]
    torch.testing.assert_close(embeddings[1], expected, atol=1e-5, rtol=1e-4)
    encoder.encode([LONG], 1)
    assert "has 2001 tokens, and 1 are read: up to …''; lost from 'a red circle moving'" in noise.messages[-1]


def test_a_released_t5_cuts_within_a_word_and_keeps_the_end(released_t5: Path, noise: pytest.LogCaptureFixture) -> None:
    encoder = TextEncoder(released_t5)
    encoder.encode(["A RED CIRCLE overgrown"], 5)
    (record,) = noise.records
    pieces = encoder.tokenizer.tokenize("a red circle overgrown")
    kept = "".join(pieces[:4]).replace("▁", " ").strip()
    assert f"has {len(pieces) + 1} tokens, and 5 are read: up to …'{kept}'" in record.getMessage()
    assert record.getMessage().startswith("the text 'A RED CIRCLE overgrown'…")


def test_clip_reads_77_tokens_whatever_is_asked_for(clip: Path, noise: pytest.LogCaptureFixture) -> None:
    encoder = TextEncoder(clip)
    long = "red " * 100
    embeddings, _ = encoder.encode([long], 200)
    assert torch.equal(embeddings, encoder.encode([long], 1)[0])
    assert torch.equal(embeddings, encoder.encode(["red " * 75], 200)[0])
    assert ["has 102 tokens, and 77 are read" in message for message in noise.messages] == [True, True]


@pytest.mark.parametrize(
    ("hurt", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"t5 is no text encoder: it has no config\.json; put the folder"),
        (lambda folder: (folder / "config.json").unlink(), r"it has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "model_type None, expected one of t5, clip"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "model_type 'bert', expected"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"no tokenizer; put there tokenizer\.json, or spiece"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the t5 in .* cannot be loaded: "),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no weights; put there model\.safetensors, or"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model.fp16.safetensors"),
            r"no weights.*model\.fp16\.safetensors cannot be read under such a name",
        ),
    ],
)
def test_a_folder_that_is_no_text_encoder_is_refused(
    hurt: Callable[[Path], object], message: str, text_encoder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(text_encoder, tmp_path / "t5")
    hurt(folder)
    with pytest.raises(WeightsError, match=message) as error:
        TextEncoder(folder)
    assert "\n" not in str(error.value)


def test_absent_shards_are_named(released_t5: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(released_t5, tmp_path / "t5")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(WeightsError, match=r"lacks pytorch_model-00002-of-00002\.bin, which pytorch_model\.bin\.ind"):
        TextEncoder(folder)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="has no weight_map"):
        TextEncoder(folder)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_weights_and_code_in_them_end_in_one_line(
    zipped: bool, text_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(text_encoder, tmp_path / "t5")
    whole = folder / "model.safetensors"
    content, state = whole.read_bytes(), tensors(whole)
    refused = r"is damaged, or holds more than tensors; nothing in it was run; download it again$"
    for length in (0, 100, len(content) // 2):
        whole.write_bytes(content[:length])
        with pytest.raises(WeightsError, match=rf"model\.safetensors {refused}"):
            TextEncoder(folder)
    whole.unlink()
    binary = folder / "pytorch_model.bin"
    torch.save(state, binary, _use_new_zipfile_serialization=zipped)
    expected = TextEncoder(text_encoder).encode(TEXTS, 8)[0]
    assert torch.equal(TextEncoder(folder).encode(TEXTS, 8)[0], expected)
    content = binary.read_bytes()
    for length in (0, 100, len(content) // 2):
        binary.write_bytes(content[:length])
        with pytest.raises(WeightsError, match=rf"pytorch_model\.bin {refused}"):
            TextEncoder(folder)
    torch.save({**state, "evil": Evil(tmp_path / "ran")}, binary, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=refused):
        TextEncoder(folder)
    monkeypatch.setattr(module, "_check_weights", lambda path: None)  # Transformers alone runs nothing either
    with pytest.raises(WeightsError, match=r"cannot be loaded: UnpicklingError: [^\n]*$"):
        TextEncoder(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_are_named(text_encoder: Path, tmp_path: Path, noise: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(text_encoder, tmp_path / "t5")
    state = tensors(folder / "model.safetensors")
    del state["encoder.final_layer_norm.weight"]
    state["encoder.block.1.layer.0.SelfAttention.q.weight"] = torch.zeros(3, 5)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    expected = (
        r"missing encoder\.final_layer_norm\.weight; encoder\.block.1.*\.q\.weight is \[3, 5\], expected \[64, 64"
    )
    with pytest.raises(WeightsError, match=expected):
        TextEncoder(folder)
    assert not noise.records


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the encoder was loaded")


def test_embeddings_are_cached_bit_for_bit(text_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    fresh, mask = embed_texts(text_encoder, TEXTS, 8, cache=cache)
    expected = TextEncoder(text_encoder).encode(TEXTS, 8)
    assert torch.equal(fresh, expected[0])
    assert torch.equal(mask, expected[1])
    assert torch.equal(embed_texts(text_encoder, TEXTS, 8, cache=None)[0], fresh)
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    assert [path.parent.name for path in files] == [path.name[:2] for path in files]
    assert {path.suffix for path in files} == {".safetensors"}
    assert sorted(len(tensors(path)["embeddings"]) for path in files) == [3, 6, 6]  # real tokens only
    monkeypatch.setattr(module, "TextEncoder", refuse)
    order = [2, 0, 0, 1]
    again, mask = embed_texts(text_encoder, [TEXTS[index] for index in order], 8, cache=cache)
    assert torch.equal(again, fresh[order])
    assert torch.equal(mask, expected[1][order])
    for tokens, dtype in ((9, torch.float32), (8, torch.bfloat16)):
        with pytest.raises(AssertionError, match="the encoder was loaded"):
            embed_texts(text_encoder, TEXTS, tokens, cache=cache, dtype=dtype)
    with pytest.raises(ValueError, match="no text"):
        embed_texts(text_encoder, [], 8, cache=cache)


def test_clip_embeddings_are_cached_too(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, mask = embed_texts(clip, ["red cat", "a dog"], 20, cache=tmp_path)
    assert fresh.shape == (2, 1, 16)
    assert mask.tolist() == [[1], [1]]
    monkeypatch.setattr(module, "TextEncoder", refuse)
    again, mask = embed_texts(clip, ["red cat", "a dog"], 20, cache=tmp_path)
    assert torch.equal(again, fresh)
    assert mask.tolist() == [[1], [1]]


def test_only_what_is_missing_is_encoded_and_the_encoder_leaves_the_memory(
    text_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[str]] = []
    alive: list[weakref.ref] = []

    class Watched(TextEncoder):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            alive.append(weakref.ref(self.encoder))

        def encode(self, texts: list[str], max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
            batches.append(texts)
            return super().encode(texts, max_tokens)

    monkeypatch.setattr(module, "TextEncoder", Watched)
    embed_texts(text_encoder, TEXTS[:1], 8, cache=tmp_path)
    many = [f"a square {'left ' * number}" for number in range(20)]
    embed_texts(text_encoder, [*TEXTS, *many, *many], 8, cache=tmp_path)
    assert [len(batch) for batch in batches] == [1, 16, 6]
    assert TEXTS[0] not in batches[1] + batches[2]
    assert [ref() for ref in alive] == [None, None]


def test_another_encoder_has_another_identity(text_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(text_encoder, tmp_path / "t5")
    identity = folder_identity(folder)
    assert identity == folder_identity(text_encoder)
    embed_texts(text_encoder, TEXTS, 8, cache=tmp_path / "cache")
    state = tensors(folder / "model.safetensors")
    state["encoder.final_layer_norm.weight"] *= 2
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert folder_identity(folder) != identity
    doubled, _ = embed_texts(folder, TEXTS, 8, cache=tmp_path / "cache")
    assert torch.equal(doubled, embed_texts(text_encoder, TEXTS, 8, cache=tmp_path / "cache")[0] * 2)
    (folder / "special_tokens_map.json").write_text("{}")
    assert folder_identity(folder) != identity


def test_of_large_files_both_ends_decide(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    found = []
    for place in (None, 0, (8 << 20), (17 << 20) - 1):
        with path.open("wb") as handle:
            handle.truncate(17 << 20)
            if place is not None:
                handle.seek(place)
                handle.write(b"x")
        found.append(folder_identity(tmp_path))
    assert found[2] == found[0]
    assert len(set(found)) == 3


def test_a_damaged_file_of_the_cache_is_made_again(text_encoder: Path, tmp_path: Path) -> None:
    fresh, _ = embed_texts(text_encoder, TEXTS, 8, cache=tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    content = [path.read_bytes() for path in files]
    files[0].write_bytes(content[0][:50])
    files[1].write_bytes(b"")
    save_file({"embeddings": torch.zeros(99, 64)}, files[2])  # more tokens than were asked for
    again, _ = embed_texts(text_encoder, TEXTS, 8, cache=tmp_path)
    assert torch.equal(again, fresh)
    assert [path.read_bytes() for path in files] == content


def test_a_cache_that_cannot_be_written_is_one_warning(
    text_encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    found, _ = embed_texts(text_encoder, TEXTS, 8, cache=tmp_path / "file" / "cache")
    (message,) = caplog.messages
    assert "embeddings of texts are not kept" in message
    assert torch.equal(found, TextEncoder(text_encoder).encode(TEXTS, 8)[0])
