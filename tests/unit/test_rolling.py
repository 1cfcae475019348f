"""The rolling window: against the serial rollout where they agree, against one uncached pass, and its bookkeeping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamgen.cache import CacheSpec, KVCache
from streamgen.flow import add_noise, renoise, timestep_of, to_x0
from streamgen.geometry import VideoGeometry
from streamgen.rolling import RollingWindow, join_texts, roll
from streamgen.rollout import Sampling, StreamState, rollout_block
from streamgen.rope import rope_table
from streamgen.transformer import CausalWanModel, TextContext
from tests.tiny_sprites import GEOMETRY, TRANSFORMER, spread

SIGMAS = (1.0, 0.8, 0.5)


def model(seed: int = 0) -> CausalWanModel:
    torch.manual_seed(seed)
    net = CausalWanModel(TRANSFORMER, attention_backend="math").eval()
    spread(net)
    return net


def new_state(geometry: VideoGeometry = GEOMETRY, window: int = 10, sink: int = 2) -> StreamState:
    spec = CacheSpec(
        num_layers=TRANSFORMER.num_layers,
        num_heads=TRANSFORMER.num_heads,
        head_dim=TRANSFORMER.head_dim,
        grid_height=geometry.grid_height,
        grid_width=geometry.grid_width,
        window_frames=window,
        sink_frames=sink,
        policy="window",
    )
    return StreamState(geometry=geometry, cache=KVCache(spec, batch=2), seeds=(3, 4))


def prompts(net: CausalWanModel, blocks: int) -> list[TextContext]:
    rows = torch.randn(blocks, 2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return [net.encode_text(row) for row in rows]


@torch.no_grad()
def test_one_step_is_the_serial_rollout() -> None:
    net = model()
    texts = prompts(net, 5)
    serial, rolling, window = new_state(), new_state(), RollingWindow()
    plan = Sampling(sigmas=(1.0,))
    for block in range(5):
        want = rollout_block(net, serial, texts[block], plan)
        got = roll(net, rolling, window, texts.__getitem__, plan)
        assert list(got) == [block]
        assert torch.allclose(got[block], want, atol=1e-6)
    assert rolling.position == 5 and rolling.cache.frames == serial.cache.frames


@torch.no_grad()
def test_a_launch_is_one_uncached_pass_over_context_and_window() -> None:
    """Fourth launch of three steps: blocks 1, 2, 3 at steps 2, 1, 0 see block 0 (clean) and each other."""
    net = model()
    texts = prompts(net, 4)
    state, window = new_state(), RollingWindow()
    plan = Sampling(sigmas=SIGMAS)
    finished: dict[int, Tensor] = {}
    for launch in range(3):
        finished[launch] = roll(net, state, window, texts.__getitem__, plan)[max(0, launch - 2)]
    assert state.position == 1
    clean = finished[2]
    x_t = torch.cat([*window.noisy.values(), state.noise(0, 3)], 1)
    got = torch.cat(list(roll(net, state, window, texts.__getitem__, plan).values()), 1)

    size = GEOMETRY.block_frames
    cos, sin = rope_table(range(4 * size), GEOMETRY.grid_height, GEOMETRY.grid_width, TRANSFORMER.head_dim)
    sigma = torch.tensor([0.0, SIGMAS[2], SIGMAS[1], SIGMAS[0]]).repeat_interleave(size).expand(2, -1)
    tokens = size * GEOMETRY.tokens_per_frame
    mask = torch.ones(4 * tokens, 4 * tokens, dtype=torch.bool)
    mask[:tokens, tokens:] = False  # the clean block was committed alone
    both = torch.cat([clean, x_t], 1)
    out = net(both, timestep_of(sigma), join_texts(texts), rope=(cos, sin), mask=mask)
    want = to_x0(out, both, sigma.clamp(min=1e-6), "flow")[:, size:]
    assert torch.allclose(got, want, atol=1e-5)


@torch.no_grad()
def test_blocks_move_one_step_a_launch_and_end_in_order() -> None:
    net = model()
    texts = prompts(net, 6)
    state, window = new_state(), RollingWindow()
    plan = Sampling(sigmas=SIGMAS)
    seen: dict[int, list[int]] = {}
    for launch in range(6 + len(SIGMAS) - 1):
        before = dict(window.noisy)
        out = roll(net, state, window, texts.__getitem__, plan, stop=6)
        for block in out:
            seen.setdefault(block, []).append(launch - block)
        assert state.position == max(0, launch - 1)
        for block, noisy in window.noisy.items():
            step = launch - block
            want = renoise(out[block], state.noise(step + 1, block), SIGMAS[step + 1])
            assert torch.equal(noisy, want) and (step == 0 or block in before)
    assert seen == {block: [0, 1, 2] for block in range(6)}
    with pytest.raises(ValueError, match="nothing is left"):
        roll(net, state, window, texts.__getitem__, plan, stop=6)


def test_gradient_sees_the_launch_and_not_the_way_there() -> None:
    net = model()
    with torch.no_grad():
        texts = prompts(net, 4)
    state, window = new_state(), RollingWindow()
    plan = Sampling(sigmas=SIGMAS)
    for _ in range(3):
        assert not any(x0.requires_grad for x0 in roll(net, state, window, texts.__getitem__, plan).values())
    x_t = torch.cat([*window.noisy.values(), state.noise(0, 3)], 1)
    view = state.cache.begin(GEOMETRY.block_start(1), x_t.shape[1], peek=True)
    sigma = torch.tensor(SIGMAS[::-1]).repeat_interleave(GEOMETRY.block_frames).expand(2, -1)
    want = to_x0(net(x_t, timestep_of(sigma), join_texts(texts[1:]), cache=view), x_t, sigma, "flow")
    goal = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((want * goal).sum(), list(net.blocks.parameters()), allow_unused=True)

    out = torch.cat(list(roll(net, state, window, texts.__getitem__, plan, grad=True).values()), 1)
    assert not any(noisy.requires_grad for noisy in window.noisy.values())
    got = torch.autograd.grad((out * goal).sum(), list(net.blocks.parameters()), allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.allclose(a, b, atol=1e-5)


@torch.no_grad()
def test_peeking_writes_nothing() -> None:
    net = model()
    text = prompts(net, 1)[0]
    state = new_state()
    rollout_block(net, state, text, Sampling(sigmas=(1.0,)))
    before = state.cache.state_dict()
    view = state.cache.begin(GEOMETRY.block_start(1), 3 * GEOMETRY.block_frames, peek=True)
    x_t = add_noise(torch.zeros(2, 3 * GEOMETRY.block_frames, 4, 4, 4), torch.randn(2, 6, 4, 4, 4), 0.5)
    net(x_t, torch.full((2, 1), 500.0), text, cache=view)
    after = state.cache.state_dict()
    assert torch.equal(before["k"], after["k"]) and torch.equal(before["v"], after["v"])
    with pytest.raises(RuntimeError, match="layers were written"):
        state.cache.commit(view)
