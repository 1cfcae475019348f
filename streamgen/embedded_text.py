"""Prompts encoded beforehand: a file of embeddings in place of a text encoder of many gigabytes.

A safetensors file with `embeddings` [N, L, D] (rows beyond a prompt's end are zero, as Wan has them) and, in its
metadata, `prompts`: a JSON list of the N prompts, and optionally `negative`: the one of them that stands for no prompt
in guidance (all zeros otherwise). Rows are read when they are asked for, so the file may be larger than memory.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from streamgen.errors import UserError
from streamgen.text import EncodedPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedTextConfig:
    """Sizes of the embeddings, and where they are."""

    file: str
    text_len: int = 512
    text_dim: int = 4096


class EmbeddedText(nn.Module):
    """Looks prompts up in a file of embeddings -> float [B, text_len, text_dim]. Opened at the first look."""

    like: Tensor

    def __init__(self, config: EmbeddedTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_len, self.text_dim = config.text_len, config.text_dim
        self.register_buffer("like", torch.zeros(()), persistent=False)  # follows the module's device and dtype
        self._prompts: list[str] | None = None
        self._index: dict[str, int] = {}
        self._negative = -1

    @classmethod
    def from_folder(cls, folder: Path, config: EmbeddedTextConfig, *, device: torch.device | str) -> EmbeddedText:
        """As a model folder has it: the file's place is relative to the folder."""
        return cls(replace(config, file=str(folder / config.file))).to(device)

    def tokenize(self, prompt: str) -> EncodedPrompt:
        """The prompt's number in the file; UserError when it is not there."""
        if not prompt:
            raise UserError(f"the prompt is empty; {self.config.file} holds {len(self.prompts)} of them")
        return EncodedPrompt((int(self.ids([prompt])),), ())

    @property
    def prompts(self) -> list[str]:
        """The prompts in the file, in order; UserError for a file that does not fit."""
        if self._prompts is None:
            self._prompts = self._open()
        return self._prompts

    def _open(self) -> list[str]:
        path = Path(self.config.file)
        try:
            with safe_open(path, "pt") as file:
                shape = tuple(file.get_slice("embeddings").get_shape())
                metadata = file.metadata() or {}
                prompts = [str(prompt) for prompt in json.loads(metadata["prompts"])]
        except FileNotFoundError:
            raise UserError(f"no embeddings at {path}; name a safetensors file with prompts and embeddings") from None
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise UserError(f"{path} is not a file of prompt embeddings ({type(error).__name__}: {error})") from error
        want = (len(prompts), self.text_len, self.text_dim)
        if shape != want or not prompts:
            raise UserError(f"{path}: embeddings are {list(shape)}, but must be {list(want)} (prompts, rows, width)")
        self._index = {prompt: number for number, prompt in enumerate(prompts)}
        negative = metadata.get("negative")
        if negative is not None and negative not in self._index:
            raise UserError(f"{path}: its negative prompt {negative[:40]!r} is not among its prompts")
        self._negative = -1 if negative is None else self._index[negative]
        return prompts

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """Numbers of prompts, int64 [B, 1]; -1 for the empty string. UserError for a prompt that is not in the file."""
        known = self.prompts
        for prompt in prompts:
            if prompt and prompt not in self._index:
                near = difflib.get_close_matches(prompt, known[:2000], n=1, cutoff=0.0)
                raise UserError(f"{prompt[:60]!r} is not in {self.config.file}; the nearest prompt is {near[0][:60]!r}")
        return torch.tensor([[self._index.get(prompt, -1)] for prompt in prompts], dtype=torch.long)

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Numbers of prompts [..., 1], -1 for none -> rows [..., L, D] on the module's device, in its dtype."""
        assert self.prompts
        numbers = [self._negative if number < 0 else number for number in ids.flatten().tolist()]
        with safe_open(Path(self.config.file), "pt") as file:
            rows = file.get_slice("embeddings")
            found = {number: rows[number : number + 1][0] for number in set(numbers) if number >= 0}
        empty = torch.zeros(self.text_len, self.text_dim)
        stacked = torch.stack([found.get(number, empty).to(self.like) for number in numbers])
        return stacked.unflatten(0, ids.shape[:-1])

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> rows [B, text_len, text_dim]."""
        return self.encode_ids(self.ids(prompts))


def save_embeddings(path: Path, prompts: Sequence[str], embeddings_NLD: Tensor, *, negative: str | None = None) -> None:
    """Write a file that EmbeddedText reads; it appears whole or not at all."""
    if len(prompts) != len(embeddings_NLD) or len(set(prompts)) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, {len(embeddings_NLD)} embeddings; give one each, no prompt twice")
    metadata = {"prompts": json.dumps(list(prompts))} | ({} if negative is None else {"negative": negative})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file({"embeddings": embeddings_NLD.contiguous()}, temporary, metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
