"""Several blocks of one stream at once: the same video as the serial order under the same visibility."""

from pathlib import Path

import numpy as np
import pytest
import torch

from streamgen import StreamPipeline
from streamgen.errors import UserError
from streamgen.parallel.levels import LevelCaches, run_block
from streamgen.pipelined import DiagonalStream, RollingStream
from streamgen.rolling import RollingWindow, roll
from streamgen.rollout import StreamState
from streamgen.schedules import timeline
from streamgen.stream import Stream
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:the model was trained for visibility")
FIRST, OTHER = "a red star", "two blue rings over a snow background"
BLOCKS = 8


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StreamPipeline:
    return StreamPipeline.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tiny")), dtype="fp32")


def video(stream: Stream) -> np.ndarray:
    return np.concatenate([block.frames for block in stream])


def near(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1


@torch.no_grad()
def serial_same_level(pipe: StreamPipeline, steps: int, switch: tuple[int, str, str] | None) -> np.ndarray:
    levels = LevelCaches.make(lambda: pipe.new_cache("relative"), range(steps), pipe.geometry, (3,))
    stream = pipe.stream(FIRST, seed=3, steps=steps)  # for its texts, prompts and codec
    if switch:
        stream.prompt(switch[1], switch[2], at_block=switch[0])
    frames, codec = [], None
    for block in range(BLOCKS):
        cue = stream.timeline.at(block)
        text = stream._texts.context(stream.timeline, cue)
        latents = run_block(pipe.transformer, levels, text, pipe.sampling(steps), transition=cue.transition)
        stream.state.codec = codec
        made, codec = stream.decode(latents)
        frames.append(made)
    return np.concatenate(frames)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(
    "switch", [None, (4, OTHER, "cut"), (4, OTHER, "recache"), (4, OTHER, "scene"), (2, OTHER, "blend")]
)
def test_the_diagonal_is_the_serial_order_of_same_level(
    pipe: StreamPipeline, steps: int, switch: tuple[int, str, str] | None
) -> None:
    stream = pipe.stream(FIRST, seed=3, steps=steps, max_blocks=BLOCKS, visibility="same_level")
    if switch:
        stream.prompt(switch[1], switch[2], at_block=switch[0])
    assert near(video(stream), serial_same_level(pipe, steps, switch))


def test_visibilities_differ(pipe: StreamPipeline) -> None:
    """Or equality above would say nothing."""
    videos = [
        video(pipe.stream(FIRST, seed=3, steps=2, max_blocks=BLOCKS, visibility=v))
        for v in ("clean", "same_level", "joint")
    ]
    assert not near(videos[0], videos[1]) and not near(videos[0], videos[2]) and not near(videos[1], videos[2])


def test_the_launches_are_those_of_the_grids_schedule(pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamgen import pipelined
    from streamgen.grid import Grid

    stream = pipe.stream(FIRST, seed=3, steps=4, max_blocks=6, visibility="same_level")
    assert isinstance(stream, DiagonalStream)
    launches: list[set[tuple[int, int]]] = []
    real = pipelined.run_passes

    def noted(model: object, passes: list) -> list:
        launches.append({(block, flight.step) for block, flight in stream._flights.items()})
        return real(model, passes)

    monkeypatch.setattr(pipelined, "run_passes", noted)
    list(stream)
    grid = Grid(geometry=pipe.geometry, steps=((4,) * 12,), visibility="same_level", decodes=False)
    planned = [{(c.block, c.step) for c in timed.launch.cells} for timed in timeline("stream_batch", grid)]
    assert len(launches) == 9 and launches == planned[:9]


@torch.no_grad()
def test_rolling_is_the_rolling_rollout(pipe: StreamPipeline) -> None:
    state = StreamState(geometry=pipe.geometry, cache=pipe.new_cache("relative"), seeds=(3,))
    stream = pipe.stream(FIRST, seed=3, steps=2)
    text = stream._texts.context(stream.timeline, stream.timeline.at(0))
    window, frames, codec = RollingWindow(), [], None
    for launch in range(BLOCKS + 1):
        made = roll(pipe.transformer, state, window, lambda block: text, pipe.sampling(2))
        if launch:
            stream.state.codec = codec
            block, codec = stream.decode(made[launch - 1])
            frames.append(block)
    got = pipe.stream(FIRST, seed=3, steps=2, max_blocks=BLOCKS, visibility="joint")
    assert isinstance(got, RollingStream)
    assert np.array_equal(video(got), np.concatenate(frames))


@pytest.mark.parametrize("visibility", ["same_level", "joint"])
def test_saved_and_resumed_equals_uninterrupted(pipe: StreamPipeline, tmp_path: Path, visibility: str) -> None:
    def new() -> Stream:
        stream = pipe.stream(FIRST, seed=3, steps=2, max_blocks=BLOCKS, visibility=visibility)
        stream.prompt(OTHER, "recache", at_block=3)
        return stream

    expected = [block.frames for block in new()]
    for stop in (1, 3, 5):
        stream = new()
        before = [next(stream).frames for _ in range(stop)]
        stream.save_state(tmp_path / f"{stop}.safetensors")
        resumed = pipe.resume(tmp_path / f"{stop}.safetensors", max_blocks=BLOCKS)
        assert type(resumed) is type(stream) and resumed.made_blocks == stop
        got = before + [block.frames for block in resumed]
        assert len(got) == BLOCKS and all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("visibility", ["same_level", "joint"])
def test_a_short_video_is_the_beginning_of_a_longer_one(pipe: StreamPipeline, visibility: str) -> None:
    short, long = (
        video(pipe.stream(FIRST, seed=3, steps=2, max_blocks=blocks, visibility=visibility)) for blocks in (3, 6)
    )
    assert np.array_equal(short, long[: len(short)])


@pytest.mark.parametrize("visibility", ["same_level", "joint"])
def test_a_prompt_shows_at_the_block_of_its_receipt(pipe: StreamPipeline, visibility: str) -> None:
    stream = pipe.stream(
        FIRST, seed=3, steps=4 if visibility == "same_level" else 2, max_blocks=BLOCKS, visibility=visibility
    )
    before = [next(stream) for _ in range(2)]
    receipt = stream.prompt(OTHER, "cut")
    after = list(stream)
    depth = stream.steps - 1
    assert receipt.block == 2 + depth  # as many blocks are on their way
    versions = [block.prompt_version for block in before + after]
    assert versions == [0] * receipt.block + [1] * (BLOCKS - receipt.block)


def test_a_diagonal_launch_that_failed_is_run_again(pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamgen import pipelined

    expected = video(pipe.stream(FIRST, seed=3, steps=2, max_blocks=4, visibility="same_level"))
    real, count = pipelined.run_passes, [0]

    def every_other(model: object, passes: list) -> list:
        count[0] += 1
        outputs = real(model, passes)
        if count[0] % 2:
            raise RuntimeError("pulled the plug")
        return outputs

    monkeypatch.setattr(pipelined, "run_passes", every_other)
    stream, frames = pipe.stream(FIRST, seed=3, steps=2, max_blocks=4, visibility="same_level"), []
    while len(frames) < 4:
        try:
            frames.append(next(stream).frames)
        except RuntimeError:
            continue
    assert np.array_equal(np.concatenate(frames), expected)


def test_bad_wishes(pipe: StreamPipeline) -> None:
    with pytest.raises(UserError, match="there are: clean, same_level, joint"):
        pipe.stream(FIRST, visibility="psychic")
    with pytest.raises(UserError, match="equal steps"):
        pipe.stream(FIRST, steps=2, first_steps=4, visibility="same_level")
    with pytest.raises(UserError, match="cannot cut to a new scene"):
        pipe.stream(FIRST, steps=2, visibility="joint").prompt(OTHER, "scene")
    with pytest.raises(UserError, match="does not fit a window"):
        pipe.stream(FIRST, steps=4, visibility="joint")


@pytest.mark.parametrize("visibility", ["same_level", "joint"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_codec_that_fails_loses_no_block(
    pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch, visibility: str, saved: bool
) -> None:
    whole = video(pipe.stream(FIRST, seed=3, steps=2, max_blocks=4, visibility=visibility))
    stream = pipe.stream(FIRST, seed=3, steps=2, max_blocks=4, visibility=visibility)
    frames = [next(stream).frames]
    with monkeypatch.context() as broken:
        broken.setattr(pipe.codec, "decode_stream", None)
        with pytest.raises(TypeError):
            next(stream)
    if saved:
        stream = pipe.resume(stream.state_dict(), max_blocks=4)
    frames += [block.frames for block in stream]
    assert np.array_equal(np.concatenate(frames), whole)
