"""The runtime: what viewers get is the video that the stream makes alone, whatever they ask meanwhile.

Streams play far faster than real time here, so that seconds of video take a moment; nothing is said about timing.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamgen import StreamPipeline
from streamgen.errors import UserError
from streamgen.frames import Coming, FrameMaker
from streamgen_infer.engine import Work
from streamgen_infer.live_stream import LiveStream
from streamgen_infer.requests import MadeBlock, Refused, StreamEvent, StreamRequest
from streamgen_infer.runtime import Runtime
from tests.tiny_model import near, save_tiny_model

PROMPT, OTHER = "a red star", "two blue rings over a snow background"
FPS = 480.0
BLOCK = 12
SECONDS = 10 * BLOCK / FPS


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StreamPipeline:
    return StreamPipeline.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tiny")), dtype="fp32")


class Late:
    """Frames on their way from a codec that runs beside the transformer."""

    def __init__(self, coming: Coming) -> None:
        self.codec, self._coming = coming.codec, coming

    def wait(self) -> np.ndarray:
        return self._coming.wait()

    def decode_ms(self) -> float:
        return 1.0


class Beside(FrameMaker):
    overlaps = True

    def begin(self, *given: Any) -> Any:
        return Late(super().begin(*given))


@pytest.fixture(params=["codec in turn", "codec beside"])
def runtime(request: pytest.FixtureRequest, pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    if request.param == "codec beside":
        monkeypatch.setattr(pipe, "frames", Beside(pipe.device))
    runtime = Runtime(pipe, admission=False)
    runtime.start()
    yield runtime
    runtime.close()
    assert runtime.failure is None


class Viewer:
    """Shows frames as a player would: those of a higher epoch replace what is there from their place on."""

    def __init__(self) -> None:
        self.frames: list[np.ndarray] = []
        self.blocks: list[MadeBlock] = []
        self.events: list[StreamEvent] = []
        self.ended = threading.Event()
        self.when: dict[int, Callable[[], object]] = {}
        self.results: list[object] = []

    def on_block(self, block: MadeBlock) -> None:
        if self.blocks and block.epoch > self.blocks[-1].epoch:
            assert block.first_frame <= len(self.frames)
            del self.frames[block.first_frame :]
        assert block.first_frame == len(self.frames), "no frame is lost and none comes twice"
        self.frames += list(block.frames)
        self.blocks.append(block)
        action = self.when.pop(block.index, None)
        if action is not None:
            self.results.append(action())

    def on_event(self, event: StreamEvent) -> None:
        self.events.append(event)
        if event.kind in ("ended", "failed"):
            self.ended.set()

    def video(self) -> np.ndarray:
        assert self.ended.wait(30), "the stream did not end"
        return np.stack(self.frames)


def watch(runtime: Runtime, prompt: str = PROMPT, **options: object) -> tuple[Viewer, LiveStream]:
    viewer = Viewer()
    values = {"fps": FPS, "steps": 2, "max_seconds": SECONDS, "seed": 3, **options}
    request = StreamRequest(prompt=prompt, **values)  # type: ignore[arg-type]
    return viewer, runtime.open(request, on_block=viewer.on_block, on_event=viewer.on_event)


def expected(pipe: StreamPipeline, *switches: tuple[int, str, str], seed: int = 3, blocks: int = 10) -> np.ndarray:
    stream = pipe.stream(PROMPT, seed=seed, steps=2, max_blocks=blocks)
    for block, prompt, transition in switches:
        stream.prompt(prompt, transition, at_block=block)
    return np.concatenate([block.frames for block in stream])


def test_one_stream_is_the_iterators_video_to_the_bit(runtime: Runtime, pipe: StreamPipeline) -> None:
    viewer, _ = watch(runtime)
    assert np.array_equal(viewer.video(), expected(pipe))
    assert [event.kind for event in viewer.events] == ["applied", "ended"]
    assert [block.index for block in viewer.blocks] == list(range(10))
    assert all(block.steps == 2 and block.prompt_version == 0 for block in viewer.blocks)


def test_many_streams_do_not_touch_each_other(runtime: Runtime, pipe: StreamPipeline) -> None:
    viewers = [watch(runtime, seed=seed)[0] for seed in range(5)]
    videos = [viewer.video() for viewer in viewers]
    for seed, video in enumerate(videos):
        assert near(video, expected(pipe, seed=seed))
    assert not near(videos[0], videos[1])


@pytest.mark.parametrize("transition", ["cut", "recache", "scene"])
def test_a_prompt_holds_from_the_block_that_the_receipt_names(
    runtime: Runtime, pipe: StreamPipeline, transition: str
) -> None:
    viewer, live = watch(runtime)
    viewer.when[3] = lambda: live.prompt(OTHER, transition)
    video = viewer.video()
    (receipt,) = viewer.results
    applied = [event for event in viewer.events if event.kind == "applied"]
    assert (applied[-1].version, applied[-1].block) == (receipt.version, receipt.block) == (1, receipt.block)
    assert receipt.block > 3 and receipt.media_s == receipt.block * BLOCK / FPS
    assert np.array_equal(video, expected(pipe, (receipt.block, OTHER, transition)))


def test_a_model_without_commit_passes(pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same to the bit through a switch and a turn back, in two launches a block."""
    card = replace(pipe.scheduler, trained_steps=(2,), commits=False, context_noise=5 / 6)
    monkeypatch.setattr(pipe, "scheduler", card)
    runtime = Runtime(pipe, admission=False)
    assert runtime.rules.commit_passes == 0
    runtime.start()
    try:
        viewer, live = watch(runtime)
        viewer.when[3] = lambda: live.prompt(OTHER, "recache")
        viewer.when[7] = lambda: live.seek(1 * BLOCK / FPS)
        video = viewer.video()
        switch, _ = viewer.results
        assert np.array_equal(video, expected(pipe, (switch.block, OTHER, "recache")))  # type: ignore[attr-defined]
        many = [watch(runtime, seed=seed)[0] for seed in range(3)]
        assert all(near(one.video(), expected(pipe, seed=seed)) for seed, one in enumerate(many))
    finally:
        runtime.close()
    assert runtime.failure is None
    other = expected(pipe)
    monkeypatch.setattr(pipe, "scheduler", replace(card, commits=True))
    assert not near(other, expected(pipe))


