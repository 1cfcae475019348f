"""One stream over several processes (gloo): the video of the serial order, to the bit, whatever happens to them."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from streamgen.errors import UserError
from streamgen.parallel.job import Job
from streamgen.parallel.measure import measure_pipeline
from streamgen.parallel.piped import PipedBlock, Watch
from streamgen.parallel.processes import ProcessError
from streamgen.parallel.supervise import PipedStream
from streamgen.pipeline import StreamPipeline
from tests.distributed.pipelines import RING, STAR, STEPS, join_and_run, save_model, serial, timeline_of

CHAIN, LAYERS = "step_chain", "layer_ring"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StreamPipeline:
    return StreamPipeline.from_pretrained(save_model(tmp_path_factory.mktemp("model")), dtype="fp32")


def job_of(pipe: StreamPipeline, split: str = CHAIN, ranks: int = 2, codec: str = "shared", **changes: object) -> Job:
    values = {"model": str(pipe.folder), "split": split, "ranks": ranks, "codec": codec, "seed": 3, "steps": STEPS}
    return Job(**{**values, **changes})  # type: ignore[arg-type]


def assert_serial(pipe: StreamPipeline, stream: PipedStream, made: list[PipedBlock]) -> None:
    """Latents and frames are those of one process, for the prompts that the stream was given."""
    expected = serial(pipe, stream.timeline, len(made))
    assert [block.index for block in made] == list(range(len(made)))
    for block, (latents, frames) in zip(made, expected, strict=True):
        assert torch.equal(block.latents, latents), f"block {block.index}"
        assert torch.equal(torch.from_numpy(block.frames), frames), f"block {block.index}"
        assert block.prompt == stream.timeline.at(block.index).prompt


@pytest.mark.parametrize(
    ("split", "ranks", "codec"),
    [
        (CHAIN, 1, "shared"),
        (CHAIN, 2, "shared"),
        (CHAIN, 4, "shared"),
        (CHAIN, 4, "own"),
        (LAYERS, 1, "shared"),
        (LAYERS, 2, "shared"),
        (LAYERS, 4, "shared"),
        (LAYERS, 3, "own"),
    ],
)
def test_any_number_of_ranks_makes_the_serial_video(pipe: StreamPipeline, split: str, ranks: int, codec: str) -> None:
    """With a prompt of every transition given on the way, while blocks are in flight."""
    made = []
    with PipedStream(pipe, STAR, job_of(pipe, split, ranks, codec), max_blocks=16) as stream:
        for block in stream:
            made.append(block)
            if block.index == 0:
                first = stream.prompt(RING, "recache").block
                for later, prompt, transition in [(1, STAR, "cut"), (2, RING, "blend"), (4, STAR, "scene")]:
                    stream.prompt(prompt, transition, at_block=first + later, blend_blocks=2)
                stream.prompt(RING, "recache", at_block=first + 6)
    assert 0 < first < first + 6 < len(made) == 16
    assert_serial(pipe, stream, made)
    assert not stream.losses


@pytest.mark.parametrize("split", [CHAIN, LAYERS])
def test_ranks_killed_at_random_moments(pipe: StreamPipeline, split: str) -> None:
    """Every time the stream goes on where it was, past windows that the new ranks have never seen."""
    made, rng, ended = [], random.Random(split), threading.Event()
    with PipedStream(pipe, STAR, job_of(pipe, split), max_blocks=28) as stream:
        for block, prompt, transition in [(9, RING, "recache"), (15, STAR, "scene"), (22, RING, "cut")]:
            stream.prompt(prompt, transition, at_block=block)

        def kill() -> None:
            for count in range(2):
                if ended.wait(rng.uniform(0.0, 0.6)):
                    return
                with suppress(ProcessLookupError):  # the ranks may have done all, while the reader is slow
                    os.kill(stream.pids[rng.randrange(2)], signal.SIGKILL)
                while len(stream.losses) <= count and not ended.wait(0.01):
                    pass

        killer = threading.Thread(target=kill)
        killer.start()
        for block in stream:
            made.append(block)
            ended.wait(0.02)
        ended.set()
        killer.join()
    assert stream.losses
    assert all(loss.reason == "killed by signal 9" and loss.rank in (0, 1) for loss in stream.losses)
    assert_serial(pipe, stream, made)


@pytest.mark.parametrize("split", [CHAIN, LAYERS])
def test_killed_late_and_all_at_once(pipe: StreamPipeline, split: str) -> None:
    """After more blocks than the journal keeps, so that the caches are built from a sink and a part of the past."""
    made = []
    with PipedStream(pipe, STAR, job_of(pipe, split, 3, "own"), max_blocks=20) as stream:
        for block in stream:
            made.append(block)
            if block.index == 16:
                for pid in stream.pids:
                    os.kill(pid, signal.SIGKILL)
    assert len(stream.losses) == 1
    assert stream.losses[0].block >= 17
    assert_serial(pipe, stream, made)


def test_a_hung_rank_is_found_by_its_silence(pipe: StreamPipeline) -> None:
    made = []
    with PipedStream(pipe, STAR, job_of(pipe), max_blocks=12, watch=Watch(lost_after_s=2.0)) as stream:
        for block in stream:
            made.append(block)
            if block.index == 3:
                os.kill(stream.pids[1], signal.SIGSTOP)
    (loss,) = stream.losses
    assert (loss.rank, loss.reason.startswith("no heartbeat for")) == (1, True)
    assert loss.gap_s > loss.silent_s > 2.0
    assert_serial(pipe, stream, made)


def test_ranks_that_live_and_do_nothing_are_lost_too(pipe: StreamPipeline) -> None:
    """Heartbeats alone do not count; and who is lost again and again without a block between is given up."""
    with (
        PipedStream(pipe, STAR, job_of(pipe), watch=Watch(stalled_after_s=1e-9)) as stream,
        pytest.raises(ProcessError, match=r"lost 4 times without a block between; .*nothing got done"),
    ):
        next(stream)


def test_layers_move_while_cells_go_round(pipe: StreamPipeline) -> None:
    made = []
    moves = {2: (0, 1, 4), 6: (0, 3, 4), 9: (0, 2, 4), 14: (0, 1, 4)}
    with PipedStream(pipe, STAR, job_of(pipe, LAYERS, rebalance=False), max_blocks=20) as stream:
        stream.prompt(RING, "recache", at_block=8)
        for block in stream:
            made.append(block)
            if block.index in moves:
                stream.set_layers(moves[block.index])
            if block.index == 11:
                os.kill(stream.pids[0], signal.SIGKILL)
        for wrong in ((0, 4), (0, 4, 4), (0, 2, 3), (1, 2, 4)):
            with pytest.raises(UserError, match=r"bounds"):
                stream.set_layers(wrong)
    assert stream.bounds == moves[14]
    assert len(stream.losses) == 1
    assert_serial(pipe, stream, made)


def test_layers_move_among_three_ranks(pipe: StreamPipeline) -> None:
    """A middle rank gives to one side what it gets from the other."""
    made = []
    with PipedStream(pipe, STAR, job_of(pipe, LAYERS, 3, rebalance=False), max_blocks=10) as stream:
        for block in stream:
            made.append(block)
            if block.index in (1, 4):
                stream.set_layers((0, 1, 2, 4) if block.index == 1 else (0, 2, 3, 4))
    assert_serial(pipe, stream, made)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(("split", "codec"), [(CHAIN, "shared"), (LAYERS, "own")])
def test_processes_of_torchrun(pipe: StreamPipeline, tmp_path: Path, split: str, codec: str) -> None:
    context = multiprocessing.get_context("forkserver")
    job = job_of(pipe, split, 3, codec)
    prompts = [(2, RING, "recache"), (5, STAR, "blend")]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    out = tmp_path / "made.pt"
    ranks = [
        context.Process(target=join_and_run, args=({**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, job, prompts, out))
        for r in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    expected = serial(pipe, timeline_of(*prompts), 8)
    made = torch.load(out)
    assert len(made) == 8
    for ours, theirs in zip(made, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_closing_early_leaves_no_process(pipe: StreamPipeline) -> None:
    with PipedStream(pipe, STAR, job_of(pipe)) as stream:
        next(stream)
        pids = stream.pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    stream._state.ready.clear()
    with pytest.raises(StopIteration):
        next(stream)


def test_measured(pipe: StreamPipeline) -> None:
    (one,) = measure_pipeline(pipe, CHAIN, [2], blocks=2, warmup_blocks=1, codec="own", steps=1)
    assert (one.split, one.ranks, one.codec, one.blocks, len(one.cpu_ms)) == (CHAIN, 2, "own", 2, 2)
    assert one.fps * one.period_ms == pytest.approx(1000 * pipe.geometry.block_pixel_frames(1))
    assert one.first_block_s > 0
    with pytest.raises(UserError, match="blocks is 0 and warmup_blocks 12; both must be at least 1"):
        measure_pipeline(pipe, CHAIN, blocks=0)


# Mistakes.


@pytest.mark.parametrize(
    ("split", "ranks", "codec", "changes", "message"),
    [
        (CHAIN, 5, "shared", {}, "step_chain over 5 ranks: the model has 4 steps, so take at most 4"),
        (CHAIN, 6, "own", {}, "step_chain over 5 ranks: the model has 4 steps, so take at most 4"),
        (LAYERS, 5, "shared", {}, "layer_ring over 5 ranks: the model has 4 layers, so take at most 4"),
        (CHAIN, 0, "shared", {}, "ranks is 0; it must be at least 1"),
        (CHAIN, 1, "own", {}, "take at least 2 ranks"),
        (CHAIN, 2, "shared", {"outstanding": 0}, "outstanding is 0; it must be at least 1"),
        (CHAIN, 2, "shared", {"steps": 0}, "steps is 0; it must be 1 to 1000"),
        (CHAIN, 2, "shared", {"seed": -1}, "seed is -1"),
        (CHAIN, 2, "shared", {"cache": "none"}, "none"),
        (CHAIN, 2, "shared", {"devices": ("cpu", "cuda:0")}, "must be of one kind"),
    ],
)
def test_refused(
    pipe: StreamPipeline, split: str, ranks: int, codec: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        PipedStream(pipe, STAR, job_of(pipe, split, ranks, codec, **changes))


def test_a_model_without_same_level_visibility_is_refused_unless_forced(pipe: StreamPipeline, tmp_path: Path) -> None:
    clean = StreamPipeline.from_pretrained(pipe.folder.parent / "two", dtype="fp32")  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"needs a model trained for same_level visibility; the card lists clean"):
        PipedStream(clean, STAR, job_of(clean))
    with PipedStream(clean, STAR, job_of(clean, force=True), max_blocks=3) as stream:
        assert_serial(clean, stream, list(stream))


def test_a_mistake_in_a_rank_is_the_users_and_not_a_loss(pipe: StreamPipeline, tmp_path: Path) -> None:
    with (
        PipedStream(pipe, STAR, job_of(pipe, model=str(tmp_path / "absent"))) as stream,
        pytest.raises(UserError, match="absent"),
    ):
        next(stream)
    assert not stream.losses


def test_the_command_line_spreads_a_stream_over_ranks(tmp_path: Path) -> None:
    """`streamgen stream --ranks 2` makes the video of one device under the same visibility."""
    import json

    import numpy as np

    from tests.command_line import RING, STAR, stream_command, y4m_frames
    from tests.tiny_model import save_tiny_model

    run = stream_command(str(save_tiny_model(tmp_path / "tiny")))
    common = ("--switch", f"1.5={RING}", "--force", "-q", "--seed", "5")
    one, two = tmp_path / "one.y4m", tmp_path / "two.y4m"
    assert run(STAR, "--schedule", "stream_batch", *common, seconds="4", out=str(one)) == 0
    report = tmp_path / "r.json"
    ranks = ("--schedule", "layer_ring", "--ranks", "2", "--report", str(report))
    assert run(STAR, *ranks, *common, seconds="4", out=str(two)) == 0
    for a, b in zip(y4m_frames(one), y4m_frames(two), strict=True):  # launches hold other numbers of rows: rounding
        assert np.abs(np.frombuffer(a, np.uint8).astype(int) - np.frombuffer(b, np.uint8)).max() <= 2
    values = json.loads(report.read_text())
    assert (values["schedule"], values["ranks"], values["losses"]) == ("layer_ring", 2, [])
    assert run(STAR, "--schedule", "rolling", "--ranks", "2", *common, out=str(tmp_path / "c.y4m")) == 2
