"""What a run writes and shows: shares of time, curves, sample videos, wandb with and without network."""

import errno
import sys
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from streamgen.errors import UserError
from streamgen_train import curves
from streamgen_train.config import LogConfig, TrainConfig
from streamgen_train.display import Display
from streamgen_train.logs import RunLog, read_jsonl
from streamgen_train.loop import Trainer, train
from streamgen_train.main import exit_code
from streamgen_train.objective import Turn
from streamgen_train.timing import Stopwatch, timed
from tests.toy_objective import ToyObjective, build_toy, toy_config

CPU = torch.device("cpu")


class Clock:
    """Time that goes on when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_phases_are_taken_out_of_those_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = Clock(monkeypatch), Stopwatch(CPU)
    with timed("outside"):  # no step: nothing happens
        clock.now += 50
    for _ in range(2):
        with watch.step():
            clock.now += 1
            with timed("forward"):
                clock.now += 2
                with timed("rollout"):
                    clock.now += 3
                with pytest.raises(KeyError), timed("rollout"):
                    clock.now += 1
                    raise KeyError
                clock.now += 1
            with timed("backward"), timed("rollout"):  # recomputed there
                clock.now += 8
        clock.now += 70
    shares = watch.shares()
    assert shares == pytest.approx(
        {"share_rest": 1 / 16, "share_forward": 3 / 16, "share_rollout": 4 / 16, "share_backward": 8 / 16}
    )
    assert watch.shares() == {}
    with watch.step():
        clock.now += 1
    assert watch.shares() == {"share_rest": 1.0}


def test_a_row_says_where_the_time_went(tmp_path: Path) -> None:
    class Marks(ToyObjective):
        def loss(
            self, batch: Tensor, turn: Turn, ema: Mapping[str, nn.Module] | None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            with timed("score"):
                time.sleep(0.005)
            return super().loss(batch, turn, ema)

    config = toy_config(max_steps=4)
    config.log.every = 2
    train(Marks(), config, tmp_path)
    rows = [row for row in read_jsonl(tmp_path / "log.jsonl") if row["kind"] == "train"]
    names = ("data", "forward", "score", "backward", "exchange", "optimiser", "rest")
    for row in rows:
        shares = {name: row[f"share_{name}"] for name in names}
        assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) >= 0
        assert shares["score"] * row["step_s"] > 0.004
        assert row["steps_per_s"] == pytest.approx(1 / row["step_s"])


def test_marks_do_not_change_a_step() -> None:
    first, second = Trainer(build_toy(), toy_config()), Trainer(build_toy(), toy_config())
    assert [first.train_step() for _ in range(3)] == [second.train_step() for _ in range(3)]
    assert first.train_step().keys() == {"loss", "mae", "grad_norm", "lr_factor"}


def test_panels() -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": 1, "loss": 2.0, "mse_gap": 1.0, "step_s": 1.0, "share_data": 0.5, "lr_factor": 1.0},
        {"kind": "train", "step": 2, "loss": 1.5, "mse_story": 3.0, "critic/loss": 4.0},
        {"kind": "val", "step": 2, "single_0.95": 0.5, "single_0.6": 0.25},
    ]
    assert curves.panels(rows) == {
        "loss": {"loss": ([1, 2], [2.0, 1.5])},
        "mse": {"mse_gap": ([1], [1.0]), "mse_story": ([2], [3.0])},
        "critic/loss": {"critic/loss": ([2], [4.0])},
        "validation: single": {"single_0.95": ([2], [0.5]), "single_0.6": ([2], [0.25])},
    }


def test_curves_are_drawn(tmp_path: Path) -> None:
    """At a validation, and again at the end; a long curve is smoothed."""
    config = toy_config(max_steps=15, log=LogConfig(every=1))
    seen: list[bytes] = []
    train(
        build_toy(),
        config,
        tmp_path,
        on_progress=lambda step, _: seen.append((tmp_path / "curves.png").read_bytes()) if step == 10 else None,
    )
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1200, 480) and np.asarray(picture.convert("L")).std() > 5
    assert seen[0] != (tmp_path / "curves.png").read_bytes()
    long: list[dict[str, Any]] = [{"kind": "train", "step": i, "loss": 1 / i} for i in range(1, 5001)]
    curves.draw(long, tmp_path / "long.png")
    curves.draw([], tmp_path / "none.png")
    assert (tmp_path / "long.png").stat().st_size > 5000 and not (tmp_path / "none.png").exists()


def test_no_matplotlib_no_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(curves, "can_draw", lambda: False)
    train(build_toy(), toy_config(max_steps=1, log=LogConfig(every=1)), tmp_path)
    assert "no curves.png: it needs the package matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("side", [(16, 24), (15, 21)])
def test_sample_videos(tmp_path: Path, side: tuple[int, int]) -> None:
    ramp = np.linspace(0, 255, 8).astype(np.uint8)[:, None, None, None]
    video = np.broadcast_to(ramp, (8, *side, 3)).copy()
    log = RunLog(tmp_path, LogConfig(video_fps=12.5, curves=False), 0, {})
    log.samples(7, {"clip": video, "sheet": video[0]})
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step_00000007_clip.mp4", "step_00000007_sheet.png"]
    path = tmp_path / "samples" / names[0]
    back = iio.imread(path, plugin="pyav")
    assert back.shape == (8, side[0] + side[0] % 2, side[1] + side[1] % 2, 3)
    assert np.abs(back[:, : side[0], : side[1]].astype(int) - video).max() < 12
    assert iio.immeta(path, plugin="pyav")["fps"] == pytest.approx(12.5)


def test_lines_say_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(1000, 0, "run")
    display.row(100, 1000, {"critic/loss": 2.0, "clips_per_s": 8.0, "step_s": 2.0})
    assert "step 100/1000" in (line := capsys.readouterr().err) and "left 0:30:00" in line


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def other() -> int:
        raise OSError(errno.EIO, "Input/output error")

    assert exit_code(full, "train") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the disk is full; the last checkpoint stands" in error
    with pytest.raises(OSError, match="Input/output"):
        exit_code(other, "train")


# wandb: a stand-in that keeps what it is given.


class StandIn(types.ModuleType):
    def __init__(self, fails: Exception | None = None) -> None:
        super().__init__("wandb")
        self.fails, self.started, self.logged, self.finished = fails, [], [], False
        self.errors = types.SimpleNamespace(UsageError=type("UsageError", (Exception,), {}), CommError=ConnectionError)
        self.dir = "run/wandb/offline-run-1/files"

    def Settings(self, **values: Any) -> Any:
        return values

    def Image(self, path: str) -> tuple[str, str]:
        return "image", Path(path).name

    def Video(self, path: str, format: str) -> tuple[str, str]:
        return format, Path(path).name

    def init(self, mode: str, **options: Any) -> Any:
        if mode == "online" and self.fails is not None:
            raise self.fails
        self.started.append((mode, options))
        return self

    def log(self, values: Any, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch, fails: Exception | None = None) -> Iterator[StandIn]:
    module = StandIn(fails)
    monkeypatch.setitem(sys.modules, "wandb", module)
    yield module


def wandb_config(mode: str) -> TrainConfig:
    config = toy_config(max_steps=2, sample_every=2, validate_every=2)
    config.log.wandb = mode  # type: ignore[assignment]
    return config


def test_wandb_gets_rows_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Films(ToyObjective):
        def sample(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
            return {**super().sample(step, modules), "clip": np.zeros((4, 16, 16, 3), np.uint8)}

    with stand_in(monkeypatch) as wandb:
        train(Films(), wandb_config("online"), tmp_path / "run", resolved={"a": 1})
    ((mode, options),) = wandb.started
    assert mode == "online" and options["config"] == {"a": 1} and options["settings"] == {"init_timeout": 30.0}
    keys = {key for _, values in wandb.logged for key in values}
    assert {"train/loss", "val/error", "samples/grey", "samples/clip"} <= keys and wandb.finished
    shown = {k: v for _, values in wandb.logged for k, v in values.items() if k.startswith("samples/")}
    assert shown == {
        "samples/grey": ("image", "step_00000002_grey.png"),
        "samples/clip": ("mp4", "step_00000002_clip.mp4"),
    }


def test_wandb_without_network_goes_on_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with stand_in(monkeypatch, ConnectionError("connect: connection refused\nmore")) as wandb:
        train(build_toy(), wandb_config("online"), tmp_path)
    assert [mode for mode, _ in wandb.started] == ["offline"] and wandb.finished
    error = capsys.readouterr().err
    assert "wandb is not reached (connect: connection refused): logging offline; later run: wandb sync" in error
    assert any("train/loss" in values for _, values in wandb.logged)


def test_wandb_without_a_key_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in(monkeypatch) as wandb:
        wandb.fails = wandb.errors.UsageError("no API key configured")
        with pytest.raises(UserError, match=r"could not start \(no API key configured\); run `wandb login`"):
            train(build_toy(), wandb_config("online"), tmp_path)


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path: Path) -> None:
    """The real package, without network or key: a run that `wandb sync` can send."""
    pytest.importorskip("wandb", reason="wandb is not installed (extra `train`)")
    train(build_toy(), wandb_config("offline"), tmp_path)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert next(iter(folder.glob("run-*.wandb"))).stat().st_size > 500
