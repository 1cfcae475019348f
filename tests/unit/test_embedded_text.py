"""Prompts from a file of embeddings: what went in comes out, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamgen.embedded_text import EmbeddedText, EmbeddedTextConfig, save_embeddings
from streamgen.errors import UserError

PROMPTS = ["a cat", "a dog in the rain", "blurred, ugly"]


def rows() -> torch.Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def text(path: Path, **sizes: int) -> EmbeddedText:
    return EmbeddedText(EmbeddedTextConfig(file=str(path), **({"text_len": 4, "text_dim": 6} | sizes)))


def test_prompts_give_their_rows(tmp_path: Path) -> None:
    save_embeddings(tmp_path / "e.safetensors", PROMPTS, rows())
    encoder = text(tmp_path / "e.safetensors")
    assert encoder.prompts == PROMPTS
    assert torch.equal(
        encoder.encode(["a dog in the rain", "", "a cat"]), torch.stack([rows()[1], rows()[2] * 0, rows()[0]])
    )
    ids = torch.tensor([[[0], [1]], [[-1], [2]]])
    out = encoder.to(torch.bfloat16).encode_ids(ids)
    assert out.shape == (2, 2, 4, 6) and out.dtype == torch.bfloat16
    assert torch.equal(out[1, 1], rows()[2].bfloat16()) and not out[1, 0].any()
    assert encoder.state_dict() == {}


def test_a_negative_prompt_stands_for_none(tmp_path: Path) -> None:
    save_embeddings(tmp_path / "e.safetensors", PROMPTS, rows(), negative="blurred, ugly")
    assert torch.equal(text(tmp_path / "e.safetensors").encode([""])[0], rows()[2])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    with pytest.raises(UserError, match="no embeddings at"):
        text(path).encode(["a cat"])
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a file of prompt embeddings"):
        text(path).encode(["a cat"])
    save_embeddings(path, PROMPTS, rows())
    with pytest.raises(UserError, match=r"'a cow' is not in .* nearest prompt is 'a cat'"):
        text(path).encode(["a cow"])
    with pytest.raises(UserError, match=r"are \[3, 4, 6\], but must be \[3, 4, 8\]"):
        text(path, text_dim=8).encode(["a cat"])
    save_embeddings(path, PROMPTS, rows(), negative="other")
    with pytest.raises(UserError, match="negative prompt 'other'"):
        text(path).encode(["a cat"])
    with pytest.raises(ValueError, match="no prompt twice"):
        save_embeddings(path, ["a", "a", "b"], rows())