def test_a_prompt_at_the_playhead_gives_up_the_blocks_that_were_not_seen(
    runtime: Runtime, pipe: StreamPipeline
) -> None:
    """The viewer has seen half of block 2 when blocks to 6 are there."""
    viewer, live = watch(runtime, lead_s=100.0, start_s=100.0)

    def change() -> object:
        live.playhead(2.5 * BLOCK / FPS)
        return live.prompt(OTHER, "recache", apply_at="playhead")

    viewer.when[6] = change
    video = viewer.video()
    (receipt,) = viewer.results
    assert receipt.block == 3 and viewer.blocks[-1].epoch == 1
    assert [block.index for block in viewer.blocks] == [*range(7), *range(3, 10)]
    assert np.array_equal(video, expected(pipe, (3, OTHER, "recache")))


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_seeking_back_shows_the_same_again_to_the_frame(pipe: StreamPipeline, budget: int) -> None:
    """Also when no snapshot near was kept: then the blocks before are made once more and not shown."""
    runtime = Runtime(pipe, admission=False, checkpoint_bytes=budget)
    runtime.start()
    viewer, live = watch(runtime, lead_s=0.01)
    viewer.when[2] = lambda: live.prompt(OTHER, "cut")
    viewer.when[8] = lambda: live.seek(17 / FPS)
    video = viewer.video()
    runtime.close()
    changed, receipt = viewer.results
    assert receipt.block == 1 and receipt.media_s == 17 / FPS
    again = [block for block in viewer.blocks if block.epoch == 1]
    assert again[0].first_frame == 17 and len(again[0].frames) == 7
    assert np.array_equal(video, expected(pipe, (changed.block, OTHER, "cut")))


