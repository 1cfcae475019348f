"""Configs: what fits becomes objects, what does not is refused by name; and the two commands that read them."""

import importlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

import streamgen_distill.main
import streamgen_train.main
from streamgen.errors import UserError
from streamgen.resources import configs_dir
from streamgen_train.config import RunConfig, TrainConfig, from_dict
from streamgen_train.logs import read_jsonl
from streamgen_train.main import compose, groups, run
from tests import toy_objective

KINDS = {**streamgen_train.main.OBJECTIVES, **streamgen_distill.main.OBJECTIVES}
Command = Callable[..., int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    patch: tuple[int, int, int] = (1, 2, 2)
    kind: Literal["flow", "x0"] = "flow"

    def __post_init__(self) -> None:
        if self.patch[0] < 1:
            raise ValueError(f"patch={self.patch}: must be positive")


@dataclass(kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    many: list[float] = field(default_factory=list)
    chain: tuple[int, ...] = ()
    best: str | None = None
    either: int | str = 0
    table: dict[str, float] = field(default_factory=dict)
    flag: bool = False


def test_from_dict_builds_every_type() -> None:
    data = {
        "name": "n",
        "inner": {"patch": [1, 4, 4], "kind": "x0"},
        "many": [1, 2.5],
        "chain": [1, 2],
        "best": None,
        "either": "word",
        "table": {"a": 1},
        "flag": True,
    }
    made = from_dict(Outer, data)
    inner = Inner(patch=(1, 4, 4), kind="x0")
    expected = Outer(name="n", inner=inner, many=[1.0, 2.5], chain=(1, 2), either="word", table={"a": 1.0}, flag=True)
    assert made == expected and isinstance(made.inner.patch, tuple) and isinstance(made.many[0], float)
    assert from_dict(Outer, {"name": "n", "inner": inner}).inner is inner


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "n", "iner": {}}, r"unknown key 'iner'; did you mean 'inner'\? Allowed: name, inner"),
        ({"name": "n", "inner": {"kin": "x0"}}, r"unknown key 'inner.kin'; did you mean 'kind'\? Allowed in inner"),
        ({"name": "n", "zzz": 1}, r"unknown key 'zzz'\. Allowed"),
        ({}, "missing key 'name'"),
        ({"name": 3}, "name=3 is a int, but must be str"),
        ({"name": "n", "flag": 1}, "flag=1 is a int, but must be bool"),
        ({"name": "n", "either": 1.5}, "either=1.5 is a float"),
        ({"name": "n", "inner": {"kind": "v"}}, r"inner.kind='v' is not allowed.*Allowed: flow, x0"),
        ({"name": "n", "inner": {"patch": [1, 2]}}, "inner.patch=.* has 2 values, but must have 3"),
        ({"name": "n", "inner": {"patch": [1, 2, 0.5]}}, r"inner.patch\[2\]=0.5"),
        ({"name": "n", "inner": {"patch": [0, 2, 2]}}, "inner: patch=.*must be positive"),
        ({"name": "n", "inner": 3}, "inner: expected a group of keys, got 3"),
        ({"name": "n", "many": "abc"}, "many='abc' is a str, but must be a list"),
        ({"name": "n", "table": 1}, "table: expected a group of keys"),
    ],
)
def test_from_dict_refuses_by_name(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(Outer, data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", 0),
        ("accumulate", 0),
        ("threads", 0),
        ("max_minutes", 0.0),
        ("process_timeout_s", 0.0),
        ("ema", {"decay": 1.0}),
        ("ema", {"start_step": -1}),
        ("log", {"video_fps": 0.0}),
        ("log", {"wandb_timeout_s": -1.0}),
    ],
)
def test_impossible_numbers_are_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"train.{key}"):
        from_dict(TrainConfig, {key: value}, "train")


def experiments() -> list[str]:
    return groups(configs_dir())["experiment"]


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_loads(name: str) -> None:
    """Composes, fits the dataclasses of its objective, and dry-runs on the meta device."""
    config = from_dict(RunConfig, compose([f"experiment={name}"], "train"))
    assert config.experiment == name and config.run_dir == f"runs/{name}"
    command = run if config.objective["name"] in streamgen_train.main.OBJECTIVES else streamgen_distill.main.run
    assert command([f"experiment={name}", "dry_run=true"]) == 0


def choices() -> list[tuple[str, str, str]]:
    """(experiment, group, name) for every file of every group that the experiment picks from."""
    picks = {name: (configs_dir() / "experiment" / f"{name}.yaml").read_text() for name in experiments()}
    return [
        (experiment, group, name)
        for group, names in groups(configs_dir()).items()
        for name in names
        for experiment, text in picks.items()
        if group == "train" or f"override /{group}:" in text
    ]


@pytest.mark.parametrize(("experiment", "group", "name"), choices())
def test_every_file_of_a_group_loads(experiment: str, group: str, name: str) -> None:
    config = from_dict(RunConfig, compose([f"experiment={experiment}", f"{group}={name}"], "train"))
    objective = dict(config.objective)
    from_dict(importlib.import_module(KINDS[objective.pop("name")]).Config, objective, "objective")


def test_no_file_is_left_out() -> None:
    loaded = {("experiment", name) for name in experiments()} | {c[1:] for c in choices()}
    # `streamgen study` and the pipeline (test_study, test_presets) read the files of these rooms.
    others = (configs_dir(), configs_dir() / "study", configs_dir() / "preset")
    files = {(f.parent.name, f.stem) for f in configs_dir().rglob("*.yaml") if f.parent not in others}
    assert files <= loaded


