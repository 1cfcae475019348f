"""The sprites text encoder: any wording of what it knows, and a clear word about what it does not."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from streamgen.errors import UserError
from streamgen.text import SPRITES_VOCABULARY, SYNONYMS, SpritesTextConfig, SpritesTextEncoder
from streamgen.weights import build_config, load_component, load_weights, save_component
from streamgen.worlds import sprites

STAR = "a large red star spinning over a snow background"


@pytest.fixture
def encoder() -> SpritesTextEncoder:
    return SpritesTextEncoder(SpritesTextConfig(text_dim=6))


def words(encoder: SpritesTextEncoder, prompt: str) -> set[str]:
    return {encoder.config.vocabulary[i] for i in encoder.tokenize(prompt).ids}


@pytest.mark.parametrize(
    "prompt",
    [
        "A LARGE Red sTaR SPINNING over a Snow background",
        "a large, red star: spinning -- over a snow background!!!",
        "a_large_red_star_spinning_over_a_snow_background",
        "\tspinning over a\n snow background, a star; large and red",
        "snow snow: one big red star, and it is rotating",
        "single huge red stars turning on a snowy backdrop",
    ],
)
def test_case_punctuation_order_and_synonyms_do_not_matter(encoder: SpritesTextEncoder, prompt: str) -> None:
    found = encoder.tokenize(prompt)
    assert sorted(found.ids) == sorted(encoder.tokenize(STAR).ids) and not found.warnings
    assert len(set(found.ids)) == len(found.ids)


def test_every_caption_of_the_world_has_its_own_words(encoder: SpritesTextEncoder) -> None:
    """Without a warning, and no two of them the same."""
    read = [encoder.tokenize(caption.text) for caption in sprites.captions("all")]
    assert not any(found.warnings for found in read)
    assert len({frozenset(found.ids) for found in read}) == len(read)
    assert {len(found.ids) for found in read} == {6}


def test_synonyms_lead_to_words_that_there_are() -> None:
    assert set(SYNONYMS.values()) <= set(SPRITES_VOCABULARY)
    assert not set(SYNONYMS) & set(SPRITES_VOCABULARY)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("red star", "one"),
        ("the red star", "one"),
        ("red stars", "two"),
        ("red discs", "two"),
        ("boxes of red", "two"),
        ("one of the red stars", "one"),
        ("2 red circle", "two"),
        ("a pair of red rings", "two"),
        ("red that rises", None),
    ],
)
def test_counts_come_from_number_words_or_from_the_plural(
    encoder: SpritesTextEncoder, prompt: str, count: str | None
) -> None:
    assert words(encoder, prompt) & {"one", "two"} == ({count} - {None})


def test_plurals_of_synonyms(encoder: SpritesTextEncoder) -> None:
    assert words(encoder, "two boxes, donuts and balls") == {"two", "square", "ring", "circle"}
    assert words(encoder, "it rises, falls, spins") == {"rising", "falling", "spinning"}


def test_unknown_words_are_named_with_the_nearest_known_one(encoder: SpritesTextEncoder) -> None:
    found = encoder.tokenize("a gren sta rr dragon star in the green")
    assert [w.split(" was left out")[0] for w in found.warnings] == [
        "unknown word 'gren'",
        "unknown word 'sta'",
        "unknown word 'rr'",
        "unknown word 'dragon'",
    ]
    assert "nearest known word is 'green'" in found.warnings[0] and "'star'" in found.warnings[1]
    assert words(encoder, "a gren dragon star in green") == {"one", "star", "green"}
    assert len(encoder.tokenize("zebra zebra red zebra").warnings) == 1


def test_only_the_first_unknown_words_are_listed(encoder: SpritesTextEncoder) -> None:
    warnings = encoder.tokenize("red " + " ".join(f"x{i}" for i in range(9))).warnings
    assert len(warnings) == 6 and warnings[-1] == "4 more unknown words were left out"


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", "!?...,", "___"])
def test_empty_prompts_are_refused(encoder: SpritesTextEncoder, prompt: str) -> None:
    with pytest.raises(UserError, match=r"the prompt is empty; describe a scene, e\.g\."):
        encoder.tokenize(prompt)


@pytest.mark.parametrize("prompt", ["a zebra", "the background", "\u7ea2\u8272\u7684\u661f", "r e d"])
def test_prompts_without_a_known_word_are_refused(encoder: SpritesTextEncoder, prompt: str) -> None:
    with pytest.raises(UserError, match=r"no word that this model knows \('.*'\); it knows: one, two, large"):
        encoder.tokenize(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        (STAR + " ") * 220,
        "z" * 9_990 + " red star",
        "red star " + " ".join(f"w{i}" for i in range(1_900)),
        "red star " + "\u00e9" * 9_990,
    ],
)
def test_long_prompts_are_read_at_once_and_answered_briefly(encoder: SpritesTextEncoder, prompt: str) -> None:
    assert len(prompt) >= 9_999
    start = time.perf_counter()
    found = encoder.tokenize(prompt)
    assert time.perf_counter() - start < 1.0
    assert {"red", "star"} <= words(encoder, prompt) and len(found.warnings) <= 6
    assert all(len(line) < 200 for line in found.warnings)
    with pytest.raises(UserError) as refused:
        encoder.tokenize("z" * 10_000)
    assert len(str(refused.value)) < 400


def test_a_prompt_has_room_for_so_many_words(encoder: SpritesTextEncoder) -> None:
    everything = " ".join(SPRITES_VOCABULARY)
    found = encoder.tokenize(everything)
    assert found.ids == tuple(range(8))
    assert found.warnings == (
        "a prompt has room for 8 words here; left out: 'purple', 'white', 'circle', 'square', 'triangle', ...",
    )
    assert not encoder.tokenize(" ".join(SPRITES_VOCABULARY[:8])).warnings


def test_rows_are_the_words_then_zeros(encoder: SpritesTextEncoder) -> None:
    with torch.no_grad():
        rows = encoder.encode([STAR, "", "red"])
    assert rows.shape == (3, 8, 6) and rows.dtype == torch.float32
    ids = encoder.tokenize(STAR).ids
    assert torch.equal(rows[0, : len(ids)], encoder.words.weight[list(ids)])
    assert torch.equal(rows[2, 0], encoder.words.weight[SPRITES_VOCABULARY.index("red")])
    assert not rows[0, len(ids) :].any() and not rows[1].any() and not rows[2, 1:].any()


def test_padding_takes_no_gradient(encoder: SpritesTextEncoder) -> None:
    encoder.encode(["red", ""]).sum().backward()
    grad = encoder.words.weight.grad
    assert grad is not None
    assert grad.any(1).nonzero().flatten().tolist() == [SPRITES_VOCABULARY.index("red")]


def test_config_and_weights_round_trip(encoder: SpritesTextEncoder, tmp_path: Path) -> None:
    save_component(tmp_path, {"_class_name": "SpritesTextEncoder", **encoder.config_dict()}, encoder.state_dict())
    values, tensors = load_component(tmp_path)
    config = build_config(SpritesTextConfig, values, "text")
    assert config == encoder.config and isinstance(config.vocabulary, tuple)
    loaded = SpritesTextEncoder(config)
    load_weights(loaded, tensors, where="text")
    assert torch.equal(loaded.encode([STAR]), encoder.encode([STAR]))


def test_a_vocabulary_without_numbers_adds_none() -> None:
    encoder = SpritesTextEncoder(SpritesTextConfig(text_len=2, text_dim=4, vocabulary=("star", "red")))
    assert encoder.tokenize("two red stars").ids == (1, 0)
    assert asdict(encoder.config)["vocabulary"] == ("star", "red")


@pytest.mark.parametrize("wrong", [{"text_len": 0}, {"text_dim": 0}, {"vocabulary": ()}])
def test_empty_configs_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        SpritesTextConfig(**wrong)