def test_a_prompt_after_a_seek_changes_what_follows_and_keeps_later_ones(
    runtime: Runtime, pipe: StreamPipeline
) -> None:
    viewer, live = watch(runtime)
    live.prompt("a green square", "cut", at_media_s=8 * BLOCK / FPS)

    def back() -> object:
        live.seek(2 * BLOCK / FPS)
        return live.prompt(OTHER, "cut")

    viewer.when[5] = back
    video = viewer.video()
    (receipt,) = viewer.results
    assert receipt.block == 2
    assert np.array_equal(video, expected(pipe, (2, OTHER, "cut"), (8, "a green square", "cut")))


def test_pause_stops_at_a_blocks_edge_and_play_goes_on(runtime: Runtime, pipe: StreamPipeline) -> None:
    viewer, live = watch(runtime)
    viewer.when[3] = live.pause
    assert not viewer.ended.wait(0.3)
    made = len(viewer.blocks)
    assert made in (4, 5)  # the one in progress is finished
    live.play()
    assert np.array_equal(viewer.video(), expected(pipe))


def test_branch_and_resume_go_on_from_a_state(runtime: Runtime, pipe: StreamPipeline) -> None:
    viewer, live = watch(runtime)
    viewer.when[4] = lambda: live.branch(5 * BLOCK / FPS)
    viewer.when[6] = live.state_dict
    video = viewer.video()
    branched, saved = viewer.results
    assert branched["shown_frames"] == 5 * BLOCK and saved["shown_frames"] == 7 * BLOCK
    for state in (branched, saved):
        other = Viewer()
        other.frames = list(video[: state["shown_frames"]])
        request = StreamRequest(prompt="", saved=state, fps=FPS, max_seconds=SECONDS)
        runtime.open(request, on_block=other.on_block, on_event=other.on_event)
        assert np.array_equal(other.video(), video)


def test_the_lead_over_the_viewer_is_bounded(runtime: Runtime) -> None:
    viewer, live = watch(runtime, lead_s=3 * BLOCK / FPS, start_s=1000.0, max_seconds=None)
    assert not viewer.ended.wait(0.3)
    assert len(viewer.blocks) == 3  # media time has not begun: the first frame is promised for much later
    live.close()
    assert viewer.ended.wait(10)


def test_steps_can_be_fixed_while_it_runs(runtime: Runtime) -> None:
    viewer, live = watch(runtime, steps=None)
    viewer.when[2] = lambda: live.steps(4)
    viewer.video()
    counts = [block.steps for block in viewer.blocks]
    assert counts[:3] == [2, 2, 2] and counts[-1] == 4 and sorted(counts) == counts


def test_frames_are_collected_while_the_next_launch_runs(pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the codec runs beside the transformer; those of the last block at once, for nothing runs then."""
    said: list[str] = []

    class Telling(Late):
        def wait(self) -> np.ndarray:
            said.append("collected")
            return super().wait()

    class Codec(Beside):
        def begin(self, *given: Any) -> Any:
            said.append("to the codec")
            return Telling(FrameMaker.begin(self, *given))

    wanted = expected(pipe, blocks=3)
    monkeypatch.setattr(pipe, "frames", Codec(pipe.device))
    runtime = Runtime(pipe, admission=False)
    runtime.start()
    said.clear()
    forward = runtime.engine.forward

    def launched(works: list, meanwhile: Callable[[], None] = lambda: None) -> dict:
        said.append("launch")
        failed = forward(works, meanwhile)
        said.append("done")
        return failed

    monkeypatch.setattr(runtime.engine, "forward", launched)
    viewer, _ = watch(runtime, max_seconds=3 * BLOCK / FPS)
    assert np.array_equal(viewer.video(), wanted)
    runtime.close()
    for at in [i for i, one in enumerate(said) if one == "to the codec"][:-1]:
        assert said[at : at + 4] == ["to the codec", "launch", "collected", "done"]
    assert said.count("to the codec") == said.count("collected") == 3


@pytest.mark.parametrize("when", ["given to it", "collected"])
def test_a_seek_while_a_block_is_in_the_codec(
    runtime: Runtime, pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Its frames belong to a video that nobody wants any more, whatever epoch it is by the time they are there."""
    viewer, live = watch(runtime)
    begin, asked = runtime.engine.begin_decode, []

    def seeks() -> None:
        if not asked:
            asked.append(live.seek(2 * BLOCK / FPS))

    def to_codec(work: Work) -> Any:
        at = work.finished.index if work.finished else 0
        coming = begin(work)
        if at == 5 and when == "given to it":
            seeks()
        if at != 5 or when == "given to it":
            return coming
        late = Late(coming)
        late.wait = lambda: (coming.wait(), seeks())[0]  # type: ignore[method-assign]
        return late

    monkeypatch.setattr(runtime.engine, "begin_decode", to_codec)
    assert np.array_equal(viewer.video(), expected(pipe))
    (turned,) = [at for at, block in enumerate(viewer.blocks) if block.epoch == 1][:1]
    assert [block.index for block in viewer.blocks] == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9] and turned == 5