@pytest.fixture
def command(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`streamgen train` over a config folder of this test, with the toy as its only objective."""
    root = in_tmp_path / "configs"
    files = {
        "run": "defaults: [_self_, {train: default}, {model: null}, {experiment: '???'}]\n"
        "run_dir: runs/${experiment}\nresume: auto\ndry_run: false\nobjective: {}\n",
        "train/default": "{max_steps: 4, sample_every: 0, validate_every: 0}\n",
        "model/wide": "# @package objective\nwidth: 32\n",
        "experiment/toy": "# @package _global_\nobjective: {name: toy}\ntrain: {log: {every: 2}}\n",
        "experiment/other": "# @package _global_\nobjective: {name: elsewhere}\n",
    }
    for name, text in files.items():
        path = root / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(streamgen_train.main, "configs_dir", lambda: root)

    def call(*argv: str) -> int:
        return run(list(argv), "train", {"toy": toy_objective.__name__})

    return call


def test_a_run_from_the_command_line(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("experiment=toy", "model=wide", "train.optim.lr=2e-3", "train.max_steps=3") == 0
    out = capsys.readouterr().out
    assert "run folder: runs/toy" in out and "done at step 3" in out
    resolved = yaml.safe_load(Path("runs/toy/config.yaml").read_text())
    assert resolved["objective"] == {"name": "toy", "width": 32, "kind": "sine"}
    assert resolved["train"]["optim"]["lr"] == 2e-3 and resolved["train"]["log"]["every"] == 2
    environment = yaml.safe_load(Path("runs/toy/environment.json").read_text())
    assert environment["packages"]["torch"] and environment["code"] and environment["argv"]
    assert command("experiment=toy", "model=wide", "train.max_steps=5") == 0
    assert "done at step 5" in capsys.readouterr().out
    assert yaml.safe_load(Path("runs/toy/config.before_step_3.yaml").read_text()) == resolved


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["experiment=toi"], "no experiment 'toi'; did you mean 'toy'? Allowed: other, toy"),
        (["train.max_steps=3"], "name an experiment"),
        (["experiment=toy", "model=huge"], "no model 'huge'. Allowed: wide"),
        (["experiment=toy", "train.max_stesp=3"], "unknown key 'train.max_stesp'; did you mean 'max_steps'?"),
        (["experiment=toy", "objective.widht=3"], "unknown key 'objective.widht'; did you mean 'width'?"),
        (["experiment=toy", "runn_dir=x"], "unknown key 'runn_dir'; did you mean 'run_dir'?"),
        (["experiment=toy", "train.max_steps=many"], "train.max_steps='many' is a str, but must be int"),
        (["experiment=toy", "objective.kind=cosine"], "objective.kind='cosine' is not allowed"),
        (["experiment=toy", "train.seed=1,2"], "sweeps and deletions are not possible"),
        (["experiment=toy", "train.betas=[1"], "streamgen train:"),
        (["experiment=toy", "run_dir=${nowhere}"], "nowhere"),
        (["experiment=other"], "objective 'elsewhere', which is not one of `streamgen train`: toy"),
        (["experiment=toy", "train.device=abacus"], "train.device='abacus' is not a device"),
        (["experiment=toy", "resume=nowhere"], "no checkpoint in nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    command: Command, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert command(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(Path().glob("runs/**/step_*"))


def test_help_and_no_arguments(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    assert "experiments: other, toy" in capsys.readouterr().out
    assert command() == 2


def test_dry_run_counts_and_writes_nothing(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("experiment=toy", "dry_run=true") == 0
    out = capsys.readouterr().out
    count = sum(p.numel() for m in toy_objective.build_toy().modules().values() for p in m.parameters())
    assert f"{count / 1e6:.3f}" in out and "one checkpoint (MB)" in out
    assert not Path("runs").exists()


def test_exit_codes_of_stopped_runs(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    after_step = toy_objective.ToyObjective.after_step

    def interrupted(self: toy_objective.ToyObjective, step: int) -> None:
        after_step(self, step)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(toy_objective.ToyObjective, "after_step", interrupted)
    assert command("experiment=toy") == 130
    monkeypatch.setattr(toy_objective.ToyObjective, "after_step", after_step)
    assert command("experiment=toy") == 0  # what was made is kept and continued
    assert command("experiment=toy", "run_dir=broken", "train.optim.lr=1e30", "train.max_steps=20") == 1


def test_the_codec_of_the_sprites_world_trains(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real objective through the real configs: it gets better, a picture is made, a finished run stays finished."""
    assert run(["experiment=debug_cpu_codec", "train.max_steps=12"]) == 0
    rows = [row for row in read_jsonl(Path("runs/debug_cpu_codec/log.jsonl")) if row["kind"] == "val"]
    assert [row["step"] for row in rows] == [3, 6, 9, 12] and rows[-1]["psnr_db"] > rows[0]["psnr_db"] > 20
    assert list(Path("runs/debug_cpu_codec/samples").glob("*.png"))
    assert run(["experiment=debug_cpu_codec", "train.max_steps=12"]) == 0
    assert "done at step 12" in capsys.readouterr().out


def test_as_a_module(run_python: Callable[..., Any], repository: Path) -> None:
    path = os.pathsep.join(str(repository / folder) for folder in (".", "kernels", "train", "distill"))
    for package in ("streamgen_train", "streamgen_distill"):
        done = run_python("-m", package, "experiment=nothing_like_it", env={"PYTHONPATH": path})
        assert done.returncode == 2 and "no experiment 'nothing_like_it'" in done.stderr, done.stderr
