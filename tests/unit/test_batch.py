"""Many streams made together are the streams made one at a time: the rollout trained is the rollout served."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamgen.batch import generate
from streamgen.codec import SpritesCodec
from streamgen.pipeline import SchedulerConfig, StreamPipeline
from streamgen.text import SpritesTextConfig, SpritesTextEncoder
from streamgen.transformer import CausalWanModel
from tests.tiny_sprites import CODEC, GEOMETRY, ar_values, spread

PROMPTS = [
    "a red star spinning over a snow background",
    "two small blue circles moving left over a navy background",
    "a large yellow ring rising over a grass background",
]
RING = "a large white ring falling over a black background"
SEEDS = (7, 2**63 + 1, 0)
BLOCKS = 6  # more than the window holds


def build(**scheduler: Any) -> StreamPipeline:
    torch.manual_seed(0)
    values: dict[str, Any] = {"trained_steps": (2,), "window_frames": 6, "sink_frames": 2, **scheduler}
    transformer, codec = CausalWanModel(ar_values(Path())["model"]), SpritesCodec(CODEC)
    spread(transformer, codec)
    return StreamPipeline(
        transformer=transformer,
        codec=codec,
        text=SpritesTextEncoder(SpritesTextConfig(text_dim=8)),
        geometry=GEOMETRY,
        scheduler=SchedulerConfig(**values),
    )


def streamed(
    pipe: StreamPipeline, prompt: str, seed: int, switch: tuple[int, str, str] | None = None, **options: Any
) -> np.ndarray:
    """All frames of one stream, [T, H, W, 3]; switch: (block, prompt, transition)."""
    stream = pipe.stream(prompt, seed=seed, max_blocks=BLOCKS, **options)
    if switch is not None:
        block, text, transition = switch
        stream.prompt(text, transition, at_block=block)
    return np.concatenate([block.frames for block in stream])


@pytest.fixture(scope="module")
def pipe() -> StreamPipeline:
    return build()


@pytest.mark.parametrize("cache", ["relative", "window"])
def test_one_row_equals_the_stream_to_the_bit(pipe: StreamPipeline, cache: str) -> None:
    made = generate(pipe, PROMPTS[:1], SEEDS[:1], BLOCKS, cache=cache)
    assert made.dtype == torch.uint8 and made.shape == (1, 8 * BLOCKS, 32, 32, 3)
    assert np.array_equal(made[0].numpy(), streamed(pipe, PROMPTS[0], SEEDS[0], cache=cache))


@pytest.mark.parametrize("stored_as", ["int8", "fp8"])
def test_keys_and_values_in_one_byte(pipe: StreamPipeline, stored_as: str) -> None:
    made = generate(pipe, PROMPTS[:1], SEEDS[:1], BLOCKS, cache_dtype=stored_as)
    assert np.array_equal(made[0].numpy(), streamed(pipe, PROMPTS[0], SEEDS[0], cache_dtype=stored_as))
    assert not np.array_equal(made[0].numpy(), streamed(pipe, PROMPTS[0], SEEDS[0]))


@pytest.mark.parametrize(
    "scheduler",
    [
        {"sampler": "euler"},
        {"context_noise": 0.1},
        {"shift": 2.0, "protect_sink": False},
        {"commits": False, "context_noise": 5 / 6},
    ],
)
def test_one_row_equals_the_stream_however_the_card_samples(scheduler: dict[str, Any]) -> None:
    pipe = build(**scheduler)
    made = generate(pipe, PROMPTS[:1], SEEDS[:1], BLOCKS, switches={4: [RING]})
    assert np.array_equal(made[0].numpy(), streamed(pipe, PROMPTS[0], SEEDS[0], (4, RING, "recache")))


@pytest.mark.parametrize("transition", ["cut", "recache", "scene"])
def test_one_row_equals_the_stream_through_a_switch(pipe: StreamPipeline, transition: str) -> None:
    made = generate(pipe, PROMPTS[:1], SEEDS[:1], BLOCKS, switches={3: [RING]}, transition=transition)
    assert np.array_equal(made[0].numpy(), streamed(pipe, PROMPTS[0], SEEDS[0], (3, RING, transition)))


def test_rows_are_the_streams_of_their_prompts_and_seeds(pipe: StreamPipeline) -> None:
    """Close and not equal: products of three rows may be summed in another order than those of one."""
    made = generate(pipe, PROMPTS, SEEDS, BLOCKS, switches={4: [RING] * 3}).numpy()
    alone = [streamed(pipe, prompt, seed, (4, RING, "recache")) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    for row, expected in zip(made, alone, strict=True):
        assert np.abs(row.astype(int) - expected).max() <= 1
    assert not np.array_equal(alone[0], alone[1])


def test_steps_and_first_steps(pipe: StreamPipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not what the card says
        expected = streamed(pipe, PROMPTS[1], 3, steps=1, first_steps=3)
    made = generate(pipe, PROMPTS[1:2], [3], BLOCKS, steps=1, first_steps=3)
    assert np.array_equal(made[0].numpy(), expected)


def test_blocks_can_be_taken_as_they_come(pipe: StreamPipeline) -> None:
    blocks: list[tuple[int, torch.Tensor]] = []
    rest = generate(pipe, PROMPTS, SEEDS, 3, on_block=lambda index, frames: blocks.append((index, frames)))
    assert [index for index, _ in blocks] == [0, 1, 2] and rest.numel() == 0
    assert torch.equal(torch.cat([frames for _, frames in blocks], 1), generate(pipe, PROMPTS, SEEDS, 3))


@pytest.mark.parametrize(("prompts", "seeds"), [([], []), (PROMPTS, [1]), (PROMPTS[:1], [1, 2])])
def test_one_seed_for_each_prompt(pipe: StreamPipeline, prompts: list[str], seeds: list[int]) -> None:
    with pytest.raises(ValueError, match="one seed for each of at least one prompt"):
        generate(pipe, prompts, seeds, 1)
