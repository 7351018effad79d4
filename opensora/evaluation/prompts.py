"""Which prompts and seeds an evaluation is made of: the same ones for every model that is compared."""

from collections.abc import Sequence
from pathlib import Path

from opensora.config import EvaluateConfig
from opensora.demo.shapes import all_scenes


def evaluation_prompts(config: EvaluateConfig) -> list[tuple[str, int]]:
    """(prompt, seed) of the configuration and of its file, or all of the embedded world.

    A prompt's seed is `config.seed` plus its number, or the one that its line in the file gives.

    Raises:
        ConfigError: the file is not there, holds no prompt, or a seed that is no number.
    """
    from opensora.generate import read_prompts

    pairs = [(text, config.seed + number) for number, text in enumerate(config.prompts)]
    if config.prompts_file:
        pairs += read_prompts(Path(config.prompts_file), config.seed + len(pairs))
    return pairs or [(scene.caption, config.seed + number) for number, scene in enumerate(all_scenes())]


def describe_seeds(seeds: Sequence[int]) -> str:
    """ "1000-1047" for consecutive seeds, else all of them."""
    if len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ", ".join(str(seed) for seed in seeds)
