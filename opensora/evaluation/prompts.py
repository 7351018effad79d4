"""Which prompts and seeds an evaluation is made of: the same ones for every model that is compared."""

from collections.abc import Sequence
from pathlib import Path

from opensora.config import ConfigError, EvaluateConfig
from opensora.demo.shapes import all_scenes
from opensora.metrics import vbench


def evaluation_prompts(config: EvaluateConfig) -> list[tuple[str, int]]:
    """(prompt, seed) of the configuration and of its file, or all of the embedded world.

    A prompt's seed is `config.seed` plus its number, or the one that its line in the file gives. VBench's prompts come
    five times each.

    Raises:
        ConfigError: the file is not there, holds no prompt, or a seed that is no number; or it is VBench's, and there
            are prompts beside it.
    """
    from opensora.generate import read_prompts

    if benchmark := read_benchmark(config):
        texts = [text for text in dict.fromkeys(prompt.text for prompt in benchmark) for _ in range(vbench.SAMPLES)]
        return [(text, config.seed + number) for number, text in enumerate(texts)]
    pairs = [(text, config.seed + number) for number, text in enumerate(config.prompts)]
    if config.prompts_file:
        pairs += read_prompts(Path(config.prompts_file), config.seed + len(pairs))
    return pairs or [(scene.caption, config.seed + number) for number, scene in enumerate(all_scenes())]


def read_benchmark(config: EvaluateConfig) -> tuple[vbench.Prompt, ...]:
    """VBench's prompts, where `prompts_file` is its `VBench_full_info.json`; raises ConfigError."""
    if not config.prompts_file.endswith(".json"):
        return ()
    if config.prompts:
        raise ConfigError(
            f"evaluate.prompts_file {config.prompts_file} is VBench's list, which is measured alone; "
            "set evaluate.prompts=[]"
        )
    try:
        return tuple(vbench.read_prompts(Path(config.prompts_file)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"evaluate.prompts_file: {error}") from error


def describe_seeds(seeds: Sequence[int]) -> str:
    """ "1000-1047" for consecutive seeds, else all of them."""
    if len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ", ".join(str(seed) for seed in seeds)