def test_one_streams_failure_is_its_own(
    runtime: Runtime, pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, bad_live = watch(runtime, seed=1, max_seconds=None)
    good, _ = watch(runtime, seed=3)
    decode = bad_live.stream.begin_decode

    def breaks(latents: torch.Tensor) -> object:
        if bad_live.stream.state.position >= 2:
            raise RuntimeError("codec broke")
        return decode(latents)

    monkeypatch.setattr(bad_live.stream, "begin_decode", breaks)
    assert near(good.video(), expected(pipe))
    assert bad.ended.wait(10)
    assert bad.events[-1].kind == "failed" and "codec broke" in bad.events[-1].message
    with pytest.raises(UserError, match="is closed"):
        bad_live.prompt(OTHER)


def test_a_launch_that_fails_is_run_again_stream_by_stream(
    runtime: Runtime, pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = runtime.engine.forward
    broken = []

    def sometimes(works: list, *meanwhile: object) -> dict:
        if len(works) > 1 and len(broken) < 3:
            broken.append(len(works))
            raise ValueError("a kernel that does not like batches")
        return forward(works, *meanwhile)

    monkeypatch.setattr(runtime.engine, "forward", sometimes)
    viewers = [watch(runtime, seed=seed)[0] for seed in range(3)]
    for seed, viewer in enumerate(viewers):
        assert near(viewer.video(), expected(pipe, seed=seed))
    # Launches that failed have cost their time, so on a busy machine the scheduler may stop to share them.
    assert 1 <= len(broken) == runtime.stats().failed_launches


def test_a_viewer_whose_callback_raises_ends_alone(runtime: Runtime, pipe: StreamPipeline) -> None:
    rude, good = Viewer(), Viewer()

    def raises(block: MadeBlock) -> None:
        raise BrokenPipeError("gone")

    request = StreamRequest(prompt=PROMPT, fps=FPS, steps=2, max_seconds=SECONDS, seed=3)
    runtime.open(request, on_block=raises, on_event=rude.on_event)
    runtime.open(request, on_block=good.on_block, on_event=good.on_event)
    assert near(good.video(), expected(pipe))
    assert rude.ended.wait(10) and rude.events[-1].kind == "ended"


def test_admission_names_what_is_short(pipe: StreamPipeline) -> None:
    runtime = Runtime(pipe, max_streams=2)
    with pytest.raises(UserError, match="warming up"):
        watch(runtime)
    runtime.start()
    lives = [watch(runtime, fps=4.0, max_seconds=None)[1] for _ in range(2)]
    with pytest.raises(Refused) as refused:
        watch(runtime, fps=4.0)
    assert refused.value.resource == "streams" and refused.value.retry_after_s > 0
    free, runtime.memory_bytes = runtime.memory_bytes, 1000
    lives[0].close()
    while runtime.stats().streams > 1:
        pass
    with pytest.raises(Refused, match="memory"):
        watch(runtime, fps=4.0)
    runtime.memory_bytes = free
    with pytest.raises(Refused, match="latency"):
        watch(runtime, fps=1e6, lead_s=0.0)
    assert runtime.stats().refused == {"streams": 1, "memory": 1, "latency": 1} and runtime.stats().admitted == 2
    runtime.close()


@pytest.mark.parametrize(
    ("ask", "complaint"),
    [
        (lambda live: live.prompt("qwxyz"), "qwxyz"),
        (lambda live: live.prompt(OTHER, "melt"), "there are: cut, recache"),
        (lambda live: live.prompt(OTHER, apply_at="yesterday"), "next_block, playhead"),
        (lambda live: live.prompt(OTHER, at_media_s=-1), "at least 0"),
        (lambda live: live.seek(float("nan")), "at least 0"),
        (lambda live: live.playhead(float("inf")), "must be a number"),
        (lambda live: live.steps(0), "1 to"),
    ],
)
def test_mistakes_are_answered_and_change_nothing(
    runtime: Runtime, pipe: StreamPipeline, ask: Callable[[LiveStream], object], complaint: str
) -> None:
    viewer, live = watch(runtime)
    with pytest.raises(UserError, match=complaint):
        ask(live)
    assert np.array_equal(viewer.video(), expected(pipe))


def test_a_state_taken_while_a_seek_waits_has_the_seek(pipe: StreamPipeline, runtime: Runtime) -> None:
    viewer, live = watch(runtime)

    def seek_and_save() -> object:
        live.seek(3 * BLOCK / FPS)
        return live.state_dict(), live.branch()

    viewer.when[7] = seek_and_save
    viewer.video()
    ((saved, branched),) = viewer.results
    assert (saved["position"], saved["shown_frames"]) == (3, 3 * BLOCK)
    assert branched["position"] <= 3


def test_the_first_block_has_the_steps_that_the_card_says(pipe: StreamPipeline) -> None:
    import dataclasses

    card = dataclasses.replace(pipe.scheduler, first_steps=4)
    other = StreamPipeline(
        transformer=pipe.transformer, codec=pipe.codec, text=pipe.text, geometry=pipe.geometry, scheduler=card
    )
    runtime = Runtime(other, admission=False)
    runtime.start()
    viewer, _ = watch(runtime, steps=None)
    video = viewer.video()
    runtime.close()
    assert [block.steps for block in viewer.blocks] == [4] + [2] * 9
    assert np.array_equal(video, np.concatenate([b.frames for b in other.stream(PROMPT, seed=3, max_blocks=10)]))


@pytest.mark.parametrize("block", [1, 2])
def test_a_recache_so_early_that_only_the_sink_is_there(tmp_path: Path, block: int) -> None:
    """A sink as long as the first block: nothing is re-encoded at block 1, and steps are chosen."""
    folder = save_tiny_model(tmp_path)
    card = folder / "scheduler" / "scheduler_config.json"
    card.write_text(card.read_text().replace('"sink_frames": 1', '"sink_frames": 3'))
    pipe = StreamPipeline.from_pretrained(folder, dtype="fp32")
    assert pipe.scheduler.sink_frames == 3
    runtime = Runtime(pipe, admission=False)
    runtime.start()
    viewer, live = watch(runtime, steps=None)
    live.prompt(OTHER, "recache", at_media_s=block * BLOCK / FPS)
    video = viewer.video()
    runtime.close()
    assert runtime.failure is None
    assert np.array_equal(video, expected(pipe, (block, OTHER, "recache")))


def test_a_branch_cannot_be_turned_back_before_its_own_beginning(runtime: Runtime, pipe: StreamPipeline) -> None:
    viewer, live = watch(runtime)
    viewer.when[5] = lambda: live.branch(4 * BLOCK / FPS)
    whole = viewer.video()
    (state,) = viewer.results
    start = state["shown_frames"]
    other = Viewer()
    other.frames = list(whole[:start])
    request = StreamRequest(prompt="", saved=state, fps=FPS, max_seconds=SECONDS, lead_s=100.0, start_s=100.0)
    branch = runtime.open(request, on_block=other.on_block, on_event=other.on_event)
    other.when[6] = lambda: branch.seek(0.0)
    other.when[8] = lambda: branch.prompt("a green square", "cut", apply_at="playhead")
    video = other.video()
    back, changed = other.results
    assert back.media_s == start / FPS and changed.block >= state["position"]
    assert np.array_equal(video, expected(pipe, (changed.block, "a green square", "cut")))
