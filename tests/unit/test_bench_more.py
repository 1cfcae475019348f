"""The suites of `streamgen bench` besides blocks: what each measures is there, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamgen.errors import UserError
from streamgen.transformer_config import TransformerConfig
from streamgen_infer import kernels_check, machine
from streamgen_infer.bench import server as bench_server
from streamgen_infer.bench import suites as bench_more
from streamgen_infer.bench import train as bench_train
from streamgen_infer.bench import wan_14b as bench_wan_14b
from streamgen_infer.bench.cases import random_transformer, read_config
from streamgen_infer.bench.suites import Options
from streamgen_infer.cli import main
from streamgen_infer.errors import Failure
from streamgen_infer.interrupts import Stop
from streamgen_infer.kernels_check import Row, Speed
from streamgen_train.main import compose
from tests.command_line import one_line

CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=5, in_channels=4, out_channels=4, text_dim=8, text_len=7, freq_dim=16
)


def options(suite: str, **values: Any) -> Options:
    defaults: dict[str, Any] = {"dtype": "all", "threads": 1, "blocks": None, "seconds": 5.0, "viewers": 2}
    return Options(
        **{"suite": suite, "device": "cpu", "json": None, "png": None, "overwrite": False, **defaults, **values}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "server", "--png", "a.png"), "--png draws the stages of a block; --suite server has none"),
        (("--suite", "server", "--device", "cuda"), "--suite server is measured on the CPU; leave --device out"),
        (("--suite", "server", "--viewers", "0"), "--viewers is 0; it must be 1 to 1000"),
        (("--suite", "server", "--seconds", "1"), "--seconds is 1; it must be 5 to 86400"),
        (("--suite", "train", "--dtype", "fp16"), "--dtype 'fp16' does not exist; there are: fp32, bf16, all"),
        (("--suite", "wan_14b", "--json", "no/a.json"), "the folder no does not exist"),
        (("--suite", "fast"), "there are: sprites, mid, wan_1_3b, engine, viewers, pipeline, kernels, server, wan_14b"),
    ],
)
def test_mistakes(
    in_tmp_path: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in one_line(capsys)


# Kernels.


def test_kernels_need_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--suite", "kernels"]) == 2
    assert "there is none; streamgen doctor --kernels checks them on the CPU" in capsys.readouterr().err


def test_no_number_of_a_kernel_that_is_wrong(
    in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        Speed("norm", "bfloat16", 0.5, "bytes/s", 3e12, 4e12),
        Row("gate", "bfloat16", False, "differs: not timed"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H-1")
    monkeypatch.setattr(kernels_check, "usable_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(kernels_check, "measure_kernels", lambda device, dtype: iter(found))
    assert main(["bench", "--suite", "kernels", "--json", "k.json"]) == 1
    said = capsys.readouterr()
    assert "75.0%" in said.out and "not timed" in said.out and "not right here, and so not timed: gate" in said.err
    (result,) = json.loads(Path("k.json").read_text())["results"]
    assert [row["name"] for row in result["kernels"]] == ["norm"] and result["kernels"][0]["share_of_roof"] == 0.75
    assert [row["name"] for row in result["failed"]] == ["gate"] and "ms" not in result["failed"][0]


# Wan 14B.


def test_one_layer_shares_the_weights_and_is_the_first_part() -> None:
    torch.manual_seed(0)
    model = random_transformer(CONFIG, torch.float32)
    shallow = bench_wan_14b.first_layer(model)
    assert len(shallow.blocks) == shallow.config.num_layers == 1 and len(model.blocks) == model.config.num_layers == 5
    assert shallow.blocks[0] is model.blocks[0] and shallow.head is model.head
    assert all(0 < parameter.abs().max() <= 0.02 for parameter in model.parameters())


def test_what_is_extrapolated() -> None:
    """A layer of 7 beside 11 of rest, and bounds of 5 and 10."""
    deep, one = ({name: rest + n * layer for name, rest, layer in SIZES} for n in (3, 1))
    layer, all_layers = bench_wan_14b.extrapolated(deep, one, 3, 40)
    assert layer == pytest.approx({name: cost for name, _, cost in SIZES} | {"cpu_ratio_to_bound": 7 / 5})
    expected = {name: rest + 40 * cost for name, rest, cost in SIZES}
    assert all_layers == pytest.approx(expected | {"cpu_ratio_to_bound": (11 + 280) / (10 + 200)})


SIZES = [("block_ms", 11.0, 7.0), ("block_cpu_ms", 11.0, 7.0), ("bound_ms", 10.0, 5.0), ("bound_cpu_ms", 10.0, 5.0)]


def test_few_layers_are_measured_and_the_rest_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_wan_14b, "read_config", lambda cls, file: CONFIG)
    monkeypatch.setattr(bench_wan_14b, "LAYERS", 2)
    monkeypatch.setattr("streamgen_infer.bench.stages.HOST_BLOCKS", 1)
    found = bench_wan_14b.wan_14b(options("wan_14b", blocks=1, dtype="fp32"), Stop())
    assert found is not None and (found["layers"], found["extrapolated"]["layers"], found["dtype"]) == (2, 5, "fp32")
    assert found["blocks"] == 1 and found["weights"] == "random" and found["stages"]["denoise"]["flops"] > 0
    said = capsys.readouterr().out
    assert "measured: 2 of 5 layers" in said and "extrapolated to all 5 layers, not measured: " in said


def test_wan_14b_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_mb", lambda: (8000.0, 1000.0))
    whole = read_config(TransformerConfig, "model/wan_14b.yaml")
    few = dataclasses.replace(whole, num_layers=bench_wan_14b.LAYERS)
    message = r"3 of 40 layers take 5\.\d GB with the bound beside them, all of them 5\d GB, and 1\.0 GB are free"
    with pytest.raises(UserError, match=message):
        bench_wan_14b.check_memory(whole, few, torch.bfloat16)


# Training.


def test_training_is_handed_over_and_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that compile are left out; the median of the others is given."""
    asked: list[list[str]] = []

    def command(words: list[str]) -> int:
        asked.append(words)
        run_dir = Path(words[-1].removeprefix("run_dir="))
        run_dir.mkdir(parents=True)
        steps_s = [90.0, 50.0, 40.0, 2.0, 1.0, 3.0]
        rows = [{"kind": "train", "step_s": s, "mfu": 0.5, "share_data": 0.1} for s in steps_s]
        rows = [
            {**row, "tokens_per_s": 100 / s, "tflop_per_s": 1 / s, "clips_per_s": 4 / s}
            for row, s in zip(rows, steps_s, strict=True)
        ]
        (run_dir / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*rows, {"kind": "val"})))
        return 0

    found = bench_train.train(options("train", blocks=3), command)
    assert (found["step_s"], found["tokens_per_s"], found["mfu"]) == (2.0, 50.0, 0.5)
    assert found["shares"] == {"data": 0.1} and (found["steps"], found["dtype"]) == (3, "bf16")
    assert "tokens_per_s: 50 tokens/s" in capsys.readouterr().out
    with pytest.raises(Failure, match="exit code 3"):
        bench_train.train(options("train"), lambda words: 3)
    values = compose(asked[0], "train")
    assert values["train"]["max_steps"] == bench_train.WARM_UP + 3 and values["objective"]["single_share"] == 0
    assert values["objective"]["single_until"] == 0
    assert Path(values["objective"]["codec_from"]).is_dir() and not Path(values["run_dir"]).exists()


# The server: tests/server/test_bench_server.py runs it.


def test_the_mean_of_a_histogram() -> None:
    page = 'streamgen_encode_seconds_bucket{le="0.1"} 4.0\nstreamgen_encode_seconds_count 4.0\n'
    page += "streamgen_encode_seconds_sum 0.002\n"
    assert bench_server.mean_ms(page, "streamgen_encode_seconds") == pytest.approx(0.5)
    assert bench_server.mean_ms("streamgen_encode_seconds_count 0.0\n", "streamgen_encode_seconds") is None
    assert bench_more.SUITES == ("kernels", "server", "wan_14b", "train")
