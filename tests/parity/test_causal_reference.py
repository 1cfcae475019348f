"""Streaming equals a plain slow reference written from the published description, and would notice every known mistake.

The tolerance is 2e-5 on latents of order 6 in fp32: several times the rounding of two correct implementations. There
are at least five blocks past the first roll; errors in window, sink and positions do not show before it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from streamgen.cache import CacheSpec, KVCache
from streamgen.geometry import VideoGeometry
from streamgen.rollout import Sampling, StreamState, rollout_block
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from tests.slow_reference import Rules, SlowReference, random_weights

ATOL = 2e-5
RULES = Rules()
BLOCKS = 10  # window 12, blocks of 3: the fifth is the first that rolls


def inputs(rules: Rules, blocks: int = BLOCKS, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Noise [blocks, steps, B, F, C, H, W] and text [1, L, D], its last two rows padding."""
    made = torch.Generator().manual_seed(1)
    shape = (blocks, rules.steps, batch, rules.frames, rules.channels, rules.height, rules.width)
    text = torch.randn(1, rules.text_len, rules.text_dim, generator=made)
    text[:, -2:] = 0
    return torch.randn(shape, generator=made), text


def build(rules: Rules, policy: str, noise: Tensor) -> tuple[CausalWanModel, StreamState, Sampling]:
    config = TransformerConfig(
        dim=rules.dim,
        ffn_dim=rules.ffn,
        num_heads=rules.heads,
        num_layers=rules.layers,
        in_channels=rules.channels,
        out_channels=rules.channels,
        text_dim=rules.text_dim,
        text_len=rules.text_len,
        freq_dim=rules.freq_dim,
    )
    model = CausalWanModel(config).requires_grad_(False)
    model.load_state_dict(random_weights(rules))
    geometry = VideoGeometry(
        height=8 * rules.height, width=8 * rules.width, latent_channels=rules.channels, block_frames=rules.frames
    )
    spec = CacheSpec(
        num_layers=rules.layers,
        num_heads=rules.heads,
        head_dim=config.head_dim,
        grid_height=geometry.grid_height,
        grid_width=geometry.grid_width,
        window_frames=rules.window,
        sink_frames=rules.sink,
        policy=policy,
    )
    batch = noise.shape[2]
    state = StreamState(geometry=geometry, cache=KVCache(spec, batch=batch), seeds=(0,) * batch)
    state.noise_source = lambda block, step: noise[block, step]
    return model, state, Sampling(sigmas=tuple(rules.sigmas()))


def ours(rules: Rules, policy: str, noise: Tensor, text: Tensor) -> list[Tensor]:
    model, state, sampling = build(rules, policy, noise)
    context = model.encode_text(text.expand(noise.shape[2], -1, -1)[:, None])
    return [rollout_block(model, state, context, sampling) for _ in noise]


def reference(rules: Rules, noise: Tensor, text: Tensor) -> list[Tensor]:
    """In float64, so that the rounding is ours alone."""
    slow = SlowReference(exact_weights(rules), rules, batch=noise.shape[2])
    return [slow.block(one, text.double())[0] for one in noise.double()]


def exact_weights(rules: Rules) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in random_weights(rules).items()}


def differences(one: list[Tensor], other: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max()) for a, b in zip(one, other, strict=True)]


CASES: dict[str, dict[str, Any]] = {
    "sink 3": {},
    "sink 0": {"sink": 0},
    "sink 1, evicting across the block": {"sink": 1},
    "sink longer than a block": {"sink": 5, "window": 11},
    "one frame per block": {"frames": 1, "window": 4, "sink": 1},
    "window of two blocks": {"window": 6, "sink": 0},
    "two steps, shift 8": {"steps": 2, "shift": 8.0},
}


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("name", CASES)
def test_streaming_equals_the_slow_reference(name: str, relative: bool) -> None:
    rules = replace(RULES, relative=relative, **CASES[name])
    blocks = math.ceil(rules.window / rules.frames) + 5
    noise, text = inputs(rules, max(blocks, BLOCKS), batch=2)
    found = ours(rules, "relative" if relative else "window", noise, text)
    expected = reference(rules, noise, text)
    assert max(float(one.abs().max()) for one in expected) > 3
    assert max(differences(found, expected)) < ATOL


