"""What goes wrong between the runtime's thread and those who ask: each test was a defect once."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from streamgen import StreamPipeline
from streamgen.errors import UserError
from streamgen_infer.live_stream import LiveStream
from streamgen_infer.requests import Refused, StreamRequest
from streamgen_infer.runtime import Runtime
from tests.tiny_model import save_tiny_model
from tests.unit.test_runtime import BLOCK, FPS, OTHER, PROMPT, SECONDS, Viewer, expected, watch


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StreamPipeline:
    return StreamPipeline.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tiny")), dtype="fp32")


@pytest.fixture
def runtime(pipe: StreamPipeline) -> Iterator[Runtime]:
    runtime = Runtime(pipe, admission=False)
    runtime.start()
    yield runtime
    runtime.close()
    assert runtime.failure is None


def test_a_block_that_ends_in_a_pause_has_a_deadline(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer, live = watch(runtime)
    forward = runtime.engine.forward

    def pauses(works: Any, *meanwhile: Any) -> Any:
        if live.stream.state.position == 3 and not viewer.blocks[3:]:
            live.pause()
        return forward(works, *meanwhile)

    monkeypatch.setattr(runtime.engine, "forward", pauses)
    assert not viewer.ended.wait(0.3)
    last = viewer.blocks[-1]
    assert last.index == 3 and np.isfinite([last.due_at_s, last.slack_s]).all()
    live.play()
    viewer.video()


def test_recache_where_all_that_is_held_is_a_protected_sink(tmp_path: Any) -> None:
    import dataclasses

    base = StreamPipeline.from_pretrained(save_tiny_model(tmp_path), dtype="fp32")
    pipe = StreamPipeline(
        transformer=base.transformer,
        codec=base.codec,
        text=base.text,
        geometry=base.geometry,
        scheduler=dataclasses.replace(base.scheduler, sink_frames=3),
    )
    runtime = Runtime(pipe, admission=False)
    runtime.start()
    viewer, live = watch(runtime)
    viewer.when[0] = lambda: live.seek(0.0)
    live.prompt(OTHER, at_media_s=BLOCK / FPS) if not viewer.blocks else None
    video = viewer.video()
    runtime.close()
    assert runtime.failure is None
    assert np.array_equal(video, expected(pipe, (1, OTHER, "recache")))


def resumed(runtime: Runtime, state: dict[str, Any], **options: Any) -> tuple[Viewer, LiveStream]:
    viewer = Viewer()
    viewer.frames = [np.zeros(0)] * int(state["shown_frames"])
    request = StreamRequest(prompt="", saved=state, fps=FPS, steps=2, **{"max_seconds": SECONDS, **options})
    return viewer, runtime.open(request, on_block=viewer.on_block, on_event=viewer.on_event)


@pytest.fixture
def state(runtime: Runtime) -> dict[str, Any]:
    viewer, live = watch(runtime)
    viewer.when[4] = live.state_dict
    viewer.video()
    return viewer.results[0]  # type: ignore[return-value]


def test_a_resumed_stream_can_be_sought_back_to_where_it_began(runtime: Runtime, state: dict[str, Any]) -> None:
    viewer, live = resumed(runtime, state)
    viewer.when[7] = lambda: live.seek(0.0)
    viewer.ended.wait(30)
    receipt: Any = viewer.results[0]
    assert receipt.block <= 5 and receipt.media_s == receipt.block * BLOCK / FPS


def test_a_prompt_at_the_playhead_just_after_a_resume(runtime: Runtime, state: dict[str, Any]) -> None:
    viewer, live = resumed(runtime, state, start_s=100.0)
    receipt = live.prompt(OTHER, apply_at="playhead")
    assert receipt.block >= state["position"]
    assert viewer.ended.wait(30)


def test_a_prompt_at_the_playhead_just_after_a_seek_holds_where_the_viewer_went(runtime: Runtime) -> None:
    viewer, live = watch(runtime, start_s=5 * BLOCK / FPS)

    def go() -> Any:
        live.seek(6 * BLOCK / FPS)
        return live.prompt(OTHER, apply_at="playhead")

    viewer.when[8] = go
    viewer.video()
    receipt: Any = viewer.results[0]
    assert receipt.block == 6


def test_two_turns_at_once_leave_no_picture_of_a_past_that_was_changed(runtime: Runtime, pipe: StreamPipeline) -> None:
    viewer, live = watch(runtime)

    def go() -> Any:
        live.seek(2 * BLOCK / FPS)
        live.prompt(OTHER, "recache")
        return live.seek(6 * BLOCK / FPS)

    viewer.when[8] = go
    video = viewer.video()
    assert np.array_equal(video, expected(pipe, (2, OTHER, "recache")))


@pytest.mark.parametrize("waits", [True, False])
def test_prompts_after_a_seek_do_not_depend_on_whether_it_was_carried_out(
    runtime: Runtime, pipe: StreamPipeline, waits: bool
) -> None:
    """The prompt that was made at block 4 stays in both cases."""
    viewer, live = watch(runtime)
    live.prompt("a green square", "cut", at_media_s=7 * BLOCK / FPS)

    def change() -> Any:
        return live.prompt(OTHER, "cut", at_media_s=4 * BLOCK / FPS)

    def back() -> Any:
        live.seek(1 * BLOCK / FPS)
        viewer.when[1] = (lambda: None) if waits else change
        return change() if waits else None

    viewer.when[8] = back
    video = viewer.video()
    assert np.array_equal(video, expected(pipe, (4, OTHER, "cut"), (7, "a green square", "cut")))


def test_a_block_whose_text_cannot_be_encoded_ends_its_own_stream(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, _ = watch(runtime)
    bad, live = watch(runtime, seed=1, max_seconds=None)

    def breaks(*_: Any) -> Any:
        raise MemoryError("text")

    monkeypatch.setattr(live.stream._texts, "context", breaks)
    live.prompt(OTHER)
    good.video()
    assert bad.ended.wait(10) and bad.events[-1].kind == "failed"


@pytest.mark.parametrize(
    "harm",
    [
        {"timeline": [{"block": 0, "prompt": "qwxyz"}]},
        {"timeline": [{"block": 5, "prompt": "a red star"}]},
        {"timeline": [{"block": 0, "prompt": "a red star", "blend_blocks": 0}]},
        {"timeline": [{"block": 0, "prompt": 7}]},
        {"timeline": []},
        {"timeline": [{"block": 0, "prompt": "a red star", "transition": "melt"}]},
        {"shown_frames": 3.5},
        {"shown_frames": -1},
        {"position": 2.5},
        {"position": -3},
        {"seeds": [2**64]},
        {"visibility": "joint", "flights": {}, "launch": 0, "finished": 0},
    ],
)
def test_a_state_that_is_not_whole_is_refused_and_harms_nobody(
    runtime: Runtime, pipe: StreamPipeline, state: dict[str, Any], harm: dict[str, Any]
) -> None:
    with pytest.raises(UserError):
        resumed(runtime, {**state, **harm})
    assert runtime.failure is None


def test_a_state_never_holds_a_block_that_was_not_given_out(runtime: Runtime) -> None:
    taken: list[tuple[dict[str, Any], int]] = []
    viewer = Viewer()
    threads: list[threading.Thread] = []

    def slow(block: Any) -> None:
        if block.index == 3:
            thread = threading.Thread(target=lambda: taken.append((live.state_dict(), len(viewer.frames))))
            thread.start()
            thread.join(0.2)
            threads.append(thread)
        viewer.on_block(block)

    request = StreamRequest(prompt=PROMPT, fps=FPS, steps=2, max_seconds=SECONDS, seed=3)
    live = runtime.open(request, on_block=slow, on_event=viewer.on_event)
    viewer.video()
    threads[0].join()
    ((saved, given),) = taken
    assert saved["shown_frames"] <= given


def test_prompts_for_one_block_replace_each_other(runtime: Runtime) -> None:
    viewer, live = watch(runtime, max_seconds=None, paused=True)
    for _ in range(50):
        live.prompt(OTHER, at_media_s=100.0)
    assert len(live.stream.timeline.prompts) == 2
    live.prompt(PROMPT, at_media_s=200.0)
    assert [entry.version for entry in live.stream.timeline.prompts] == [0, 50, 51]
    assert not viewer.blocks, "it was opened in a pause"


def test_what_is_said_of_prompts_does_not_pile_up(runtime: Runtime, recwarn: pytest.WarningsRecorder) -> None:
    _, live = watch(runtime, max_seconds=None, paused=True)
    for number in range(200):
        receipt = live.prompt(f"a red star zqx{'abcdefghij'[number % 10]}{number}")
        assert len(receipt.warnings) == 1
    assert len(live.warnings) <= 64 and not recwarn.list


def test_a_prompt_past_the_end_is_refused(runtime: Runtime) -> None:
    viewer, live = watch(runtime, paused=True)
    with pytest.raises(UserError, match="has 10 blocks"):
        live.prompt(OTHER, at_media_s=10 * BLOCK / FPS)
    live.play()
    viewer.video()


def test_admission_counts_the_steps_that_were_asked_for_later(pipe: StreamPipeline) -> None:
    runtime = Runtime(pipe)
    runtime.start()
    _, live = watch(runtime, fps=1.0, max_seconds=None, steps=2)
    with pytest.warns(UserWarning, match="not 1000"):
        live.steps(1000)
    runtime.costs.give("forward", "3 latent frames", 1, 0.05)
    with pytest.raises(Refused, match="time"):
        watch(runtime, fps=1.0, steps=2)
    runtime.close()


@pytest.mark.parametrize("lead_s", [0.75, 6.0])
def test_a_stream_holds_no_more_than_admission_counted(pipe: StreamPipeline, lead_s: float) -> None:
    runtime = Runtime(pipe, admission=False, checkpoint_bytes=0)
    runtime.start()
    viewer, live = watch(runtime, fps=16.0, max_seconds=12.0, lead_s=lead_s, start_s=0.0)
    promised = runtime.sizes.load(live.request, live.stream, live).bytes
    live.clock.origin_s -= 1000.0
    viewer.video()
    held = live.stream.state.cache.nbytes() + live.checkpoints.nbytes()
    runtime.close()
    assert held <= promised


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first_block_frames": 1}, "began with an image as a block of its own.*streamgen stream --resume"),
        ({"height": 64, "width": 48}, "another geometry than this model .height 64 instead of 32, width 48 instead"),
        ({"patch": [1, 1, 1]}, "patch .1, 1, 1. instead of .1, 2, 2."),
    ],
)
def test_a_state_of_another_geometry_is_refused(
    runtime: Runtime, state: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        resumed(runtime, {**state, "geometry": {**state["geometry"], **change}})
    assert runtime.stats().streams == 0


def test_a_state_with_other_adapters_is_refused_before_it_touches_the_weights(
    runtime: Runtime, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live streams share the model's weights: resuming one with its own would change them for all."""
    viewer, _ = watch(runtime)
    monkeypatch.setattr(type(runtime.pipe), "resume", lambda *given, **named: pytest.fail("it was resumed"))
    own = {"files": {"ink": "0" * 24}, "changes": [[0, {"ink": 1.0}, None]]}
    with pytest.raises(UserError, match=r"other LoRA files \(ink\) than the model here \(none\)"):
        resumed(runtime, {**state, "adapters": own})
    later = {"files": {"ink": "0" * 24}, "changes": [[0, {}, None], [4, {"ink": 0.5}, "recache"]]}
    with pytest.raises(UserError, match=r"other LoRA files \(ink\)"):
        resumed(runtime, {**state, "adapters": later})
    runtime.pipe.loras["oil"] = 0.5
    try:
        with pytest.raises(UserError, match=r"other LoRA files \(none\) than the model here \(oil\)"):
            resumed(runtime, state)
    finally:
        del runtime.pipe.loras["oil"]
    viewer.video()
