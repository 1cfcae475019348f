"""Same-level caches in one process: who sees what, all orders alike, made again from latents. Who runs which layers."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamgen.parallel.balance import PATIENCE, WINDOW, Balancer, best_counts, bounds_of, slowest_s
from streamgen.parallel.job import Order, even_bounds
from streamgen.parallel.levels import LevelCaches, cell_pass, finish_cell, recache_pass, run_block, run_cell
from streamgen.parallel.replay import Journal, Reach, replayed_transition, skip_to
from streamgen.pipeline import StreamPipeline
from streamgen.rollout import run_passes
from streamgen.transformer import Call, TextContext
from tests.distributed.pipelines import RING, STAR, caches, save_model

STEPS = 3


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(four_layers: Path) -> StreamPipeline:
    return StreamPipeline.from_pretrained(four_layers, dtype="fp32")


@torch.no_grad()
def texts(pipe: StreamPipeline) -> list[TextContext]:
    return [pipe.transformer.encode_text(pipe.text.encode([text]).float()[:, None]) for text in (STAR, RING)]


TRANSITIONS = {2: "recache", 4: "cut", 5: "scene", 8: "recache"}


def story(pipe: StreamPipeline, levels: LevelCaches, blocks: range) -> list[torch.Tensor]:
    """The serial order; the prompt changes at each of TRANSITIONS."""
    both, made = texts(pipe), []
    for block in blocks:
        text = both[sum(change <= block for change in TRANSITIONS) % 2]
        transition = TRANSITIONS.get(block)
        made.append(run_block(pipe.transformer, levels, text, pipe.sampling(STEPS), transition=transition))
    return made


def assert_equal_levels(one: LevelCaches, other: LevelCaches) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for step in a:
        assert a[step]["position"] == b[step]["position"]
        assert a[step]["recent"].keys() == b[step]["recent"].keys()
        for frame, seen in a[step]["recent"].items():
            assert torch.equal(seen, b[step]["recent"][frame])
        for name, value in a[step]["cache"].items():
            theirs = b[step]["cache"][name]
            assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
def test_the_stream_batch_order_is_the_serial_order(pipe: StreamPipeline, sampler: str) -> None:
    """The diagonal: every tick runs one cell of each step, the last step first; passes made by the engine's way."""
    pipe.scheduler = replace(pipe.scheduler, sampler=sampler)
    one, other, sampling, both = caches(pipe, STEPS), caches(pipe, STEPS), pipe.sampling(STEPS), texts(pipe)
    expected = story(pipe, one, range(10))
    x_t: dict[int, torch.Tensor] = {}
    made = []
    with torch.no_grad():
        for tick in range(10 + STEPS - 1):
            for step in reversed(range(STEPS)):
                block = tick - step
                if not 0 <= block < 10:
                    continue
                state, text = other[step], both[sum(change <= block for change in TRANSITIONS) % 2]
                latents = x_t.pop(block) if step else state.noise(0, block)
                asked = recache_pass(state, step, text, sampling, TRANSITIONS.get(block))
                if asked is not None:
                    run_passes(pipe.transformer, [asked])
                    state.cache.commit(asked.cache)
                asked = cell_pass(state, block, step, latents, text, sampling)
                x_t[block] = finish_cell(state, block, step, asked, run_passes(pipe.transformer, [asked])[0], sampling)
            if tick >= STEPS - 1:
                made.append(x_t.pop(tick - STEPS + 1))
    for block, (a, b) in enumerate(zip(expected, made, strict=True)):
        assert torch.equal(a, b), f"block {block}"
    assert_equal_levels(one, other)


def test_a_step_sees_earlier_blocks_as_they_were_at_that_step(pipe: StreamPipeline) -> None:
    """Each cache holds what a plain cache holds that was given the step's own inputs; and levels are not alike."""
    levels, sampling, text = caches(pipe, STEPS), pipe.sampling(STEPS), texts(pipe)[0]
    plain = caches(pipe, STEPS)
    with torch.no_grad():
        for block in range(4):
            x_t = levels[0].noise(0, block)
            for step in range(STEPS):
                g, cache = pipe.geometry, plain[step].cache
                handle = cache.begin(g.block_start(block), g.block_size(block))
                timestep = torch.full((1, 1), 1000 * sampling.sigmas[step])
                pipe.transformer(x_t, timestep, text, cache=handle)
                cache.commit(handle)
                x_t = run_cell(pipe.transformer, levels, block, step, x_t, text, sampling)
    for step in range(STEPS):
        assert torch.equal(levels[step].cache.state_dict()["k"], plain[step].cache.state_dict()["k"])
    assert not torch.equal(levels[0].cache.state_dict()["k"], levels[1].cache.state_dict()["k"])


