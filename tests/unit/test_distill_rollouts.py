"""Training rollouts: the function that serves, with the gradient of a program written out."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamgen import flow
from streamgen.batch import generate
from streamgen.flow import timestep_of, to_x0
from streamgen.pipeline import StreamPipeline
from streamgen.pixels import to_uint8
from streamgen.rolling import join_texts
from streamgen.rollout import StreamState
from streamgen.rope import apply_rope, rope_table
from streamgen.transformer import CausalWanModel, TextContext
from streamgen_distill.rollouts import Plan, draw_plan, new_state, self_rollout, step_plans
from tests.tiny_model import save_tiny_model
from tests.tiny_sprites import GEOMETRY, TRANSFORMER, spread

CPU = torch.device("cpu")
PLAN4 = step_plans((4,), 5.0, "flow", 0.0)[0]


def network(seed: int = 0) -> CausalWanModel:
    torch.manual_seed(seed)
    model = CausalWanModel(TRANSFORMER, attention_backend="math")
    spread(model)
    return model


def prompts(model: CausalWanModel, blocks: int) -> list[TextContext]:
    rows = torch.randn(blocks, 2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return [model.encode_text(row) for row in rows]


def state(model: CausalWanModel, *, window: int = 8, sink: int = 2, policy: str = "relative") -> StreamState:
    return new_state(
        model,
        GEOMETRY,
        (3, 4),
        window_frames=window,
        sink_frames=sink,
        policy=policy,
        dtype=torch.float32,
        device=CPU,
    )


def plan(blocks: int, first: int = 0, exit_step: int = 3, rolling: bool = False) -> Plan:
    return Plan(sampling=PLAN4, exit_step=exit_step, blocks=blocks, first=first, rolling=rolling)


@torch.no_grad()
def test_what_is_trained_is_what_is_served(tmp_path: Path) -> None:
    """A training rollout that leaves at the last step gives the latents that `generate` decodes, to the bit."""
    pipe = StreamPipeline.from_pretrained(save_tiny_model(tmp_path / "model"), dtype="fp32")
    steps = pipe.scheduler.trained_steps[0]
    texts = ["a red circle rising over a snow background", "two large blue stars spinning over a navy background"]
    c = pipe.scheduler
    streams = new_state(
        pipe.transformer,
        pipe.geometry,
        (3, 4),
        window_frames=c.window_frames,
        sink_frames=c.sink_frames,
        policy="relative",
        dtype=pipe.dtype,
        device=pipe.device,
    )
    context = pipe.transformer.encode_text(pipe.text.encode(texts)[:, None])
    whole = Plan(sampling=pipe.sampling(steps), exit_step=steps - 1, blocks=6, first=0)
    rollout = self_rollout(pipe.transformer, streams, lambda block: context, whole, grad=False)
    video = generate(pipe, texts, (3, 4), 6, steps=steps)
    codec_state, decoded = None, []
    for latents in rollout.blocks:
        frames, codec_state = pipe.codec.decode_stream(latents, codec_state)
        decoded.append(to_uint8(frames))
    assert torch.equal(torch.cat(decoded, 1), video)


def written_out(model: CausalWanModel, streams: StreamState, texts: list[TextContext], exit_step: int) -> list[Tensor]:
    """Two blocks with keys and values in plain lists: stop-gradients exactly where the paper has them."""
    sizes, sigmas = (2, 2), PLAN4.sigmas
    seen: list[Tensor] = []
    out: list[Tensor] = []
    for block in range(2):
        noise = [streams.noise(step, block) for step in range(4)]
        frames = sum(sizes[: block + 1])
        rope = rope_table(range(frames), GEOMETRY.grid_height, GEOMETRY.grid_width, TRANSFORMER.head_dim)
        x_t = noise[0]
        for step in range(exit_step + 1):
            sigma = torch.tensor([0.0] * (frames - 2) + [sigmas[step]] * 2).expand(2, -1)
            both = torch.cat([*seen, x_t], 1)
            text = join_texts(texts[: block + 1])
            with torch.set_grad_enabled(step == exit_step):
                out_t = constant_past_pass(model, both, sigma, text, rope, frames - 2)
                x0 = to_x0(out_t, x_t, sigmas[step], "flow")
            if step < exit_step:
                x_t = flow.renoise(x0, noise[step + 1], sigmas[step + 1])
        out.append(x0)
        seen.append(x0.detach())
    return out


class Recorded:
    """A cache handle of constant past keys and values, made by an uncached pass over the clean past alone."""

    def __init__(self, rope: tuple[Tensor, Tensor], past: list[tuple[Tensor, Tensor]]) -> None:
        self._rope, self.past = rope, past
        self.seen: list[tuple[Tensor, Tensor]] = []

    def rope(self) -> tuple[Tensor, Tensor]:
        return self._rope

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k = apply_rope(k, *self._rope)
        self.seen.append((k, v))
        if not self.past:
            return k, v
        return torch.cat([self.past[layer][0], k], 2), torch.cat([self.past[layer][1], v], 2)


def constant_past_pass(
    model: CausalWanModel,
    both: Tensor,
    sigma: Tensor,
    text: TextContext,
    rope: tuple[Tensor, Tensor],
    past_frames: int,
) -> Tensor:
    """The block's own pass; keys and values of the clean past are constants of a pass over it (frames before)."""
    tokens = past_frames * GEOMETRY.tokens_per_frame
    past: list[tuple[Tensor, Tensor]] = []
    if past_frames:
        with torch.no_grad():
            clean = Recorded((rope[0][:tokens], rope[1][:tokens]), [])
            first = TextContext([(k[:, :1], v[:, :1]) for k, v in text.kv], first_of(text))
            model(both[:, :past_frames], torch.zeros(2, 1), first, cache=clean)
            past = clean.seen
    own = Recorded((rope[0][tokens:], rope[1][tokens:]), past)
    last = TextContext([(k[:, -1:], v[:, -1:]) for k, v in text.kv], last_of(text))
    return model(both[:, past_frames:], timestep_of(sigma[:, past_frames:]), last, cache=own)


