"""Guidance and UniPC in a rollout, against programs that keep two streams and call the scheduler's arithmetic."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamgen.batch import generate
from streamgen.errors import UserError
from streamgen.flow import renoise, step_sigmas
from streamgen.pipeline import SchedulerConfig, StreamPipeline
from streamgen.rollout import BlockRun, rollout_block, run_passes
from streamgen.unipc import unipc_sigmas
from tests.tiny_model import save_tiny_model

STAR = "a red star spinning over a snow background"
RING = "a blue ring rising over a navy background"
DISC = "a white circle falling over a grass background"
SCALE = 3.0


def guided_pipe(folder: Path, **card: object) -> StreamPipeline:
    pipe = StreamPipeline.from_pretrained(folder, dtype="fp32")
    changes = {"guidance": SCALE, "negative_prompt": DISC, **card}
    pipe.scheduler = dataclasses.replace(pipe.scheduler, **changes)  # type: ignore[arg-type]
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("guided") / "m")


def slow(pipe: StreamPipeline, blocks: int, sampler: str, steps: int, seed: int) -> list[Tensor]:
    """Two plain streams, one per prompt, that share every sample."""
    plain = dataclasses.replace(pipe.scheduler, guidance=1.0)
    pipe = StreamPipeline(
        transformer=pipe.transformer, codec=pipe.codec, text=pipe.text, geometry=pipe.geometry, scheduler=plain
    )
    streams = [pipe.stream(prompt, seed=seed, steps=2) for prompt in (STAR, DISC)]
    texts = [pipe.encode_text(pipe.text.encode([prompt])) for prompt in (STAR, DISC)]
    levels = unipc_sigmas if sampler == "unipc" else step_sigmas
    sigmas, made = levels(steps, pipe.scheduler.shift), []
    scheduler = None
    for block in range(blocks):
        state = streams[0].state
        handles = [s.state.cache.begin(pipe.geometry.block_start(block), 3) for s in streams]
        x = state.noise(0, block)
        if sampler == "unipc":
            import numpy as np
            from diffusers import UniPCMultistepScheduler

            scheduler = UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=pipe.scheduler.shift
            )
            scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])

        def ask(latents: Tensor, sigma: float, handles: list[object] = handles) -> list[Tensor]:
            level = torch.full((1, 1), 1000 * sigma)
            with torch.no_grad():
                return [
                    pipe.transformer(latents, level, text, cache=handle)  # type: ignore[arg-type]
                    for text, handle in zip(texts, handles, strict=True)
                ]

        for step, sigma in enumerate(sigmas):
            with_prompt, without = ask(x, sigma)
            flow = without + SCALE * (with_prompt - without)
            if scheduler is not None:
                x = scheduler.step(flow, scheduler.timesteps[step], x).prev_sample
            else:
                x = x - sigma * flow
                if step + 1 < steps:
                    x = renoise(x, state.noise(step + 1, block), sigmas[step + 1])
        ask(x, 0.0)
        for stream, handle in zip(streams, handles, strict=True):
            stream.state.cache.commit(handle)
        made.append(x)
    return made


@pytest.mark.parametrize(("sampler", "steps"), [("renoise", 2), ("unipc", 6)])
def test_equals_two_streams_that_share_their_samples(folder: Path, sampler: str, steps: int) -> None:
    pipe = guided_pipe(folder, sampler=sampler)
    stream = pipe.stream(STAR, seed=4)
    text = pipe.encode_text(pipe.text.encode([STAR]))
    assert stream.state.cache.k.shape[1] == 2
    mine = [rollout_block(pipe.transformer, stream.state, text, pipe.sampling(steps)) for _ in range(4)]
    for one, other in zip(mine, slow(pipe, 4, sampler, steps, 4), strict=True):
        assert one.shape == (1, 3, 4, 4, 4)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert {frame.shape for frame in stream.state.recent.values()} == {(1, 4, 4, 4)}


def test_a_guided_stream_differs_is_saved_and_is_one_row_of_a_batch(folder: Path) -> None:
    pipe = guided_pipe(folder, sampler="unipc")
    plain = next(StreamPipeline.from_pretrained(folder, dtype="fp32").stream(STAR, seed=1, steps=4))
    stream = pipe.stream(STAR, seed=1, steps=4)
    stream.prompt(RING, "recache", at_block=2)
    first = [next(stream) for _ in range(2)]
    assert abs(first[0].frames.astype(int) - plain.frames.astype(int)).max() > 2
    saved = stream.state_dict()
    rest = [next(stream) for _ in range(2)]
    again = pipe.resume(saved)
    for one, other in zip(rest, [next(again) for _ in range(2)], strict=True):
        assert (one.frames == other.frames).all()
    both = generate(pipe, [RING, STAR], [7, 1], 2, steps=4)
    whole = torch.cat([torch.from_numpy(block.frames) for block in first])
    assert (both[1].int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize("transition", ["cut", "recache", "blend", "scene"])
def test_a_switch_equals_two_streams_that_change_one_text(folder: Path, transition: str) -> None:
    """Both rows are re-encoded, each under its own text; the negative one keeps it. first_steps holds for both."""
    pipe = guided_pipe(folder, sampler="unipc", first_steps=4)
    stream = pipe.stream(STAR, seed=2, steps=2)
    stream.prompt(RING, transition, at_block=2, blend_blocks=2)
    latents: list[Tensor] = []
    decode = stream.begin_decode
    stream.begin_decode = lambda x: latents.append(x) or decode(x)  # type: ignore[method-assign,func-returns-value]
    for _ in range(3):
        next(stream)
    saved = stream.state_dict()
    rest = [next(stream).frames for _ in range(2)]
    again = pipe.resume(saved)
    assert all((next(again).frames == frames).all() for frames in rest)

    plain = dataclasses.replace(pipe.scheduler, guidance=1.0)
    one = StreamPipeline(
        transformer=pipe.transformer, codec=pipe.codec, text=pipe.text, geometry=pipe.geometry, scheduler=plain
    )
    pair = [one.stream(prompt, seed=2, steps=2).state for prompt in (STAR, DISC)]
    star, ring, disc = (one.text.encode([prompt]) for prompt in (STAR, RING, DISC))
    shares = {"blend": (0, 0, 0.5, 1, 1)}.get(transition, (0, 0, 1, 1, 1))
    for block, share in enumerate(shares):
        texts = [one.encode_text((1 - share) * star + share * ring), one.encode_text(disc)]
        runs = [
            BlockRun(state, text, pipe.sampling(4 if block == 0 else 2), transition=transition if block == 2 else None)
            for state, text in zip(pair, texts, strict=True)
        ]
        for run in runs:
            run.sampling = dataclasses.replace(run.sampling, guidance=1.0)
        while runs[0].kind is not None:
            asked = [run.waiting() for run in runs]
            with torch.no_grad():
                with_prompt, without = run_passes(pipe.transformer, asked)
            flow = without + SCALE * (with_prompt - without) if runs[0].kind == "step" else with_prompt
            for run, one_pass in zip(runs, asked, strict=True):
                run.take(one_pass, flow)
        assert runs[0].latents is not None
        torch.testing.assert_close(latents[block], runs[0].latents, rtol=1e-3, atol=1e-4)


def test_a_state_goes_on_with_the_sampler_that_made_it(folder: Path) -> None:
    pipe = guided_pipe(folder, sampler="unipc")
    stream = pipe.stream(STAR, steps=4)
    next(stream)
    saved = stream.state_dict()
    for changes, said in (
        ({"guidance": 4.0}, "guidance differ"),
        ({"negative_prompt": RING, "sampler": "euler"}, "sampler, negative_prompt differ"),
    ):
        with pytest.raises(UserError, match=said):
            guided_pipe(folder, **{"sampler": "unipc", **changes}).resume(saved)


def test_an_empty_negative_prompt_is_the_encoders_empty_one(folder: Path) -> None:
    pipe = guided_pipe(folder, negative_prompt="")
    text = pipe.encode_text(pipe.text.encode([STAR]))
    bare = pipe.transformer.encode_text(torch.zeros(1, 1, 8, 8))
    assert torch.allclose(text.kv[0][0][1:], bare.kv[0][0], atol=1e-6)


def test_refused_are_blocks_made_together_and_strange_cards(folder: Path) -> None:
    with pytest.raises(UserError, match="guidance 3 runs block after block only"):
        guided_pipe(folder).stream(STAR, visibility="same_level")
    with pytest.raises(UserError, match="sampler unipc runs block after block only"):
        guided_pipe(folder, guidance=1.0, sampler="unipc").stream(STAR, visibility="joint")
    for bad in ({"guidance": -1.0}, {"sampler": "heun"}, {"sampler": "unipc", "visibility": ("clean", "same_level")}):
        with pytest.raises(ValueError, match=r"guidance|sampler"):
            SchedulerConfig(trained_steps=(2,), window_frames=9, **bad)  # type: ignore[arg-type]


@torch.no_grad()
def test_guided_streams_share_launches(folder: Path) -> None:
    """Their passes have two rows each; three streams at different blocks come out as each does alone."""
    pipe = guided_pipe(folder, sampler="unipc")
    text = pipe.encode_text(pipe.text.encode([STAR]))
    plan = pipe.sampling(4)

    def begun(seed: int, blocks: int) -> BlockRun:
        state = pipe.stream(STAR, seed=seed).state
        for _ in range(blocks):
            rollout_block(pipe.transformer, state, text, plan)
        return BlockRun(state, text, plan)

    places = ((1, 0), (2, 1), (3, 3))
    alone = [rollout_block(pipe.transformer, begun(*place).state, text, plan) for place in places]
    runs = [begun(*place) for place in places]
    for _ in range(5):
        asked = [run.waiting() for run in runs]
        for run, one, out in zip(runs, asked, run_passes(pipe.transformer, asked), strict=True):
            run.take(one, out)
    for run, latents in zip(runs, alone, strict=True):
        assert run.latents is not None and run.kind is None
        torch.testing.assert_close(run.latents, latents, rtol=1e-4, atol=1e-5)
