"""Tokens, arithmetic and MFU of a run: counted from what the objective says a step computes, shown with its rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from streamgen.costs import TRAINED, Work, work_flops
from streamgen_train import throughput
from streamgen_train.config import TrainConfig
from streamgen_train.display import Display
from streamgen_train.logs import read_jsonl
from streamgen_train.loop import train
from streamgen_train.throughput import Throughput, product_flops_per_s
from tests.tiny_sprites import ar_values
from tests.toy_objective import ToyObjective

MODEL = ar_values(Path())["model"]
WORKS = [
    (MODEL, Work(what="trained", passes=4, tokens=48, pairs=48 * 48, factor=TRAINED)),
    (MODEL, Work(what="teacher", passes=8, tokens=48, pairs=48 * 48)),
]


class Counted(ToyObjective):
    """The toy, as if it made the passes of WORKS."""

    def work(self) -> list[Any]:
        return WORKS


@pytest.fixture(autouse=True)
def peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "product_flops_per_s", lambda dtype, device: 1e9)


def test_what_is_counted() -> None:
    config = TrainConfig(accumulate=2)
    speed = Throughput(config, Counted(), torch.float32, torch.device("cpu"), processes=4)
    flops = 2 * sum(work_flops(MODEL, work) for _, work in WORKS)
    assert speed.of(0.5) == pytest.approx(
        {"tokens_per_s": 2 * 4 * 48 / 0.5, "tflop_per_s": flops / 0.5 / 1e12, "mfu": flops / 0.5 / 4e9}
    )
    assert Throughput(config, ToyObjective(), torch.float32, torch.device("cpu")).of(0.5) == {}


def test_rows_of_the_log_and_of_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"max_steps": 4, "validate_every": 0, "sample_every": 0}
    config = TrainConfig(**values)
    config.log.every, config.log.curves = 2, False
    train(Counted(), config, tmp_path / "run")
    rows = [row for row in read_jsonl(tmp_path / "run" / "log.jsonl") if row["kind"] == "train"]
    assert len(rows) == 2
    flops = sum(work_flops(MODEL, work) for _, work in WORKS)
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(4 * 48 / row["step_s"])
        assert row["mfu"] == pytest.approx(flops / row["step_s"] / 1e9)
    assert "tokens_per_s" in capsys.readouterr().err


def test_the_bar_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    display = Display(10, 0, "run")
    shown: list[str] = []
    monkeypatch.setattr(display._progress, "update", lambda task, **fields: shown.append(fields["numbers"]))
    numbers = {"loss": 1.0, "clips_per_s": 2.0, "step_s": 1.0}
    display.row(1, 10, numbers)
    display.row(2, 10, {**numbers, "tokens_per_s": 1234.0, "mfu": 0.4567})
    assert shown == ["loss 1  2 clips/s", "loss 1  2 clips/s  1234 tokens/s  MFU 45.7%"]


def test_the_probe_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "CPU_SIZE", 64)
    before = torch.random.get_rng_state()
    assert product_flops_per_s(torch.bfloat16, torch.device("cpu")) > 0
    assert torch.equal(before, torch.random.get_rng_state())
