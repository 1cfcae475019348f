"""Stopping anywhere and continuing gives the run that never stopped; what cannot be continued is refused by name."""

import errno
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamgen.errors import UserError
from streamgen_train import checkpoint
from streamgen_train.config import OptimConfig
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
    for name in ("step_00000030", checkpoint.BEST):
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
    half = tmp_path / "cut" / "checkpoints" / ".step_00000015.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
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
    assert names == ["best", "step_00000025", "step_00000030"]
    assert checkpoint.load(tmp_path / "checkpoints" / "best")["step"] == 20


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


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    train(build_toy(), toy_config(max_steps=5), tmp_path)
    path = checkpoint.find(tmp_path)
    for name in ("__0_0.distcp", ".metadata", "meta.json"):
        whole = (path / name).read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"not a checkpoint", None):
            (path / name).unlink()
            if content is not None:
                (path / name).write_bytes(content)
            with pytest.raises(UserError, match=r"step_00000005 is not a readable training checkpoint"):
                train(build_toy(), toy_config(), tmp_path)
            (path / name).write_bytes(whole)
    assert train(build_toy(), toy_config(max_steps=6), tmp_path).step == 6
    (path / "meta.json").write_text('{"format": 7}')
    with pytest.raises(UserError, match="step_00000005 is not a training checkpoint of format 2"):
        checkpoint.load(path)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    whole, foreign = tmp_path / "whole.pt", tmp_path / "foreign.pt"
    torch.save({"format": 1, "modules": {}}, whole)
    torch.save({"weights": torch.ones(2)}, foreign)
    for content in (whole.read_bytes()[:300], b"", b"not a checkpoint"):
        whole.write_bytes(content)
        with pytest.raises(UserError, match=r"whole\.pt is not a readable training checkpoint"):
            checkpoint.load(whole)
    with pytest.raises(UserError, match="not a training checkpoint of format 1"):
        checkpoint.load(foreign)
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "nothing")


def test_the_index_of_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    """DCP keeps it as a pickle; someone else's checkpoint must not be able to do more than describe tensors."""

    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    train(build_toy(), toy_config(max_steps=5), tmp_path)
    (checkpoint.find(tmp_path) / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"asks for posix\.system, which does not belong there"):
        checkpoint.load_modules(tmp_path)
    assert not (tmp_path / "owned").exists()


# Files of format 1.


def as_file(run_dir: Path, name: str) -> Path:
    """A checkpoint of a run as format 1 had it, in place of the folder."""
    folder = run_dir / "checkpoints" / name
    state = checkpoint.load(folder)
    state["ema"]["updates"] = state["ema"]["updates"]["model"]
    for key in ("objective", "players", "sharding", "processes"):
        del state[key]
    path = folder.with_name(f"{name}.pt")
    torch.save({**state, "format": 1}, path)
    shutil.rmtree(folder)
    return path


