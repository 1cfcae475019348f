"""Recorded passes through their buffers: the same stream to the bit, with a recorder that runs the pass again.

What a graph adds, tests/gpu/test_capture.py sees on a GPU. Here is what it relies on: that nothing which changes from
pass to pass is read from anywhere but the buffers.
"""

import gc
import logging
from dataclasses import replace

import pytest
import torch

from streamgen import ops
from streamgen.cache import KVCache, QuantisedKVCache
from streamgen.capture import Captures
from streamgen.rollout import Sampling, StreamState, rollout_block
from tests.kernels import test_streams
from tests.kernels.test_streams import GEOMETRY, make_model, make_text

SPEC = replace(test_streams.SPEC, window_frames=4)  # full from the second block on; the third begins at another slot
SAMPLING = Sampling(sigmas=(1.0,))


def run(model, cache):
    return test_streams.run(model, cache, recache_at=None, blocks=3, sampling=SAMPLING)


def again(run):
    """What is read from Python objects here would be frozen in a graph: the function is called once to say so."""
    run()
    return run


@pytest.mark.parametrize(("policy", "storage"), [("window", None), ("relative", None), ("window", "fp8")])
def test_through_buffers_to_the_bit(device, policy, storage):
    model = make_model(device)
    model.ops = ops.select("triton")
    spec, found = replace(SPEC, policy=policy), []
    for captures in (None, Captures(again)):
        model.captures = captures
        cache = KVCache(spec, device=device) if storage is None else QuantisedKVCache(spec, storage=storage)
        found.append(run(model, cache))
    assert captures is not None and captures.problem == ""
    assert captures.replays == 3  # two blocks see a full ring, in 2 passes each; the first is not recorded
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)
    for name in ("k", "v"):
        assert torch.equal(found[0][1][name].float(), found[1][1][name].float())


@torch.no_grad()
def test_another_prompt_and_another_stream(device):
    """New text reaches the buffers; each cache has launches of its own, which go with it."""
    model = make_model(device)
    model.ops = ops.select("triton")
    texts = [make_text(model), model.encode_text(torch.ones(1, 1, 5, 10))]

    def last_blocks() -> list[torch.Tensor]:
        states = [StreamState(geometry=GEOMETRY, cache=KVCache(SPEC), seeds=(seed,)) for seed in (1, 2)]
        made = []
        for block in range(3):
            for state in states:
                made.append(rollout_block(model, state, texts[block == 2], SAMPLING))
        return made[-2:]

    wanted = last_blocks()
    model.captures = Captures(again)
    for one, other in zip(last_blocks(), wanted, strict=True):
        assert torch.equal(one, other)
    assert model.captures.replays == 6
    gc.collect()
    assert len(model.captures._launches) == 0


@torch.no_grad()
def test_a_recording_that_fails_is_said_once(device, caplog):
    model = make_model(device)
    model.ops = ops.select("triton")
    wanted, _ = run(model, KVCache(SPEC))

    def fails(run):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    model.captures = Captures(fails)
    got, _ = run(model, KVCache(SPEC))
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "recording one failed: operation not permitted when stream is capturing" in record.message


def test_plain_operations_and_short_rings_are_not_recorded(device):
    model = make_model(device)
    model.captures = Captures(again)
    run(model, KVCache(SPEC))  # the reference table reads slots on the host
    model.ops = ops.select("triton")
    with torch.no_grad():
        state = StreamState(geometry=GEOMETRY, cache=KVCache(replace(SPEC, window_frames=5)), seeds=(1,))
        for _ in range(2):
            rollout_block(model, state, make_text(model), SAMPLING)
    assert model.captures.replays == 0
