"""Stopping anywhere and continuing gives the run that never stopped; what cannot be continued is refused by name."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from streamgen.errors import UserError
from streamgen_train import checkpoint
from streamgen_train.loop import train
from tests.runs import assert_equal_states, curve
from tests.toy_objective import ToyObjective, build_toy, toy_config


class Stop(Exception):
    """Raised in the middle of a run, like a crash."""


def crash_at(last: int) -> Callable[[int, Mapping[str, float]], None]:
    def on_progress(step: int, numbers: Mapping[str, float]) -> None:
        if step == last:
            raise Stop

    return on_progress


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("last", [5, 13])
def test_resume_is_exact(tmp_path: Path, precision: str, last: int) -> None:
    """At a checkpoint and between two; other initial weights show that all of them come from the file."""
    config = toy_config(precision=precision)
    config.log.every = 4
    train(build_toy(), config, tmp_path / "whole")
    with pytest.raises(Stop):
        train(build_toy(), config, tmp_path / "cut", on_progress=crash_at(last))
    result = train(build_toy(seed=99), config, tmp_path / "cut")
    assert result.step == 30
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    for name in ("step_00000030.pt", checkpoint.BEST):
        states = [checkpoint.load(tmp_path / run / "checkpoints" / name) for run in ("cut", "whole")]
        assert_equal_states(*states)


def test_kill_minus_nine(tmp_path: Path, repository: Path) -> None:
    """A process that is killed between checkpoints and continued by another makes the same run."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), *filter(None, sys.path)])}

    def run(folder: str, *arguments: str) -> int:
        command = [sys.executable, str(repository / "tests" / "toy_objective.py"), str(tmp_path / folder), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=120).returncode

    assert run("cut", "20", "12") == -signal.SIGKILL
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 13, "lo')  # cut off in the middle of a line
    (tmp_path / "cut" / "checkpoints" / ".step_00000015.pt.tmp").write_bytes(b"half")
    assert run("cut", "20") == 0
    train(build_toy(), toy_config(max_steps=20), tmp_path / "whole")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    newest = [checkpoint.load(checkpoint.find(tmp_path / folder)) for folder in ("cut", "whole")]
    assert_equal_states(*newest)
    assert not list((tmp_path / "cut" / "checkpoints").glob(".*"))


def test_a_longer_run_continues_a_finished_one(tmp_path: Path) -> None:
    train(build_toy(), toy_config(max_steps=10), tmp_path)
    assert train(build_toy(), toy_config(max_steps=10), tmp_path).step == 10
    assert train(build_toy(), toy_config(max_steps=12), tmp_path).step == 12


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    class Worsening(ToyObjective):
        def validate(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, float]:
            return {"error": abs(step - 20.0)}

    train(Worsening(), toy_config(), tmp_path)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.pt", "step_00000025.pt", "step_00000030.pt"]
    assert checkpoint.load(tmp_path / "checkpoints" / "best.pt")["step"] == 20


def test_unknown_best_is_refused(tmp_path: Path) -> None:
    config = toy_config()
    config.checkpoint.best = "eror"
    with pytest.raises(UserError, match=r"best='eror'.*error"):
        train(build_toy(), config, tmp_path)


def test_resume_never_and_resume_path(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(build_toy(), toy_config(), tmp_path / "first", on_progress=crash_at(10))
    with pytest.raises(UserError, match="already has checkpoints"):
        train(build_toy(), toy_config(), tmp_path / "first", resume="never")
    with pytest.raises(UserError, match="already has checkpoints"):
        train(build_toy(), toy_config(), tmp_path / "first", resume=str(tmp_path / "second"))
    with pytest.raises(UserError, match="no checkpoint in"):
        train(build_toy(), toy_config(), tmp_path / "other", resume=str(tmp_path / "nowhere"))
    train(build_toy(seed=5), toy_config(), tmp_path / "second", resume=str(tmp_path / "first"))
    train(build_toy(), toy_config(), tmp_path / "whole")
    assert curve(tmp_path / "second") == [row for row in curve(tmp_path / "whole") if row["step"] > 10]


def test_bf16_checkpoints_hold_fp32(tmp_path: Path) -> None:
    train(build_toy(), toy_config(max_steps=5, precision="bf16"), tmp_path)
    state = checkpoint.load(checkpoint.find(tmp_path))
    assert {t.dtype for tensors in state["modules"].values() for t in tensors.values()} == {torch.float32}


def test_load_modules_gives_the_average_or_the_weights(tmp_path: Path) -> None:
    objective = build_toy()
    train(objective, toy_config(max_steps=5), tmp_path)
    weights, average = checkpoint.load_modules(tmp_path, ema=False), checkpoint.load_modules(tmp_path)
    assert torch.equal(weights["head"]["weight"], objective.head.weight)
    state = checkpoint.load(checkpoint.find(tmp_path))
    assert torch.equal(average["head"]["weight"], state["ema"]["shadow"]["head.weight"])
    assert not torch.equal(average["head"]["weight"], weights["head"]["weight"])
    objective.head.load_state_dict(average["head"])
    objective.net.load_state_dict(average["net"])


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    train(build_toy(), toy_config(max_steps=5), tmp_path)
    path = checkpoint.find(tmp_path)
    whole = path.read_bytes()
    foreign = tmp_path / "foreign.pt"
    torch.save({"weights": torch.ones(2)}, foreign)
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"step_00000005\.pt is not a readable training checkpoint"):
            train(build_toy(), toy_config(), tmp_path)
    with pytest.raises(UserError, match="not a training checkpoint of format"):
        checkpoint.load(foreign)
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "nothing.pt")


def test_checkpoints_of_another_model_name_the_tensors(tmp_path: Path) -> None:
    train(build_toy(), toy_config(max_steps=5), tmp_path)
    other = build_toy()
    other.head = nn.Linear(12, 4, bias=False)
    with pytest.raises(UserError, match=r"another model: tensors 2 unknown: head\.bias, head\.seen"):
        train(other, toy_config(), tmp_path)
    other.head = nn.Linear(12, 5)
    other.head.register_buffer("seen", torch.zeros(()))
    with pytest.raises(UserError, match=r"head\.bias \(4,\) instead of \(5,\)"):
        train(other, toy_config(), tmp_path)


def test_one_process_per_run_folder(tmp_path: Path) -> None:
    with checkpoint.run_lock(tmp_path), pytest.raises(UserError, match="another process is training"):
        train(build_toy(), toy_config(), tmp_path)
    assert train(build_toy(), toy_config(max_steps=1), tmp_path).status == "done"


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(build_toy(), toy_config(max_steps=5), tmp_path)
    before = checkpoint.find(tmp_path).read_bytes()
    save = torch.save

    def full_disk(state: object, file: object) -> None:
        save(torch.ones(3), file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(build_toy(), toy_config(max_steps=10), tmp_path)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.pt", "step_00000005.pt"] and checkpoint.find(tmp_path).read_bytes() == before