def first_of(text: TextContext) -> Tensor | None:
    return None if text.pooled_BGD is None else text.pooled_BGD[:, :1]


def last_of(text: TextContext) -> Tensor | None:
    return None if text.pooled_BGD is None else text.pooled_BGD[:, -1:]


def gradients(model: CausalWanModel, latents: Tensor) -> list[Tensor]:
    goal = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad((latents * goal).sum(), list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


@pytest.mark.parametrize("policy", ["window", "relative"])
@pytest.mark.parametrize("exit_step", [0, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_is_that_of_two_blocks_written_out(policy: str, exit_step: int, checkpointed: bool) -> None:
    model = network()
    want = torch.cat(written_out(model, state(model, policy=policy), prompts(model, 2), exit_step), 1)
    texts = prompts(model, 2)
    got = self_rollout(
        model,
        state(model, policy=policy),
        texts.__getitem__,
        plan(2, exit_step=exit_step),
        grad=True,
        checkpointed=checkpointed,
    ).latents_BFCHW
    assert torch.allclose(got, want, atol=1e-5)
    for a, b in zip(gradients(model, got), gradients(model, want), strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", ["window", "relative"])
def test_checkpointing_is_right_when_the_ring_has_wrapped(policy: str) -> None:
    """Seven blocks in a window of four: what a graded block saw is long overwritten when its backward runs."""
    model = network()
    found = []
    for checkpointed in (False, True):
        texts = prompts(model, 7)
        rollout = self_rollout(
            model,
            state(model, policy=policy),
            texts.__getitem__,
            plan(7, first=3),
            grad=True,
            checkpointed=checkpointed,
        )
        found.append((rollout.latents_BFCHW.detach(), gradients(model, rollout.latents_BFCHW)))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_only_the_window_has_a_gradient_and_only_it_is_kept() -> None:
    model = network()
    texts = prompts(model, 6)
    rollout = self_rollout(model, state(model), texts.__getitem__, plan(6, first=4, exit_step=1), grad=True)
    assert len(rollout.blocks) == 2 and all(block.requires_grad for block in rollout.blocks)
    without = self_rollout(model, state(model), texts.__getitem__, plan(6, first=4, exit_step=1), grad=False)
    assert not any(block.requires_grad for block in without.blocks)
    assert torch.allclose(rollout.latents_BFCHW, without.latents_BFCHW, atol=1e-6)


def test_memory_does_not_grow_with_the_length() -> None:
    """Bytes of cache, of kept latents and of tensors alive after 6 and after 40 blocks (a graded window at the end)."""
    model = network()
    with torch.no_grad():
        text = prompts(model, 1)[0]

    def alive(blocks: int) -> tuple[int, int]:
        gc.collect()
        before = sum(type(item) is Tensor for item in gc.get_objects())
        streams = state(model)
        rollout = self_rollout(model, streams, lambda block: text, plan(blocks, first=blocks - 2), grad=True)
        gc.collect()
        count = sum(type(item) is Tensor for item in gc.get_objects()) - before
        kept = sum(latents.nbytes for latents in rollout.blocks) + sum(r.nbytes for r in streams.recent.values())
        return count, streams.cache.nbytes() + kept

    assert alive(40) == alive(6)


def test_rolling_tiles_give_each_block_once_and_carry_the_gradient() -> None:
    model = network()
    three = step_plans((3,), 5.0, "flow", 0.0)[0]
    texts = prompts(model, 6)
    for exit_step in range(3):
        rolling = Plan(sampling=three, exit_step=exit_step, blocks=6, first=2, rolling=True)
        streams = state(model, window=10)
        rollout = self_rollout(model, streams, texts.__getitem__, rolling, grad=True)
        assert len(rollout.blocks) == 4 and all(block.requires_grad for block in rollout.blocks)
        assert streams.position == 6
    with pytest.raises(ValueError, match="starts with a stream"):
        self_rollout(model, streams, texts.__getitem__, rolling, grad=True)


def test_plans_are_equal_for_equal_shared_generators_and_cover_their_ranges() -> None:
    counts = step_plans((4, 2, 1), 5.0, "flow", 0.0)

    def draw(seed: int, at: str) -> Plan:
        shared = torch.Generator().manual_seed(seed)
        return draw_plan(shared, plans=counts, rollout_blocks=(3, 9), window_blocks=4, window_at=at)

    assert draw(5, "end") == draw(5, "end")
    plans = [draw(seed, "end") for seed in range(300)]
    assert {p.blocks for p in plans} == set(range(3, 10))
    assert all(p.blocks - p.first == min(4, p.blocks) for p in plans)
    assert {(len(p.sampling.sigmas), p.exit_step) for p in plans} == {(n, e) for n in (4, 2, 1) for e in range(n)}
    anywhere = [draw(seed, "anywhere") for seed in range(300)]
    assert {p.first for p in anywhere} == set(range(6))


def test_bad_plans_and_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="exit_step is 4"):
        plan(2, exit_step=4)
    with pytest.raises(ValueError, match="must hold a block"):
        plan(2, first=2)
    with pytest.raises(ValueError, match="does not fit a window"):
        state(network(), window=3, sink=2)