# mistake -> (how the reference is broken, first block that shows it)
MISTAKES: dict[str, tuple[dict[str, Any], int]] = {
    "exact GELU": ({"gelu": "none"}, 0),
    "cache in bf16": ({"cache_dtype": torch.bfloat16}, 0),
    "norms with eps 1e-5": ({"eps": 1e-5}, 0),
    "rotary angles in bf16": ({"angle_dtype": torch.bfloat16}, 0),
    "modulation in bf16": ({"modulation_dtype": torch.bfloat16}, 0),
    "positions of the cache's slots": ({"relative": True}, 4),
    "sink 0": ({"sink": 0}, 4),
    "window 15": ({"window": 15}, 4),
    "window 9": ({"window": 9}, 3),
    "queries one frame late": ({"query_offset": 1}, 0),
    "rotary halves, not pairs": ({"rope": "halves"}, 0),
    "no rotary embedding": ({"rope": "off"}, 0),
    "q and k normed per head": ({"qk_norm": "head"}, 0),
    "commit at timestep 1": ({"commit_timestep": 1.0}, 1),
    "commit at timestep 10": ({"commit_timestep": 10.0}, 1),
    "commit at timestep 625": ({"commit_timestep": 625.0}, 1),
    "no commit": ({"commit_timestep": None}, 1),
    "whole timesteps": ({"clock": math.floor}, 0),
    "timesteps in bf16": ({"clock": lambda t: float(torch.tensor(t).bfloat16())}, 0),
    "padding of the text masked": ({"text_rows": RULES.text_len - 2}, 0),
    "shift 8": ({"shift": 8.0}, 0),
    "noise of the current level": ({"renoise": "current"}, 0),
    "the first noise again": ({"renoise": "initial"}, 0),
    "Euler steps": ({"renoise": "euler"}, 0),
    "head with channels slowest": ({"channel_fastest": False}, 0),
}


@pytest.fixture(scope="module")
def streamed() -> tuple[Tensor, Tensor, list[Tensor]]:
    noise, text = inputs(RULES)
    return noise, text, ours(RULES, "window", noise, text)


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_costs_more_than_the_tolerance(name: str, streamed: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    noise, text, found = streamed
    changes, first = MISTAKES[name]
    off = differences(found, reference(replace(RULES, **changes), noise, text))
    assert max(off[:first], default=0.0) < ATOL
    assert off[first] > 2 * ATOL and max(off) > 4 * ATOL


def test_other_words_cost_more_than_the_tolerance(streamed: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    noise, text, found = streamed
    assert differences(found, reference(RULES, noise, text.roll(1, dims=1)))[0] < ATOL  # a set of rows: no order
    assert differences(found, reference(RULES, noise, 0.9 * text))[0] > 5 * ATOL


def test_every_position_one_frame_later_changes_nothing(streamed: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    noise, text, found = streamed
    assert max(differences(found, reference(replace(RULES, position_offset=1), noise, text))) < ATOL


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize(("sink", "switch"), [(3, 2), (3, 7), (0, 7)])
def test_recache_equals_the_slow_reference(sink: int, switch: int, relative: bool) -> None:
    """A new prompt before and after the first roll; LongLive's pass sees all of the window and keeps the sink."""
    rules = replace(RULES, sink=sink, relative=relative)
    noise, text = inputs(rules)
    other = torch.cat([torch.randn(1, 4, rules.text_dim), torch.zeros(1, 2, rules.text_dim)], 1)
    model, state, sampling = build(rules, "relative" if relative else "window", noise)
    contexts = [model.encode_text(rows[:, None]) for rows in (text, other)]
    slow = SlowReference(exact_weights(rules), rules)
    kept = SlowReference(exact_weights(rules), rules)  # the same without the pass: the old prompt goes on in the cache
    off, inertia = [], []
    for block, one in enumerate(noise):
        if block == switch:
            slow.recache(other.double())
        changed = block >= switch
        transition = "recache" if block == switch else None
        found = rollout_block(model, state, contexts[changed], sampling, transition=transition)
        inputs_64 = one.double(), (other if changed else text).double()
        off.append(float((found - slow.block(*inputs_64)[0]).abs().max()))
        inertia.append(float((found - kept.block(*inputs_64)[0]).abs().max()))
    assert max(off) < ATOL
    assert max(inertia[:switch]) < ATOL < 50 * ATOL < inertia[switch]
