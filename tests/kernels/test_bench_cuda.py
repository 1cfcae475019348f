"""`bench --device cuda` on the CPU: the same code on a tiny model, by the interpreter and the wall clock."""

import dataclasses
import json

import pytest
import torch

from streamgen.codecs.taehv import TaehvConfig
from streamgen.geometry import VideoGeometry
from streamgen.transformer_config import TransformerConfig
from streamgen_infer.bench import cuda as bench_cuda
from streamgen_infer.bench import cuda_blocks as bench_cuda_blocks
from streamgen_infer.bench.cuda_blocks import Bench, Setting
from streamgen_infer.cli import main
from streamgen_infer.interrupts import Stop
from streamgen_infer.kernels_check import Row

SETTINGS = (
    Setting(name="plain", window_frames=4, sink_frames=1, target_ms=300),
    Setting(name="in bytes", window_frames=4, sink_frames=0, cache_dtype="fp8", weights_dtype="fp8"),
)
TINY = Bench(
    config=TransformerConfig(
        dim=24, ffn_dim=32, num_heads=2, num_layers=1, in_channels=3, out_channels=3, text_dim=8, text_len=4, freq_dim=8
    ),
    codec=TaehvConfig(latent_channels=3, encoder_dim=4, decoder_dims=(8, 8, 4, 4)),
    geometry=VideoGeometry(height=32, width=48, latent_channels=3, block_frames=2, first_latent_frames=1),
    settings=SETTINGS,
    device=torch.device("cpu"),
    dtype=torch.float32,
    steps=1,
    recorder=lambda run: run,
)


def right(device: torch.device):
    yield Row("norm_rope", "float32", True, "differs by 0")


def test_measures_blocks_through_kernels_and_recorded_passes(monkeypatch):
    monkeypatch.setattr(bench_cuda, "check_kernels", right)
    values = bench_cuda.measure(TINY, 2, Stop())
    plain, in_bytes = values["results"]
    assert (plain["setting"], plain["ops"], plain["attention"]) == ("plain", "triton", "auto")
    assert plain["frames_per_block"] == 8 and len(plain["denoise_ms"]) == 1
    assert plain["replays"] == 9 and plain["recording_problem"] == ""
    assert plain["block_ms"] >= plain["decode_ms"] + plain["commit_ms"] > 0
    assert plain["fps"] == pytest.approx(8000 / plain["block_ms"])
    assert plain["ratio_to_bound"] == pytest.approx(plain["block_ms"] / plain["bound_ms"])
    assert (in_bytes["cache_dtype"], in_bytes["weights_dtype"], in_bytes["replays"]) == ("fp8", "fp8", 9)
    json.dumps(values)
    shown = "\n".join(bench_cuda.lines(values))
    assert "plain" in shown and "300" in shown and "equal their reference: 1 of 1" in shown


def test_a_wrong_kernel_is_named_and_not_used(monkeypatch):
    def wrong(device: torch.device):
        yield from right(device)
        yield Row("ring_rope", "float32", False, "differs by 3.0e-01, above 2.0e-05")

    monkeypatch.setattr(bench_cuda, "check_kernels", wrong)
    values = bench_cuda.measure(dataclasses.replace(TINY, settings=SETTINGS[:1]), 2, Stop())
    (result,) = values["results"]
    assert (result["ops"], result["replays"]) == ("reference", 0)
    assert values["failed_checks"] == ["ring_rope in float32: differs by 3.0e-01, above 2.0e-05"]
    assert any(line.startswith("  WRONG, and not measured: ring_rope") for line in bench_cuda.lines(values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda", "--suite", "wan_1_3b"], "--device cuda: there is no CUDA device here"),
        (["--device", "nowhere"], "--device 'nowhere' is no device"),
        (["--device", "mps"], "measured on cpu or on cuda"),
    ],
)
def test_without_a_gpu_it_is_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_a_gpu_does_not_measure(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for arguments, message in (
        (["--device", "cuda:3"], "there are 1 CUDA devices"),
        (["--device", "cuda"], "--device cuda measures wan_1_3b, not all"),
        (["--device", "cuda", "--suite", "wan_1_3b", "--dtype", "fp32"], "measured in bf16"),
        (["--device", "cuda", "--suite", "wan_1_3b", "--png", "x.png"], "--png draws"),
        (["--device", "cuda", "--suite", "wan_1_3b", "--blocks", "1"], "--blocks is 1"),
    ):
        assert main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_wan_is_wan():
    bench = bench_cuda_blocks.wan(torch.device("cuda"))
    assert (bench.config.dim, bench.config.num_layers) == (1536, 30)
    assert bench.geometry.tokens(1) == 1560 and bench.geometry.block_pixel_frames(1) == 12
    assert {one.target_ms for one in bench.settings} >= {300, 210, 140}
    weights = [one.weights_dtype for one in bench.settings]  # there is no way back
    assert weights == sorted(weights, key=lambda dtype: dtype is not None)
