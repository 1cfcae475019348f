"""Training in two processes (gloo): the same step as in one, checkpoints across, one end for all."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from streamgen_train import checkpoint
from streamgen_train.logs import read_jsonl
from tests.distributed import scenarios
from tests.runs import curve
from tests.tiny_sprites import save_codec

REPOSITORY = Path(__file__).resolve().parents[2]


def start_pair(script: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """Two processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios, run by one pair of processes; and the same runs in this process."""
    folder = tmp_path_factory.mktemp("processes")
    save_codec(folder / "codec")
    scenarios.towers(folder / "one", "none")
    scenarios.towers(folder / "half", "none", max_steps=3)
    scenarios.towers(folder / "one_bf16", "none", precision="bf16")
    scenarios.ar(folder / "ar_one", "none")
    scenarios.towers(folder / "lora_one", "none", **scenarios.LORA)
    scenarios.towers(folder / "lora_half", "none", max_steps=3, **scenarios.LORA)
    pair = start_pair(Path(scenarios.__file__), str(folder), *scenarios.SCENARIOS)
    for process in pair:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, out + error
    return folder


def results(ran: Path, name: str) -> list[Any]:
    """What a scenario returned in each process."""
    found = [torch.load(ran / f"{name}.{rank}.pt", weights_only=True) for rank in range(2)]
    for result in found:
        assert "error" not in result, result["error"]
    return [result["result"] for result in found]


def assert_same_run(run: Path, reference: Path, tolerance: float = 2e-6, from_step: int = 0) -> None:
    """Rows of the log and everything in the last checkpoint, to rounding."""
    rows, expected = curve(run), [row for row in curve(reference) if row["step"] > from_step]
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert row.pop("kind") == wanted.pop("kind")
        assert row == pytest.approx(wanted, rel=100 * tolerance, abs=tolerance)
    ours, theirs = (checkpoint.load(checkpoint.find(folder)) for folder in (run, reference))
    assert_close_states({k: ours[k] for k in theirs if k in PARTS}, {k: theirs[k] for k in PARTS}, tolerance)


PARTS = ("step", "modules", "ema", "optim", "objective")


def assert_close_states(a: Any, b: Any, tolerance: float, path: str = "") -> None:
    if isinstance(b, Mapping):
        assert a.keys() == b.keys(), path
        for key in b:
            assert_close_states(a[key], b[key], tolerance, f"{path}.{key}")
    elif isinstance(b, Tensor):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=50 * tolerance, atol=tolerance, msg=lambda text: f"{path}: {text}")
    else:
        assert a == b, path


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_make_the_steps_of_one(ran: Path, sharding: str) -> None:
    """Two players with AdamW and Muon, EMA, clipping, four microbatches, and streams that live on."""
    results(ran, sharding)
    assert_same_run(ran / sharding, ran / "one")
    assert checkpoint.load(checkpoint.find(ran / sharding))["processes"] == 2


@pytest.mark.parametrize("run", ["ar_ddp", "ar_fsdp2", "ar_recomputed"])
def test_two_processes_train_the_transformer_as_one(ran: Path, run: str) -> None:
    """Also with a layer in shards that is recomputed in the backward."""
    results(ran, run)
    assert_same_run(ran / run, ran / "ar_one", tolerance=1e-5)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_bf16_in_two_processes_is_bf16_in_one(ran: Path, sharding: str) -> None:
    """The same rounding of weights and activations; gradients are rounded once more where they meet."""
    results(ran, f"{sharding}_bf16")
    runs = [checkpoint.load(checkpoint.find(ran / name)) for name in (f"{sharding}_bf16", "one_bf16")]
    for name, tensor in runs[1]["ema"]["shadow"].items():
        torch.testing.assert_close(runs[0]["ema"]["shadow"][name], tensor, rtol=0, atol=6e-3)
    assert all(tensor.dtype == torch.float32 for tensor in runs[0]["ema"]["shadow"].values())


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_checkpoints_of_one_process_go_on_in_two(ran: Path, sharding: str) -> None:
    results(ran, f"one_to_{sharding}")
    assert_same_run(ran / f"one_to_{sharding}", ran / "one", from_step=3)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_checkpoints_of_two_processes_go_on_in_one(ran: Path, tmp_path: Path, sharding: str) -> None:
    results(ran, f"half_{sharding}")
    scenarios.towers(tmp_path, "none", str(ran / f"half_{sharding}"), seed=7)
    assert_same_run(tmp_path, ran / "one", from_step=3)


def test_checkpoints_go_on_in_another_sharding(ran: Path) -> None:
    results(ran, "ddp_to_fsdp2")
    assert_same_run(ran / "ddp_to_fsdp2", ran / "one", from_step=3)


@pytest.mark.parametrize("name", ["lora_ddp", "lora_fsdp2", "lora_across"])
def test_adapters_in_two_processes(ran: Path, name: str) -> None:
    """Learn as in one, merge to the same weights, and go on in another sharding."""
    results(ran, name)
    assert_same_run(ran / name, ran / "lora_one", from_step=3 if name == "lora_across" else 0)
    ours, theirs = (checkpoint.load_modules(ran / run) for run in (name, "lora_one"))
    assert_close_states(ours, theirs, 2e-6)


def test_every_number_is_written_once(ran: Path) -> None:
    """By both processes, whether in shards or whole in both."""
    for name in ("half_ddp", "half_fsdp2"):
        folder = checkpoint.find(ran / name)
        assert len(list(folder.glob("*.distcp"))) == 2
        index = FileSystemReader(folder).read_metadata()
        for tensor in index.state_dict_metadata.values():
            assert sum(math.prod(chunk.sizes) for chunk in tensor.chunks) == math.prod(tensor.size)
        assert len(index.storage_data) == sum(len(tensor.chunks) for tensor in index.state_dict_metadata.values())
        in_parts = sum(len(tensor.chunks) == 2 for tensor in index.state_dict_metadata.values())
        assert in_parts == 0 if name == "half_ddp" else in_parts > 40


def test_what_is_shared_is_equal_in_all_processes(ran: Path) -> None:
    exits = results(ran, "ddp")
    assert exits[0] == exits[1] and len(set(exits[0])) > 5


def test_initial_weights_are_those_of_the_first_process(ran: Path) -> None:
    results(ran, "unlike")
    assert_same_run(ran / "unlike", ran / "one")


def test_stopping_together(ran: Path) -> None:
    assert results(ran, "asked_to_stop") == [("interrupted", 3)] * 2
    assert results(ran, "out_of_time") == [("time", 1)] * 2
    assert checkpoint.load(checkpoint.find(ran / "stopped"))["step"] == 3


def test_a_non_finite_loss_in_one_process_stops_both(ran: Path) -> None:
    first, second = results(ran, "not_finite")
    assert first == second and "step 1, player critic: loss = nan" in first


def test_mistakes_are_refused_in_both(ran: Path) -> None:
    first, second = results(ran, "refused")
    assert first == second
    assert "train.accumulate is 3, but must be a multiple of the 2 processes" in first[0]
    assert "train.sharding=none is for one process, but there are 2" in first[1]
    assert "train.sharding=fsdp2 needs a module with blocks, and net, head have none" in first[2]


def test_what_the_first_process_does_is_done_for_all(ran: Path) -> None:
    first, second = results(ran, "first_fails")
    assert first[:3] == second[:3] == ["7", "a mistake", "a failure"]
    assert "No space left" in first[3] and "No space left" in second[3]


def test_only_the_first_process_writes_and_shows(ran: Path) -> None:
    rows = read_jsonl(ran / "ddp" / "log.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, scenarios.STEPS + 1))


# The end of a process.


@pytest.mark.parametrize("how", ["killed", "stopped", "failed"])
def test_a_lost_process_ends_the_others(tmp_path: Path, how: str) -> None:
    """Within the time-out, with one clear line, exit code 1, and the last checkpoint whole."""
    mode = {"killed": str(int(signal.SIGKILL)), "stopped": str(int(signal.SIGSTOP)), "failed": "error"}[how]
    pair = start_pair(Path(scenarios.__file__).with_name("lost.py"), str(tmp_path), mode)
    try:
        out, error = pair[0].communicate(timeout=60)
    finally:
        pair[1].kill()
        pair[1].wait()
    assert pair[0].returncode == 1, out + error
    last = error.strip().splitlines()[-1]
    assert last.startswith("streamgen train: ")
    if how == "failed":
        assert "process 1 of 2 failed: ValueError: out of words" in last
    else:
        assert "another of the 2 processes ended without a word (killed?), or did not answer for 2 s" in last
    assert "step_00000005 stands" in last
    states = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert states == ["step_00000005"]
    assert checkpoint.load(tmp_path / "checkpoints" / "step_00000005")["step"] == 5
