"""The engine: passes of many streams in one forward make the videos that each stream makes alone."""

import numpy as np
import pytest
import torch

from streamgen import StreamPipeline
from streamgen.stream import Stream
from streamgen_infer import engine as engine_module
from streamgen_infer.engine import Engine, Work
from tests.tiny_model import save_tiny_model

PROMPTS = ("a red star", "two blue rings", "a green circle over a snow background")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StreamPipeline:
    return StreamPipeline.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tiny")), dtype="fp32")


def alone(stream: Stream, blocks: int) -> np.ndarray:
    return np.concatenate([next(stream).frames for _ in range(blocks)])


def latents_alone(pipe: StreamPipeline, prompt: str, seed: int, steps: int, blocks: int) -> list[torch.Tensor]:
    made: list[torch.Tensor] = []
    stream = pipe.stream(prompt, seed=seed, steps=steps)
    decode = stream.begin_decode
    stream.begin_decode = lambda latents: made.append(latents) or decode(latents)  # type: ignore[method-assign,func-returns-value]
    for _ in range(blocks):
        next(stream)
    return made


def finish(engine: Engine, work: Work, steps: int) -> np.ndarray:
    """One block of one stream, pass by pass."""
    work.begin(steps)
    frames = None
    while work.run is not None:
        assert not engine.forward([work])
        if not work.advanced() and work.finished:
            frames = engine.decode(work)
    assert frames is not None
    return frames


def test_pass_by_pass_equals_the_iterator_to_the_bit(pipe: StreamPipeline) -> None:
    work = Work(pipe.stream(PROMPTS[0], seed=3, steps=2))
    work.stream.prompt(PROMPTS[1], "recache", at_block=2)
    expected = pipe.stream(PROMPTS[0], seed=3, steps=2)
    expected.prompt(PROMPTS[1], "recache", at_block=2)
    engine = Engine(pipe)
    got = np.concatenate([finish(engine, work, 2) for _ in range(5)])
    assert np.array_equal(got, alone(expected, 5))


@pytest.mark.parametrize("cache", ["relative", "window"])
def test_streams_at_different_steps_blocks_and_lengths_share_forwards(pipe: StreamPipeline, cache: str) -> None:
    """Three streams, started one launch after the other, with 2, 4 and 2 steps: every mixture of step and commit."""
    counts = (2, 4, 2)
    works = [
        Work(pipe.stream(p, seed=i, steps=n, cache=cache)) for i, (p, n) in enumerate(zip(PROMPTS, counts, strict=True))
    ]
    expected = [
        [block.frames for block in pipe.stream(p, seed=i, steps=n, cache=cache, max_blocks=6)]
        for i, (p, n) in enumerate(zip(PROMPTS, counts, strict=True))
    ]
    engine, made, late = Engine(pipe), [[], [], []], [0, 0, 0]
    mixtures = set()
    for launch in range(100):
        if all(len(frames) == 6 for frames in made):
            break
        active = [i for i in range(3) if launch >= i and len(made[i]) < 6]
        for i in active:
            if works[i].run is None:
                works[i].begin(counts[i])
        mixtures.add(tuple((works[i].run.kind, works[i].run.step) for i in active))  # type: ignore[union-attr]
        assert not engine.forward([works[i] for i in active])
        for i in active:
            if not works[i].advanced() and works[i].finished:
                late[i] = launch  # the codec comes two launches later: the commit and the next block do not wait for it
            if works[i].finished and (launch - late[i] == 1 or len(made[i]) == 5):
                made[i].append(engine.decode(works[i]))
    assert len(mixtures) > 8  # steps beside commits, early beside late
    for got, want in zip(made, expected, strict=True):
        for one, other in zip(got, want, strict=True):
            assert np.abs(one.astype(int) - other.astype(int)).max() <= 1  # rounding to uint8 of values 1e-6 apart


def test_rows_differ_from_alone_by_rounding_only(pipe: StreamPipeline) -> None:
    expected = [latents_alone(pipe, p, i, 2, 5) for i, p in enumerate(PROMPTS)]
    works = [Work(pipe.stream(p, seed=i, steps=2)) for i, p in enumerate(PROMPTS)]
    engine = Engine(pipe)
    for block in range(5):
        for work in works:
            work.begin(2)
        while any(work.run for work in works):
            assert not engine.forward(works)
            for work, want in zip(works, expected, strict=True):
                if not work.advanced() and work.finished:
                    torch.testing.assert_close(work.finished.latents, want[block], atol=1e-5, rtol=0)
                    engine.decode(work)


