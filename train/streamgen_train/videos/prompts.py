"""Batches of prompts from a text file, for stages that need no video."""

from __future__ import annotations

import json
from pathlib import Path

from streamgen.errors import UserError
from streamgen_train.videos.config import PromptConfig
from streamgen_train.videos.order import Order


class PromptSource:
    """The prompts of a file, each once per epoch."""

    def __init__(self, config: PromptConfig, seed: int, microbatches: int) -> None:
        self.prompts = read_prompts(Path(config.path))
        self._order = Order((len(self.prompts),), seed, microbatches)

    def batch(self, step: int, microbatch: int, count: int) -> list[str]:
        """`count` prompts, a function of the arguments, the seed and the file."""
        slots = self._order.slots(step, microbatch, count)
        return [self.prompts[self._order.item(slot.bucket, slot.position)] for slot in slots]


def read_prompts(path: Path) -> list[str]:
    """One prompt per line, blank lines left out; of a .jsonl file the `prompt` of each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a text file with one prompt per line, or a .jsonl") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable text: {error}") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_prompt(path, number, line) for number, line in numbered]
    else:
        prompts = [" ".join(line.split()) for _, line in numbered]
    if not prompts:
        raise UserError(f"{path} is empty; it needs at least one prompt")
    return prompts


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: is no JSON ({error})") from error
    prompt = values.get("prompt") if isinstance(values, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{path}, line {number}: needs a text `prompt`, as {{"prompt": "a red star"}}')
    return " ".join(prompt.split())
