"""Two replicas as Ray actors behind the frame server: what a viewer sees when one is drained and one is killed."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streamgen_infer.serve.command import build_runtime
from streamgen_infer.serve.fleet import Fleet
from streamgen_infer.serve.options import Options
from streamgen_infer.serve.ray_engine import ray_engine
from tests.server.fleet_harness import PROMPT, alone
from tests.server.harness import Talk, serving, wait_for
from tests.tiny_model import save_tiny_model

pytest.importorskip("ray", reason="ray is not installed: pip install 'streamgen[ray]'")
SIDE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def fleet(model: Path) -> Iterator[Fleet]:
    options = Options(model=str(model), dtype="fp32", threads=1, admission=False, max_streams=4)
    fleet = ray_engine(functools.partial(build_runtime, options), 2, state_every_s=0.1)
    yield fleet
    fleet.close()


def check(talk: Talk, model: Path, seed: int) -> None:
    """Every frame once, in order, as the pipeline makes them."""
    assert talk.numbers() == list(range(len(talk.frames)))
    shown = np.stack([np.frombuffer(payload, np.uint8).reshape(SIDE, SIDE, 3) for _, payload in talk.frames])
    np.testing.assert_array_equal(shown, alone(model, seed, len(shown)))


def on(fleet: Fleet) -> dict[str, int]:
    return {one.name: one.streams for one in fleet.replicas()}


@pytest.mark.slow
def test_viewers_see_one_video_over_a_kill_and_a_drain(fleet: Fleet, model: Path, tmp_path: Path) -> None:
    with serving(lambda: fleet, tmp_path, ready_s=120.0) as running, Talk(running) as ann, Talk(running) as bob:
        for seed, talk in enumerate((ann, bob)):
            talk.start(prompt=PROMPT, seed=seed, steps=2, drop="stall")
        assert on(fleet) == {"r0": 1, "r1": 1}
        for seed, talk in enumerate((ann, bob)):
            talk.until_frame(30)
            check(talk, model, seed)
        bob.ask({"type": "session.stop"})  # two streams of a replica share a forward, which is not the same to the bit
        wait_for(lambda: on(fleet) == {"r0": 1, "r1": 0})
        os.kill(fleet.process_of("r0"), signal.SIGKILL)
        wait_for(lambda: on(fleet).get("r1") == 1)
        ann.until_frame(ann.frames[-1][0].frame + 40)
        wait_for(lambda: on(fleet).get("r2") == 0, 60), "another was started"
        assert fleet.drain("r1", replace=False)
        assert on(fleet) == {"r2": 1}
        ann.until_frame(ann.frames[-1][0].frame + 40)
        check(ann, model, 0)