def test_files_of_format_1_are_read(tmp_path: Path) -> None:
    train(build_toy(), toy_config(max_steps=10), tmp_path)
    folder = checkpoint.find(tmp_path)
    before = [checkpoint.load_modules(folder, ema=ema) for ema in (True, False)]
    state = checkpoint.load(folder)
    file = as_file(tmp_path, folder.name)
    assert checkpoint.find(tmp_path) == file == checkpoint.find(file)
    assert checkpoint.run_folder(file) == tmp_path == checkpoint.run_folder(tmp_path)
    assert_equal_states([checkpoint.load_modules(path, ema=e) for path, e in ((file, True), (tmp_path, False))], before)
    again = checkpoint.load(file)
    assert_equal_states({k: again[k] for k in again if k != "format"}, {k: state[k] for k in again if k != "format"})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_from_files_of_format_1_go_on_exactly(tmp_path: Path, precision: str) -> None:
    train(build_toy(), toy_config(precision=precision), tmp_path / "whole")
    with pytest.raises(Stop):
        train(build_toy(), toy_config(precision=precision), tmp_path / "cut", on_progress=crash_at(13))
    folder = tmp_path / "cut" / "checkpoints"
    as_file(tmp_path / "cut", "step_00000005")
    as_file(tmp_path / "cut", "step_00000010")
    as_file(tmp_path / "cut", "best")
    train(build_toy(seed=9), toy_config(precision=precision), tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert sorted(p.name for p in folder.iterdir()) == ["best", "step_00000025", "step_00000030"]
    assert_equal_states(*(checkpoint.load(tmp_path / run / "checkpoints" / "best") for run in ("cut", "whole")))


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


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every file of a checkpoint: one clear error, nothing half written, and the run goes on from before."""
    train(build_toy(), toy_config(max_steps=5), tmp_path)
    folder = tmp_path / "checkpoints"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    fsync = os.fsync
    for last in range(3):
        count = itertools.count()

        def full_disk(descriptor: int, last: int = last, count: Iterator[int] = count) -> None:
            if next(count) == last:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(checkpoint.CheckpointError, match=r"step_00000010 \(.*No space left.*/step_00000005 stands"):
            train(build_toy(), toy_config(max_steps=10), tmp_path)
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    monkeypatch.setattr(os, "fsync", fsync)
    assert train(build_toy(), toy_config(max_steps=10), tmp_path).step == 10


def dies_in_a_save(run: Callable[[], object], best: Path, moment: int) -> bool:
    """Do it in a process of its own that kills itself at a change of the file system after there is a best; did it?"""
    child = os.fork()
    if child == 0:
        count = itertools.count()

        def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
            def changed(*arguments: Any, **keywords: Any) -> Any:
                if best.exists() and next(count) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **keywords)

            return changed

        for owner, name in ((Path, "rename"), (Path, "mkdir"), (os, "link"), (os, "fsync"), (shutil, "rmtree")):
            setattr(owner, name, mortal(getattr(owner, name)))
        run()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("moment", range(16))
def test_killed_at_any_moment_of_a_save(tmp_path: Path, moment: int) -> None:
    """What is there can be continued to the same end, best and all."""
    config = toy_config(max_steps=9, validate_every=3)
    config.checkpoint.every, config.checkpoint.keep = 3, 1

    class Improving(ToyObjective):
        def validate(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, float]:
            return {"error": -float(step)}

    def run(folder: str) -> None:
        torch.manual_seed(0)
        train(Improving(), config, tmp_path / folder)

    folders = [tmp_path / name / "checkpoints" for name in ("cut", "whole")]
    assert dies_in_a_save(lambda: run("cut"), folders[0] / "best", moment)
    assert all(checkpoint.load(path)["step"] in (3, 6) for path in checkpoint.list_checkpoints(tmp_path / "cut"))
    run("cut")
    run("whole")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert sorted(p.name for p in folders[0].iterdir()) == ["best", "step_00000009"]
    for name in ("best", "step_00000009"):
        assert_equal_states(*(checkpoint.load(folder / name) for folder in folders))


def test_best_costs_no_second_copy(tmp_path: Path) -> None:
    train(build_toy(), toy_config(max_steps=10), tmp_path)
    best, newest = tmp_path / "checkpoints" / "best", tmp_path / "checkpoints" / "step_00000010"
    assert (best / "__0_0.distcp").samefile(newest / "__0_0.distcp")


def test_states_of_objectives_come_back_as_they_were(tmp_path: Path) -> None:
    """All plain containers, and tensors of every sort, bit for bit."""
    odd = torch.tensor([1.5, float("nan")]).bfloat16()
    state: dict[Any, Any] = {
        3: {"cache": [torch.arange(4), odd], "done": True, "text": ("a", None, 0.1)},
        "note": {1: 2, "1": float("inf")},
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "empty": {},
    }
    found: dict[Any, Any] = {}

    class Keeps(ToyObjective):
        def state_dict(self) -> dict[Any, Any]:
            return state

        def load_state_dict(self, given: Mapping[Any, Any]) -> None:
            found.update(given)

    train(Keeps(), toy_config(max_steps=1), tmp_path)
    train(Keeps(), toy_config(max_steps=2), tmp_path)
    assert list(found) == list(state) and found["note"] == state["note"] and found["empty"] == {}
    assert found[3]["text"] == ("a", None, 0.1) and found[3]["done"] is True
    assert torch.equal(found[3]["cache"][0], torch.arange(4)) and found["scalar"].dtype == torch.float64
    assert torch.equal(found[3]["cache"][1].view(torch.int16), odd.view(torch.int16))

    state["wrong"] = {"inside": [object()]}
    with pytest.raises(TypeError, match=r"objective/'wrong'/'inside'/0: a object is neither plain data nor a tensor"):
        train(Keeps(), toy_config(max_steps=3), tmp_path)


def test_another_optimiser_cannot_continue(tmp_path: Path) -> None:
    config = toy_config(max_steps=5, optim=OptimConfig(kind="adamw"))
    train(build_toy(), config, tmp_path)
    with pytest.raises(UserError, match=r"lacks 2 tensors .*optim/muon/net\.blocks\.0\.weight.*other optimisers"):
        train(build_toy(), toy_config(max_steps=6), tmp_path)