def test_a_failed_launch_leaves_every_stream_as_it_was(pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch fails once, half way through the layers; the video is the undisturbed one, to the bit."""
    works = [Work(pipe.stream(p, seed=i, steps=2)) for i, p in enumerate(PROMPTS[:2])]
    plain = [Work(pipe.stream(p, seed=i, steps=2)) for i, p in enumerate(PROMPTS[:2])]
    engine = Engine(pipe)
    last_layer = pipe.transformer.blocks[-1]
    forward, broken = last_layer.forward, [False]

    def fails(*args: object, **kwargs: object) -> object:
        if broken[0]:
            raise ValueError("pulled the plug")
        return forward(*args, **kwargs)

    monkeypatch.setattr(last_layer, "forward", fails)

    def rounds(group: list[Work], disturb: bool) -> list[np.ndarray]:
        frames = []
        for _ in range(4):
            for work in group:
                work.begin(2)
            while any(work.run for work in group):
                if disturb:
                    broken[0] = True
                    with pytest.raises(ValueError, match="pulled the plug"):
                        engine.forward(group)
                    broken[0] = False
                engine.forward(group)
                frames += [engine.decode(work) for work in group if not work.advanced() and work.finished]
        return frames

    for one, other in zip(rounds(works, True), rounds(plain, False), strict=True):
        assert np.array_equal(one, other)


def test_out_of_memory_splits_the_launch_and_then_names_the_stream(
    pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    real = engine_module.run_passes

    def small_machine(model: object, passes: list) -> list:
        rows.append(len(passes))
        if len(passes) > 2 or any(asked.sigma == limit[0] for asked in passes):
            raise torch.OutOfMemoryError("out of memory")
        return real(model, passes)

    limit = [-1.0]
    monkeypatch.setattr(engine_module, "run_passes", small_machine)
    works = [Work(pipe.stream(p, seed=i, steps=2)) for i, p in enumerate((*PROMPTS, PROMPTS[0]))]
    for work in works:
        work.begin(2)
    engine = Engine(pipe)
    assert not engine.forward(works)
    assert rows == [4, 2, 2] and all(work.run is not None and work.run.step == 1 for work in works)
    works[1].drop()
    works[1].begin(2)  # back at its first step, the only one with this noise level
    limit[0] = works[1].run.waiting().sigma  # type: ignore[union-attr]
    failed = engine.forward(works)
    assert list(failed) == [1] and isinstance(failed[1], torch.OutOfMemoryError)
    assert [work.run.kind for work in works] == ["commit", "step", "commit", "commit"]  # type: ignore[union-attr]


def test_values_that_are_not_finite_fail_one_stream(pipe: StreamPipeline) -> None:
    works = [Work(pipe.stream(p, seed=i, steps=2)) for i, p in enumerate(PROMPTS[:2])]
    for work in works:
        work.begin(2)
    engine = Engine(pipe)
    engine.forward(works)
    assert works[0].run is not None
    works[0].run._x_t = torch.full_like(works[0].run._x_t, torch.nan)  # type: ignore[arg-type]
    failed = engine.forward(works)
    assert list(failed) == [0] and "block 0" in str(failed[0])
    assert not works[1].advanced() and works[1].finished is not None
    assert works[0].run is not None and works[0].run.latents is None


def test_a_dropped_block_may_get_another_prompt(pipe: StreamPipeline) -> None:
    stream = pipe.stream(PROMPTS[0], seed=1, steps=2)
    work, engine = Work(stream), Engine(pipe)
    finish(engine, work, 2)
    work.begin(2)
    engine.forward([work])
    work.drop()
    stream.prompt(PROMPTS[1], "cut")
    got = finish(engine, work, 2)
    expected = pipe.stream(PROMPTS[0], seed=1, steps=2)
    next(expected)
    expected.prompt(PROMPTS[1], "cut")
    assert np.array_equal(got, next(expected).frames)


@pytest.mark.parametrize("turn_back_to", [0, 2, 5])
def test_a_snapshot_turns_a_stream_back_to_the_bit(pipe: StreamPipeline, turn_back_to: int) -> None:
    stream = pipe.stream(PROMPTS[0], seed=1, steps=2)
    stream.prompt(PROMPTS[2], "recache", at_block=3)
    kept, frames = {}, []
    for block in range(8):
        if block == turn_back_to:
            kept[block] = stream.snapshot()
        frames.append(next(stream).frames)
    stream.restore(kept[turn_back_to])
    again = [next(stream).frames for _ in range(8 - turn_back_to)]
    assert all(np.array_equal(a, b) for a, b in zip(again, frames[turn_back_to:], strict=True))


def test_the_tiny_model_is_real(pipe: StreamPipeline) -> None:
    """Different prompts and seeds give different videos, or the tests above would prove nothing."""
    first, other_prompt, other_seed = (
        alone(pipe.stream(prompt, seed=seed, steps=2), 2)
        for prompt, seed in ((PROMPTS[0], 0), (PROMPTS[1], 0), (PROMPTS[0], 1))
    )
    assert not np.array_equal(first, other_prompt) and not np.array_equal(first, other_seed)


class LateDevice:
    """A clock of a device that is behind: what it was told, in order."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def mark(self) -> int:
        self.told.append("mark")
        return len(self.told)

    def reach(self, moment: int) -> None:
        assert moment == len(self.told)
        self.told.append("reached")

    def ms(self, start: int, end: int) -> float:
        return 1000.0 * (end - start)


def test_a_launch_is_over_when_the_device_has_done_it(pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what the scheduler measures is how long it takes to queue a launch."""
    told: list[str] = []
    run_passes = engine_module.run_passes
    monkeypatch.setattr(engine_module, "run_passes", lambda *given: told.append("passes") or run_passes(*given))
    monkeypatch.setattr(engine_module, "clock_of", lambda device: LateDevice(told))
    work = Work(pipe.stream(PROMPTS[0], steps=2))
    work.begin()
    engine = Engine(pipe)
    assert not engine.forward([work], lambda: told.append("meanwhile"))
    assert told == ["mark", "passes", "meanwhile", "mark", "reached"]
    assert engine.passes_s == 3.0
