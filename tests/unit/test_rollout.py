"""One block after the other: against programs written out by hand, and with failures at every point."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from streamgen.cache import POLICIES, CacheSpec, KVCache
from streamgen.flow import add_noise, step_sigmas
from streamgen.geometry import VideoGeometry
from streamgen.noise import cell_noise
from streamgen.rollout import BlockRun, Cancelled, Sampling, StreamState, enter_block, rollout_block
from streamgen.rope import apply_rope, rope_table
from streamgen.transformer import CausalWanModel, TextContext
from streamgen.transformer_config import TransformerConfig

GEOMETRY = VideoGeometry(height=16, width=32, latent_channels=3, block_frames=2)
GRID, HEADS, WIDTH, LAYERS = (1, 2), 2, 12, 2
TEXT_LEN, TEXT_DIM = 4, 6
SAMPLING = Sampling(sigmas=step_sigmas(3, 5.0))
WINDOW, SINK = 7, 1


@pytest.fixture
def model() -> CausalWanModel:
    config = TransformerConfig(
        dim=HEADS * WIDTH,
        ffn_dim=32,
        num_heads=HEADS,
        num_layers=LAYERS,
        in_channels=3,
        out_channels=3,
        text_dim=TEXT_DIM,
        text_len=TEXT_LEN,
        freq_dim=16,
    )
    model = CausalWanModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def text_of(model: CausalWanModel, prompt: int, batch: int = 1) -> TextContext:
    rows = torch.randn(1, 1, TEXT_LEN, TEXT_DIM, generator=torch.Generator().manual_seed(prompt))
    with torch.no_grad():
        return model.encode_text(rows.expand(batch, -1, -1, -1))


def new_state(
    policy: str = "relative", seeds: tuple[int, ...] = (5,), geometry: VideoGeometry = GEOMETRY
) -> StreamState:
    spec = CacheSpec(
        num_layers=LAYERS,
        num_heads=HEADS,
        head_dim=WIDTH,
        grid_height=geometry.grid_height,
        grid_width=geometry.grid_width,
        window_frames=WINDOW,
        sink_frames=SINK,
        policy=policy,
    )
    return StreamState(geometry=geometry, cache=KVCache(spec, batch=len(seeds)), seeds=seeds)


def roll(model: CausalWanModel, state: StreamState, blocks: int, prompt: int = 0, **options: object) -> list[Tensor]:
    text = text_of(model, prompt, len(state.seeds))
    return [rollout_block(model, state, text, SAMPLING, **options) for _ in range(blocks)]  # type: ignore[arg-type]


class ListedCache:
    """A cache written out: all clean keys of the past as plain lists, re-indexed, joined; for one block."""

    def __init__(self, past: list[list[tuple[Tensor, Tensor]]], frames: int) -> None:
        self.past, self.frames, self.seen = past, frames, []
        self.held = len(past[0]) if past else 0
        self.table = rope_table(range(self.held + frames), *GRID, WIDTH)

    def rope(self) -> tuple[Tensor, Tensor]:
        start = self.held * GRID[0] * GRID[1]
        return self.table[0][start:], self.table[1][start:]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append((k, v))
        context = self.past[layer] if self.past else []
        keys = torch.cat([*(k for k, _ in context), k], 2)
        return apply_rope(keys, *self.table), torch.cat([*(v for _, v in context), v], 2)


def written_out(
    model: CausalWanModel, seed: int, blocks: int, exits: list[int], text: TextContext, grad: bool
) -> list[Tensor]:
    """The few-step rollout without the ring, the state or the rollout (no eviction: blocks fit the window)."""
    past: list[list[tuple[Tensor, Tensor]]] = []
    outputs = []
    tokens = GRID[0] * GRID[1]
    for block in range(blocks):
        shape = (1, 2, 3, 2, 4)
        x = cell_noise(seed, block, 0, shape)
        for step in range(exits[block] + 1):
            sigma = SAMPLING.sigmas[step]
            with torch.set_grad_enabled(grad and step == exits[block]):
                flow = model(x, torch.full((1, 1), 1000 * sigma), text, cache=ListedCache(past, 2))
                x0 = x - sigma * flow
            if step < exits[block]:
                sigma = SAMPLING.sigmas[step + 1]
                x = (1 - sigma) * x0 + sigma * cell_noise(seed, block, step + 1, shape)
        outputs.append(x0)
        with torch.no_grad():
            listed = ListedCache(past, 2)
            model(x0.detach(), torch.zeros(1, 1), text, cache=listed)
        rows = [list(zip(k.split(tokens, 2), v.split(tokens, 2), strict=True)) for k, v in listed.seen]
        past = [old + new for old, new in zip(past or [[]] * LAYERS, rows, strict=True)]
    return outputs


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_rollout_equals_the_program_written_out(model: CausalWanModel, policy: str) -> None:
    listed = written_out(model, 5, 3, [2, 2, 2], text_of(model, 0), grad=False)
    for one, other in zip(roll(model, new_state(policy), 3), listed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert not one.requires_grad


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("exits", [[2, 2], [0, 1], [1, 0]])
def test_gradient_equals_autograd_of_the_two_blocks_written_out(
    model: CausalWanModel, policy: str, exits: list[int]
) -> None:
    """The exit step alone has a gradient; its context is constant, also after later blocks overwrote the buffers."""
    text = text_of(model, 0)
    weights = torch.randn(2, 1, 2, 3, 2, 4)

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        model.zero_grad()
        sum((w * x0).sum() for w, x0 in zip(weights, outputs, strict=True)).backward()
        return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]

    expected = gradients(written_out(model, 5, 2, exits, text, grad=True))
    state = new_state(policy)
    outputs = [rollout_block(model, state, text, SAMPLING, exit_step=step, grad=True) for step in exits]
    roll(model, state, 5)
    for one, other in zip(gradients(outputs), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert max(g.abs().max() for g in expected) > 1e-2


def test_the_rollout_trained_is_the_rollout_served(model: CausalWanModel) -> None:
    """With and without gradients, past the window: same latents, same cache."""
    served, trained = new_state(), new_state()
    for one, other in zip(roll(model, served, 7), roll(model, trained, 7, grad=True), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert other.requires_grad
    torch.testing.assert_close(served.cache.k, trained.cache.k, atol=1e-5, rtol=0)
    assert not any(frame.requires_grad for frame in trained.recent.values())


def test_batch_rows_are_streams_of_their_own(model: CausalWanModel) -> None:
    together = roll(model, new_state(seeds=(5, 9)), 5)
    for row, seed in enumerate((5, 9)):
        for one, other in zip(roll(model, new_state(seeds=(seed,)), 5), together, strict=True):
            torch.testing.assert_close(one[0], other[row], atol=1e-5, rtol=0)


def test_one_frame_first_block(model: CausalWanModel) -> None:
    geometry = VideoGeometry(height=16, width=32, latent_channels=3, block_frames=2, first_block_frames=1)
    state = new_state(geometry=geometry)
    assert [x.shape[1] for x in roll(model, state, 6)] == [1, 2, 2, 2, 2, 2]
    assert state.cache.frames == [0, 5, 6, 7, 8, 9, 10]


def test_recent_latents_are_those_of_the_cache(model: CausalWanModel) -> None:
    state = new_state()
    made = torch.cat(roll(model, state, 8), 1)
    assert list(state.recent) == state.cache.frames == [0, 10, 11, 12, 13, 14, 15]
    assert all(torch.equal(state.recent[frame], made[:, frame]) for frame in state.recent)


def test_context_noise_is_the_commit_cells_noise(model: CausalWanModel) -> None:
    noisy = Sampling(sigmas=SAMPLING.sigmas, context_noise=0.1)
    state = new_state()
    latents = rollout_block(model, state, text_of(model, 0), noisy)
    expected = add_noise(latents, cell_noise(5, 0, 3, (1, *latents.shape[1:])), 0.1)
    torch.testing.assert_close(torch.stack(list(state.recent.values()), 1), expected)


def by_a_pass_of_its_own(
    model: CausalWanModel, state: StreamState, text: TextContext, transition: str | None
) -> Tensor:
    """A block whose commit pass is written out: once more what the last step saw."""
    level = SAMPLING.sigmas[-1]
    run = BlockRun(state, text, Sampling(sigmas=SAMPLING.sigmas, context_noise=level), transition=transition)
    enter_block(model, run)
    with torch.no_grad():
        while run.kind == "step":
            asked = run.waiting()
            run.take(asked, model(asked.latents_BFCHW, torch.full((1, 1), 1000 * asked.sigma), text, cache=asked.cache))
        assert run.latents is not None
        again = run.waiting()._replace(latents_BFCHW=asked.latents_BFCHW)
        run.take(again, model(again.latents_BFCHW, torch.full((1, 1), 1000 * level), text, cache=again.cache))
    return run.latents


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_without_commits_the_last_step_leaves_its_keys_and_values(model: CausalWanModel, policy: str) -> None:
    """Past the window and through a recache; one pass a block is saved."""
    sampling = Sampling(sigmas=SAMPLING.sigmas, commits=False, context_noise=SAMPLING.sigmas[-1])
    state, expected, passes = new_state(policy), new_state(policy), []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    for block in range(7):
        text, transition = text_of(model, int(block > 4)), "recache" if block == 5 else None
        passes.clear()
        made = rollout_block(model, state, text, sampling, transition=transition)
        assert len(passes) == len(SAMPLING.sigmas) + (block == 5)
        assert torch.equal(made, by_a_pass_of_its_own(model, expected, text, transition))
        assert torch.equal(state.cache.k, expected.cache.k) and torch.equal(state.cache.v, expected.cache.v)
        assert state.position == expected.position and state.cache.frames == expected.cache.frames
        assert all(torch.equal(state.recent[frame], expected.recent[frame]) for frame in state.cache.frames)
    hook.remove()


def test_a_gradient_needs_commit_passes(model: CausalWanModel) -> None:
    sampling = Sampling(sigmas=SAMPLING.sigmas, commits=False, context_noise=SAMPLING.sigmas[-1])
    with pytest.raises(ValueError, match="train with commits"):
        rollout_block(model, new_state(), text_of(model, 0), sampling, grad=True)


def test_euler_sampler_follows_the_flow(model: CausalWanModel) -> None:
    state = new_state()
    text = text_of(model, 0)
    x = cell_noise(5, 0, 0, (1, 2, 3, 2, 4))
    with torch.no_grad():
        for sigma, following in zip(SAMPLING.sigmas, (*SAMPLING.sigmas[1:], 0.0), strict=True):
            flow = model(x, torch.full((1, 1), 1000 * sigma), text, cache=ListedCache([], 2))
            x = x + (following - sigma) * flow
    made = rollout_block(model, state, text, Sampling(sigmas=SAMPLING.sigmas, sampler="euler"))
    torch.testing.assert_close(made, x, atol=1e-5, rtol=0)


# Prompts.


def test_recache_rewrites_the_window_under_the_new_text_and_nothing_else(model: CausalWanModel) -> None:
    """One bidirectional pass over the frames outside the sink, at their positions; sink and bookkeeping stay."""
    state = new_state()
    roll(model, state, 6)
    before, latents = state.cache.state_dict(), dict(state.recent)
    text = text_of(model, 1)
    enter_block(model, BlockRun(state, text, SAMPLING, transition="recache"))
    after = state.cache.state_dict()
    tokens = GRID[0] * GRID[1]
    sink = slice(0, SINK * tokens)
    assert (after["origin"], after["end"]) == (before["origin"], before["end"]) == (0, 12)
    assert state.position == 6 and list(state.recent) == list(latents)
    for name in ("k", "v"):
        assert torch.equal(after[name][..., sink, :], before[name][..., sink, :])

    frames = state.cache.frames[SINK:]
    past = [[(before["k"][layer, :, :, sink], before["v"][layer, :, :, sink])] for layer in range(LAYERS)]
    listed = ListedCache(past, len(frames))
    window = torch.stack([latents[frame] for frame in frames], 1)
    with torch.no_grad():
        model(window, torch.zeros(1, 1), text, cache=listed)
    for layer, (k, v) in enumerate(listed.seen):
        for index, frame in enumerate(frames):
            slot = SINK + (frame - SINK) % (WINDOW - SINK)
            here, there = slice(index * tokens, (index + 1) * tokens), slice(slot * tokens, (slot + 1) * tokens)
            torch.testing.assert_close(after["k"][layer, :, :, there], k[:, :, here], atol=1e-5, rtol=0)
            torch.testing.assert_close(after["v"][layer, :, :, there], v[:, :, here], atol=1e-5, rtol=0)
            if layer:  # layer 0 has not met the text yet
                assert (after["k"][layer, :, :, there] - before["k"][layer, :, :, there]).abs().max() > 1e-3


def test_unprotected_recache_rewrites_the_sink_too(model: CausalWanModel) -> None:
    state = new_state()
    roll(model, state, 6)
    before = state.cache.state_dict()
    free = Sampling(sigmas=SAMPLING.sigmas, protect_sink=False)
    enter_block(model, BlockRun(state, text_of(model, 1), free, transition="recache"))
    sink = slice(0, SINK * GRID[0] * GRID[1])
    assert (state.cache.state_dict()["k"][1, :, :, sink] - before["k"][1, :, :, sink]).abs().max() > 1e-3


@pytest.mark.parametrize("transition", ["recache", "scene", "cut", "blend", None])
def test_transitions_at_the_first_block_change_nothing(model: CausalWanModel, transition: str | None) -> None:
    plain, entered = new_state(), new_state()
    assert torch.equal(roll(model, plain, 1)[0], roll(model, entered, 1, transition=transition)[0])


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_scene_is_a_stream_that_starts_at_that_block(model: CausalWanModel, policy: str) -> None:
    state, fresh = new_state(policy), new_state(policy)
    roll(model, state, 5)
    fresh.position = 5
    text = text_of(model, 1)
    for transition in ("scene", None, None, None, None):
        one = rollout_block(model, state, text, SAMPLING, transition=transition)
        assert torch.equal(one, rollout_block(model, fresh, text, SAMPLING))
    assert state.cache.frames == [10, 14, 15, 16, 17, 18, 19]  # a sink of its own


def test_a_switch_leaves_earlier_blocks_alone_and_each_transition_differs(model: CausalWanModel) -> None:
    results = {}
    for transition in ("cut", "recache", "scene"):
        state = new_state()
        before = roll(model, state, 5)
        assert all(torch.equal(a, b) for a, b in zip(before, roll(model, new_state(), 5), strict=True))
        results[transition] = rollout_block(model, state, text_of(model, 1), SAMPLING, transition=transition)
    unchanged = roll(model, new_state(), 6)[-1]
    values = [*results.values(), unchanged]
    for i, one in enumerate(values):
        for other in values[i + 1 :]:
            assert (one - other).abs().max() > 1e-4


# Failure.


class Broken(RuntimeError):
    pass


def break_at(model: CausalWanModel, call: int, layer: int) -> Callable[[], None]:
    """Raise between layers in the `call`-th pass; returns what repairs the model."""
    calls = 0

    def hook(module: torch.nn.Module, arguments: tuple) -> None:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise Broken

    return model.blocks[layer].register_forward_pre_hook(hook).remove


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("transition", [None, "recache", "scene"])
def test_a_launch_that_fails_anywhere_can_be_run_again(
    model: CausalWanModel, policy: str, transition: str | None
) -> None:
    """Past the window, so that the failed pass has overwritten slots; the next blocks are the same to the bit."""
    undisturbed = new_state(policy)
    roll(model, undisturbed, 6)
    text = text_of(model, 1)
    passes = len(SAMPLING.sigmas) + 1 + (transition == "recache")
    expected = [rollout_block(model, undisturbed, text, SAMPLING, transition=t) for t in (transition, None, None)]
    for call in range(passes):
        for layer in range(LAYERS):
            state = new_state(policy)
            roll(model, state, 6)
            repair = break_at(model, call, layer)
            with pytest.raises(Broken):
                rollout_block(model, state, text, SAMPLING, transition=transition)
            repair()
            assert state.position == 6 and state.begun
            if transition != "scene":
                assert state.cache.frames == [0, 6, 7, 8, 9, 10, 11]
            made = [rollout_block(model, state, text, SAMPLING, transition=t) for t in (transition, None, None)]
            assert not state.begun
            assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_cancellation_between_any_two_passes(model: CausalWanModel) -> None:
    expected = roll(model, new_state(), 6)
    for allowed in range(len(SAMPLING.sigmas) + 1):
        state = new_state()
        roll(model, state, 5)
        answers = iter([False] * allowed + [True])
        emitted: list[Tensor] = []
        with pytest.raises(Cancelled, match="block 5"):
            roll(model, state, 1, cancelled=lambda answers=answers: next(answers), emit=emitted.append)
        assert not emitted and state.position == 5 and next(answers, None) is None
        assert torch.equal(roll(model, state, 1)[0], expected[5])


def test_emit_comes_before_the_commit_and_its_failure_stops_the_block(model: CausalWanModel) -> None:
    state = new_state()
    stages: list[str] = []
    roll(model, state, 1, mark=stages.append, emit=lambda latents: stages.append("emit"))
    assert stages == ["enter", "denoise", "denoise", "denoise", "emit", "commit"]

    def refuse(latents: Tensor) -> None:
        raise Broken

    with pytest.raises(Broken):
        roll(model, state, 1, emit=refuse)
    assert state.position == 1
    assert torch.equal(roll(model, state, 1)[0], roll(model, new_state(), 2)[1])


def test_latents_that_are_not_finite_stop_the_stream(model: CausalWanModel) -> None:
    state = new_state()
    roll(model, state, 1)
    torch.nn.init.constant_(model.head.head.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="block 1"):
        roll(model, state, 1)
    assert state.position == 1
