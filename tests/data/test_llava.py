"""LLaVA in this process: both kinds load from a folder, a batch says what single clips say, and memory may be short."""

import multiprocessing
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opensora.config import CaptionConfig
from opensora.data.answers import Answer
from opensora.data.gpu import claim_gpu
from opensora.data.llava import Llava
from opensora.demo.captioner import train_llava
from opensora.demo.shapes import all_scenes, render_clip
from opensora.step import StepError

SCENES = all_scenes()[:35:7]
CONFIG = CaptionConfig(prompt="what moves where", max_new_tokens=12, batch_size=2, threads=1)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [render_clip(scene, 3, 32, rng) for scene in SCENES]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory, frames: list[np.ndarray]) -> Path:
    """A LLaVA of random weights that says different things of different clips."""
    import torch
    from transformers import LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("models") / "llava"
    pairs = [(clip, scene.caption) for clip, scene in zip(frames, SCENES, strict=True)]
    train_llava(folder, pairs, prompt=CONFIG.prompt, steps=0, seed=0)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    torch.manual_seed(0)
    shake(model)
    model.save_pretrained(folder)
    return folder


def shake(model: Any) -> None:
    """Weights far from uniform, so that clips, and a batch and single clips if there is a mistake, differ."""
    import torch

    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)


@pytest.fixture(scope="module")
def said(llava: Path, frames: list[np.ndarray]) -> list[Answer]:
    """What that LLaVA says of each clip, asked one by one."""
    model = Llava(llava, CONFIG)
    answers = [model.caption([clip])[0] for clip in frames]
    assert len({answer.text for answer in answers}) > 2
    return answers


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory, llava: Path) -> Path:
    """A LLaVA-NeXT of random weights with the same words, which has a chat template and cuts pictures into tiles."""
    import torch
    from transformers import (
        AutoConfig,
        AutoProcessor,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    folder = tmp_path_factory.mktemp("models") / "llava_next"
    source = AutoConfig.from_pretrained(llava)
    grid = [[32, 64], [64, 32], [64, 64]]
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=source.vision_config,
            text_config=source.text_config,
            image_token_index=source.image_token_id,
            image_grid_pinpoints=grid,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
    )
    shake(model)
    model.save_pretrained(folder)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grid
        ),
        tokenizer=AutoProcessor.from_pretrained(llava, backend="pil").tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=(
            "{% for m in messages %}{% for c in m.content %}"
            "{% if c.type == 'image' %}<image>{% else %} {{ c.text }}{% endif %}"
            "{% endfor %}{% endfor %}"
        ),
    ).save_pretrained(folder)
    return folder


def ask(model: Llava, clips: Sequence[np.ndarray], attempt: int = 0) -> list[tuple[str, Answer]]:
    answers: list[tuple[str, Answer]] = []
    questions = ((str(index), clip) for index, clip in enumerate(clips))
    model.ask(questions, attempt, lambda clip_id, answer: answers.append((clip_id, answer)))
    return answers


def test_answers_come_in_order(llava: Path, frames: list[np.ndarray], said: list[Answer]) -> None:
    answers = ask(Llava(llava, CONFIG), frames)  # batches of 2, 2 and 1
    assert answers == [(str(index), answer) for index, answer in enumerate(said)]
    assert ask(Llava(llava, CONFIG), []) == []


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_says_what_single_clips_say(
    kind: str, dtype: str, frames: list[np.ndarray], request: pytest.FixtureRequest
) -> None:
    model = Llava(request.getfixturevalue(kind), CONFIG.model_copy(update={"dtype": dtype}))
    rng = np.random.default_rng(1)
    wide = render_clip(SCENES[0], 3, 64, rng)[:, 16:48]  # another form, so other tiles and another length
    clips = [*frames[:3], wide]
    single = [model.caption([clip])[0] for clip in clips]
    assert len({answer.text for answer in single}) > 1
    if dtype == "float32":
        assert model.caption(clips) == single
    else:
        assert model.caption(clips) == model.caption(clips)  # rounding may choose another word, but always the same


def test_any_of_the_models_end_tokens_ends_and_the_limit_cuts_off(
    llava: Path, frames: list[np.ndarray], said: list[Answer], tmp_path: Path
) -> None:
    folder = shutil.copytree(llava, tmp_path / "llava")
    model = Llava(folder, CONFIG)
    word = said[0].text.split()[3]
    tokenizer = model.processor.tokenizer
    model.model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(word)]
    model.model.generation_config.save_pretrained(folder)
    ended = Llava(folder, CONFIG).caption(frames)
    assert said[0].text.startswith(ended[0].text)
    assert ended[0].finish == "stop"
    assert [answer.finish == "stop" for answer in ended] == [word in answer.text.split() for answer in ended]
    cut = Llava(llava, CONFIG.model_copy(update={"max_new_tokens": 2})).caption(frames)
    assert {answer.finish for answer in cut} == {"length"}
    assert all(whole.text.startswith(short.text) for whole, short in zip(said, cut, strict=True))


def test_later_attempts_are_drawn_and_repeat_exactly(llava: Path, frames: list[np.ndarray], said: list[Answer]) -> None:
    model = Llava(llava, CONFIG.model_copy(update={"retry_temperature": 5.0}))
    second, third = ask(model, frames, attempt=1), ask(model, frames, attempt=2)
    assert second != third
    assert ask(model, frames, attempt=1) == second
    assert [answer for _, answer in ask(model, frames)] == said


def test_a_full_gpu_halves_the_batch_and_says_so_once(
    llava: Path,
    frames: list[np.ndarray],
    said: list[Answer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    model = Llava(llava, CONFIG.model_copy(update={"batch_size": 4}))
    generate, sizes, room = model.model.generate, [], 1

    def full(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(model.model, "generate", full)
    room = 2
    assert [answer for _, answer in ask(model, frames)] == said
    assert sizes == [4, 2, 2, 1]
    assert ask(model, frames[:3])[2][1] == said[2]
    assert sizes[4:] == [2, 1]
    assert capsys.readouterr().err.count("no room on the GPU") == 1
    room = 0
    with pytest.raises(StepError, match="no room to caption a single clip"):
        ask(model, frames)


def claim(count: int, folder: Path, pipe: Any) -> None:
    index, handle = claim_gpu(count, folder)
    pipe.send((index, handle is not None))
    pipe.recv()


def test_processes_claim_gpus_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    index, held = claim_gpu(2, tmp_path)
    assert (index, held is not None) == (0, True)
    ours, theirs = context.Pipe()
    process = context.Process(target=claim, args=(2, tmp_path, theirs))
    process.start()
    assert ours.poll(120)
    assert ours.recv() == (1, True)
    third, free = claim_gpu(2, tmp_path)
    assert third in (0, 1)
    assert free is None
    process.kill()
    process.join()
    again, taken = claim_gpu(2, tmp_path)
    assert (again, taken is not None) == (1, True)
