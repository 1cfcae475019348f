"""The text encoder against transformers' `UMT5EncoderModel`, from both layouts, with Wan's zeroed padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from streamgen import umt5
from streamgen.checkpoints.loading import open_text
from streamgen.errors import UserError
from streamgen.umt5 import UMT5TextEncoder, clean
from tests.tiny_wan import TEXT_DIM, TEXT_LEN, original_umt5, save_tokenizer, state
from tests.tiny_wan import umt5 as tiny_umt5

pytest.importorskip("transformers")
PROMPTS = ("a red star spinning over snow", "the blue ring", "a red star " * 6)


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny_umt5()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def as_original(model: Any, folder: Path) -> Path:
    torch.save(original_umt5(model), folder / "encoder.pth")
    return folder / "encoder.pth"


def as_transformers(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder / "hf")
    return folder / "hf" / "model.safetensors"


def as_shards(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder / "hf", max_shard_size="10KB")
    return folder / "hf" / "model.safetensors.index.json"


def as_full_model(model: Any, folder: Path) -> Path:
    """An encoder-decoder file: both names of the embedding, and a decoder that is not wanted."""
    tensors = state(model)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    tensors["decoder.block.0.layer.0.layer_norm.weight"] = torch.ones(TEXT_DIM)
    save_file(tensors, folder / "all.safetensors")
    return folder / "all.safetensors"


def encoder(path: Path, tokenizer: Path, cache: Path, **changes: Any) -> UMT5TextEncoder:
    from dataclasses import replace

    config = replace(open_text(path, tokenizer, text_len=TEXT_LEN), **changes)
    return UMT5TextEncoder(config, path.parent, cache=cache)


def expected(model: Any, ids: Tensor) -> Tensor:
    """transformers on the padded batch with its mask; rows beyond the prompt set to zero, as Wan does."""
    mask = ids > 0
    return model(input_ids=ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]


@pytest.mark.parametrize("save", [as_original, as_transformers, as_shards, as_full_model])
def test_it_equals_transformers(save: Any, reference: Any, tokenizer: Path, tmp_path: Path) -> None:
    ours = encoder(save(reference, tmp_path), tokenizer, tmp_path / "cache")
    ids = ours.ids(PROMPTS)
    rows = ours.encode(PROMPTS)
    assert rows.shape == (3, TEXT_LEN, TEXT_DIM) and rows.abs().max() > 0.3
    assert (rows - expected(reference, ids)).abs().max() < 1e-5
    assert [int((row != 0).any(1).sum()) for row in rows] == [7, 4, TEXT_LEN]
    assert not rows[1, 4:].any()
    assert torch.equal(ours.encode_ids(ids[:, None])[:, 0], rows)


def test_every_layer_has_its_own_positions(reference: Any, tokenizer: Path, tmp_path: Path) -> None:
    """A T5 shares one table; loaded as such the rows would be others."""
    tensors = original_umt5(reference)
    first = tensors["blocks.0.pos_embedding.embedding.weight"]
    shared = {**tensors, "blocks.1.pos_embedding.embedding.weight": first.clone()}
    torch.save(shared, tmp_path / "shared.pth")
    theirs = encoder(tmp_path / "shared.pth", tokenizer, tmp_path / "cache").encode(PROMPTS)
    ours = encoder(as_original(reference, tmp_path), tokenizer, tmp_path / "cache").encode(PROMPTS)
    assert (ours - theirs).abs().max() > 1e-2
    del shared["blocks.1.pos_embedding.embedding.weight"]
    torch.save(shared, tmp_path / "t5.pth")
    with pytest.raises(UserError, match="1 of 2 layers have a table of positions; UMT5 has one in each, this is a T5"):
        open_text(tmp_path / "t5.pth", tokenizer, text_len=TEXT_LEN)


def test_known_prompts_need_no_weights(
    reference: Any, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_original(reference, tmp_path)
    rows = encoder(path, tokenizer, tmp_path / "cache").encode(PROMPTS)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(umt5, "load_encoder", refuse)
    monkeypatch.setattr(umt5, "open_tokenizer", refuse)
    again = encoder(path, tokenizer, tmp_path / "cache")
    assert torch.equal(again.encode([PROMPTS[1], PROMPTS[0]]), rows[[1, 0]])
    assert again.tokenize("  the blue&nbsp;ring ").ids == (9, 10, 11, 1)
    with pytest.raises(AssertionError, match="the weights were read"):
        again.encode(["snow"])
    torch.save({**original_umt5(reference), "norm.weight": torch.full((TEXT_DIM,), 2.0)}, path)
    with pytest.raises(AssertionError, match="the weights were read"):  # other weights: what is on disk is not theirs
        encoder(path, tokenizer, tmp_path / "cache").encode(PROMPTS)


@pytest.mark.parametrize("offload", ["keep", "cpu", "drop"])
def test_weights_go_where_they_are_told(
    offload: str, reference: Any, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = umt5.load_encoder
    monkeypatch.setattr(umt5, "load_encoder", lambda *given: loads.append(given) or load(*given))
    ours = encoder(as_original(reference, tmp_path), tokenizer, tmp_path / "cache", offload=offload)
    assert not loads  # nothing before a prompt
    for prompt in PROMPTS:
        ours.encode([prompt])
    assert len(loads) == (3 if offload == "drop" else 1)
    assert list(ours.parameters()) == [] and ours.state_dict() == {}


def test_bfloat16_weights_give_bfloat16_rows(reference: Any, tokenizer: Path, tmp_path: Path) -> None:
    torch.save({name: tensor.bfloat16() for name, tensor in original_umt5(reference).items()}, tmp_path / "bf16.pth")
    ours = encoder(tmp_path / "bf16.pth", tokenizer, tmp_path / "cache")
    rows = ours.encode(PROMPTS)
    wanted = expected(reference, ours.ids(PROMPTS))
    assert rows.dtype == torch.bfloat16
    assert (rows.float() - wanted).norm() / wanted.norm() < 3e-2


def test_prompts_are_cleaned_as_wan_cleans_them() -> None:
    assert clean("  a\n red\t star ") == "a red star"
    assert clean("salt &amp;amp; pepper") == "salt & pepper"
    assert clean("cafÃ©") == "café"


def test_prompts_that_are_empty_or_too_long(reference: Any, tokenizer: Path, tmp_path: Path) -> None:
    ours = encoder(as_original(reference, tmp_path), tokenizer, tmp_path / "cache")
    with pytest.raises(UserError, match="the prompt is empty"):
        ours.tokenize(" &nbsp; ")
    assert ours.tokenize(PROMPTS[0]).warnings == ()
    assert ours.tokenize(PROMPTS[2]).warnings == (f"a prompt has room for {TEXT_LEN} tokens; the rest is left out",)


def test_what_is_missing_is_named(reference: Any, tokenizer: Path, tmp_path: Path) -> None:
    path = as_original(reference, tmp_path)
    with pytest.raises(UserError, match=r"the text encoder needs its tokenizer: there is no .*absent"):
        encoder(path, tmp_path / "absent", tmp_path / "cache")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(UserError, match="holds no tokenizer that transformers reads"):
        encoder(path, tmp_path / "bad", tmp_path / "cache").encode(["a"])
    tensors = original_umt5(reference)
    del tensors["blocks.1.ffn.fc2.weight"]
    torch.save(tensors, path)
    with pytest.raises(
        UserError, match=r"1 of \d+ tensors are missing: encoder\.block\.\*\.layer\.1\.DenseReluDense\.wo"
    ):
        encoder(path, tokenizer, tmp_path / "cache").encode(["a"])