def test_a_cell_that_failed_is_run_again(pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose recache had been done: nothing changes but by a cell's end."""
    one, other = caches(pipe, STEPS), caches(pipe, STEPS)
    expected = story(pipe, one, range(10))
    assert len(story(pipe, other, range(8))) == 8
    real, calls = pipe.transformer.unembed, itertools.count()

    def fails(*arguments: torch.Tensor) -> torch.Tensor:
        if next(calls) in (1, 3):
            raise RuntimeError("out of memory")
        return real(*arguments)

    monkeypatch.setattr(pipe.transformer, "unembed", fails)
    text, sampling = texts(pipe)[0], pipe.sampling(STEPS)
    x_t = other[0].noise(0, 8)
    for step in range(STEPS):
        while True:
            try:
                x_t = run_cell(pipe.transformer, other, 8, step, x_t, text, sampling, transition=TRANSITIONS[8])
                break
            except RuntimeError as error:
                assert str(error) == "out of memory"
    assert torch.equal(x_t, expected[8])


def test_saved_and_restored(pipe: StreamPipeline) -> None:
    one, other = caches(pipe, STEPS), caches(pipe, STEPS)
    story(pipe, one, range(6))
    saved = one.state_dict()
    expected = story(pipe, one, range(6, 10))
    other.load_state_dict(saved)
    for a, b in zip(expected, story(pipe, other, range(6, 10)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"the saved caches are of steps \[0, 1, 2\], these are of \[0, 1\]"):
        caches(pipe, 2).load_state_dict(saved)
    assert one.nbytes() == STEPS * one[0].cache.nbytes() > 0
    one.reset()
    assert torch.equal(story(pipe, one, range(1))[0], story(pipe, caches(pipe, STEPS), range(1))[0])


def test_layers_in_parts_are_the_forward(pipe: StreamPipeline) -> None:
    model, text = pipe.transformer, texts(pipe)[0]
    one, other = caches(pipe, 1)[0], caches(pipe, 1)[0]
    x, timestep = one.noise(0, 0), torch.full((1, 1), 800.0)
    with torch.no_grad():
        expected = model(x, timestep, text, cache=one.cache.begin(0, 3))
        handle = other.cache.begin(0, 3)
        call = Call(handle.rope(), handle, None, 1, model.ops, model.attention_backend)
        e = model.embed_time(timestep, text, 3, 1)
        tokens = model.embed(x)
        for layers in (range(1), range(1, 3), range(3, 4)):
            tokens = model.run_layers(tokens, e, text, call, layers)
        assert torch.equal(model.unembed(tokens, e, x), expected)


# Made again from latents.


def journalled(pipe: StreamPipeline, changes: dict[int, str], blocks: int) -> tuple[LevelCaches, Journal]:
    """A stream, and what was kept of it."""
    levels, sampling, both = caches(pipe, STEPS), pipe.sampling(STEPS), texts(pipe)
    reach = Reach(geometry=pipe.geometry, spec=levels[0].cache.spec, protect_sink=sampling.protect_sink)
    journal, text_id = Journal(reach), 0
    for block in range(blocks):
        text_id += block in changes
        order = Order(block=block, text_id=text_id, transition=changes.get(block))
        journal.ordered(order)
        x_t = levels[0].noise(0, block)
        for step in range(STEPS):
            x_t = run_cell(
                pipe.transformer, levels, block, step, x_t, both[text_id % 2], sampling, transition=order.transition
            )
            journal.ran(block, step, x_t, STEPS)
        journal.finished(block)
    return levels, journal


def rebuilt(pipe: StreamPipeline, journal: Journal) -> LevelCaches:
    levels, sampling, both = caches(pipe, STEPS), pipe.sampling(STEPS), texts(pipe)
    for entry in journal.history():
        order = entry.order
        for step, state in levels.states.items():
            skip_to(state, order.block, journal.shot_start)
            x_t = entry.inputs[step] if step else state.noise(0, order.block)
            transition = replayed_transition(state, sampling, order)
            text = both[order.text_id % 2]
            run_cell(pipe.transformer, levels, order.block, step, x_t, text, sampling, transition=transition)
    return levels


@pytest.mark.parametrize(("window", "sink"), [(9, 1), (6, 0), (8, 3), (12, 4)])
@pytest.mark.parametrize("protect_sink", [True, False])
def test_caches_made_again_from_latents(pipe: StreamPipeline, window: int, sink: int, protect_sink: bool) -> None:
    """To the bit, from a bounded number of blocks, wherever prompts changed and scenes began."""
    pipe.transformer.blocks = pipe.transformer.blocks[:2]
    pipe.transformer.config = replace(pipe.transformer.config, num_layers=2)
    pipe.scheduler = replace(pipe.scheduler, window_frames=window, sink_frames=sink, protect_sink=protect_sink)
    for seed in range(2):
        rng = random.Random(f"{window} {sink} {seed}")
        kinds = ["cut", "recache", "recache", "scene"] if seed else ["cut"]
        changes = {block: rng.choice(kinds) for block in range(1, 15) if rng.random() < 0.25}
        levels, journal = journalled(pipe, changes, 15)
        assert_equal_levels(rebuilt(pipe, journal), levels)
        reach = journal.reach
        assert len(journal.entries) <= 2 * reach.past_blocks * 2 + 2 + sink
        assert journal.nbytes() > 0


def test_no_kept_block_is_too_many(pipe: StreamPipeline) -> None:
    """Without the oldest one after the sink, the caches are others: the past reaches as far as is said."""
    pipe.transformer.blocks = pipe.transformer.blocks[:2]
    pipe.transformer.config = replace(pipe.transformer.config, num_layers=2)
    levels, journal = journalled(pipe, {}, 12)
    assert sorted(journal.entries) == [0, 7, 8, 9, 10, 11]
    del journal.entries[7]
    with pytest.raises(AssertionError):
        assert_equal_levels(rebuilt(pipe, journal), levels)


def test_a_journal_gives_back_the_orders_in_flight() -> None:
    journal = Journal(reach=None)  # type: ignore[arg-type]  # nothing is finished here
    orders = [Order(block=block) for block in range(3)]
    for order in orders:
        journal.ordered(order)
    assert journal.roll_back() == orders
    assert journal.roll_back() == journal.history() == []


# Who runs which layers.


def test_the_best_counts_are_the_best() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ranks, layers = rng.randint(1, 3), rng.randint(3, 8)
        per_layer, other = [[rng.uniform(0.1, 2) for _ in range(ranks)] for _ in range(2)]
        counts = best_counts(layers, per_layer, other)
        assert sum(counts) == layers
        assert min(counts) >= 1
        everything = [c for c in itertools.product(range(1, layers + 1), repeat=ranks) if sum(c) == layers]
        best = min(slowest_s(c, per_layer, other) for c in everything)
        assert slowest_s(counts, per_layer, other) == pytest.approx(best)
    assert [even_bounds(n, p) for n, p in ((4, 2), (7, 3), (3, 3))] == [(0, 2, 4), (0, 3, 5, 7), (0, 1, 2, 3)]


def test_layers_move_once_and_stay() -> None:
    """A rank at half speed gives layers away, after patience; noise and one pause move nothing."""
    rng, balancer = random.Random(0), Balancer(even_bounds(12, 2))
    noise = lambda: rng.uniform(0.95, 1.05)  # noqa: E731
    speeds = [1.0, 1.0]
    moves = []
    for cell in range(600):
        if cell == 200:
            speeds = [2.0, 1.0]
        counts = [b - a for a, b in itertools.pairwise(balancer.bounds)]
        times = [count * speed * noise() for count, speed in zip(counts, speeds, strict=True)]
        if cell == 100:
            times[1] *= 10
        found = balancer.saw(times, [0.5, 0.5])
        if found is not None:
            balancer.moved(found)
            moves.append((cell, found))
    assert [bounds for _, bounds in moves] == [(0, 4, 12)]
    assert 200 + PATIENCE <= moves[0][0] < 200 + PATIENCE + WINDOW
    assert bounds_of([3, 1, 2]) == (0, 3, 4, 6)
