"""`streamgen bench`: the bound counts what the model computes, and every figure of the contract is there."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from streamgen.cache import CacheSpec, KVCache
from streamgen.codec import SpritesCodec, SpritesCodecConfig
from streamgen.costs import Attention, Product, pass_shapes
from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.rollout import Sampling
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from streamgen_infer import machine
from streamgen_infer.bench import cases, command
from streamgen_infer.bench.bound import Bound, Convolution, decode_shapes, moved_values
from streamgen_infer.bench.cases import Case
from streamgen_infer.bench.measure import measure
from streamgen_infer.bench.stages import host_share, steady_state
from streamgen_infer.cli import main
from streamgen_infer.interrupts import Stop
from tests.command_line import one_line

CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=3, in_channels=4, out_channels=5, text_dim=8, text_len=7, freq_dim=16
)
GEOMETRY = VideoGeometry(height=32, width=48, latent_channels=4)
CODEC = SpritesCodecConfig(latent_channels=4, encoder_dim=8, decoder_dim=8, decoder_blocks=2, head_dim=12)


@pytest.fixture(autouse=True)
def one_host_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgen_infer.bench.stages.HOST_BLOCKS", 1)


def test_the_bound_of_a_pass_has_the_flops_of_a_pass() -> None:
    """Attention written out, since the counter does not know the CPU's fused one."""
    model = CausalWanModel(CONFIG, attention_backend="math").requires_grad_(False)
    spec = CacheSpec(
        num_layers=3, num_heads=2, head_dim=12, grid_height=2, grid_width=3, window_frames=9, sink_frames=1
    )
    cache = KVCache(spec)
    text = model.encode_text(torch.randn(1, 1, 7, 8))
    for block in range(4):
        handle = cache.begin(3 * block, 3)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 4, 4, 6), torch.full((1, 1), 500.0), text, cache=handle)
        cache.commit(handle)
        visible = len(handle.visible_frames) * 6
        shapes = pass_shapes(CONFIG, tokens=18, visible_tokens=visible)
        assert sum(shape.flops for shape in shapes) == counter.get_total_flops()
    assert visible == 54


def test_the_shapes_of_a_pass() -> None:
    shapes = pass_shapes(CONFIG, tokens=18, visible_tokens=54)
    attention = [shape for shape in shapes if isinstance(shape, Attention)]
    assert attention == [Attention(2, 18, 54, 12), Attention(2, 18, 7, 12)] * 3
    linears = [module for module in CausalWanModel(CONFIG).modules() if isinstance(module, nn.Linear)]
    per_prompt = 2 + 2 * 3  # the text embedding, and keys and values of the text in each layer
    products = [shape for shape in shapes if isinstance(shape, Product)]
    assert len(products) == len(linears) - per_prompt + 1  # the patch embedding is a convolution by name only


def test_the_bound_of_decoding_has_the_flops_of_decoding() -> None:
    codec = SpritesCodec(CODEC).requires_grad_(False)
    latents = torch.randn(1, 3, 4, 4, 6)
    with FlopCounterMode(display=False) as counter:
        codec.decode_stream(latents, None)
    shapes = decode_shapes(codec, latents)
    with FlopCounterMode(display=False) as bare:
        Bound(shapes, torch.float32).run()
    assert bare.get_total_flops() == counter.get_total_flops() > 0
    assert any(isinstance(shape, Convolution) for shape in shapes)


def one_dnn_flops(x: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **shapes: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def test_the_bound_runs_what_it_counts() -> None:
    """Products, through whichever library: the counter does not know oneDNN's."""
    shapes = [shape for shape in pass_shapes(CONFIG, 18, 54) if isinstance(shape, Product)]
    known = {torch.ops.mkldnn._linear_pointwise: one_dnn_flops}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        Bound(shapes, torch.float32).run()
    assert counter.get_total_flops() == sum(shape.flops for shape in shapes)


def tiny(dtype: torch.dtype, codec: bool = True) -> Case:
    config = TransformerConfig(**{**{name: getattr(CONFIG, name) for name in CONFIG.__slots__}, "out_channels": 4})
    transformer = CausalWanModel(config).requires_grad_(False).to(dtype)
    return Case(
        transformer=transformer,
        codec=SpritesCodec(CODEC).requires_grad_(False).to(dtype) if codec else None,
        encode_text=lambda: transformer.encode_text(torch.randn(1, 1, 7, 8).to(dtype)),
        geometry=GEOMETRY,
        window_frames=9,
        sink_frames=1,
        sampling=Sampling(sigmas=(1.0, 0.8, 0.5)),
        weights="random",
    )


@pytest.mark.parametrize("codec", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measure(dtype: torch.dtype, codec: bool) -> None:
    found: Any = measure(tiny(dtype, codec), 3, Stop())
    assert found["ratio_to_bound"] == pytest.approx(found["block_ms"] / found["bound_ms"])
    assert len(found["denoise_ms"]) == found["steps"] == 3 and found["blocks"] == 3
    assert (found["tokens_per_block"], found["visible_tokens"]) == (18, 54)
    assert found["codec_included"] is codec and (found["real_time"] is not None) is codec
    assert min(*found["denoise_ms"], found["commit_ms"], found["bound_ms"], found["text_ms"]) > 0
    assert min(found["block_cpu_ms"], found["bound_cpu_ms"], found["cpu_ratio_to_bound"]) > 0
    stages = found["stages"]
    assert list(stages) == ["text", "denoise", "commit", *(["decode", "encode"] if codec else [])]
    passes = 4 * stages["denoise"]["flops"] + (stages["decode"]["flops"] if codec else 0)
    assert found["flops_per_block"] == passes and stages["text"]["flops"] > 0
    assert found["tokens_per_s"] == pytest.approx(18e3 / found["block_ms"])
    assert found["flops_per_s"] == pytest.approx(1e3 * passes / found["block_ms"])
    for stage in stages.values():
        roof = min(found["roofs"]["flops_per_s"], stage["flops_per_byte"] * found["roofs"]["bytes_per_s"])
        assert stage["share_of_roof"] == pytest.approx(stage["flops_per_s"] / roof)
    times = found["percentiles_ms"]
    assert times["p50"] <= times["p95"] <= times["p99"] and 0 <= found["host_share"] < 1
    assert found["steady_state"] == {"blocks": 3, "tensors": 0, "bytes": 0}
    assert found["cache_bytes"] == 3 * 3 * 54 * 24 * dtype.itemsize  # keys as stored and as read, values


def test_what_is_moved_at_least() -> None:
    assert moved_values(Product(2, 3, 5)) == 2 * 3 + 3 * 5 + 2 * 5
    assert moved_values(Attention(2, 3, 5, 7)) == 2 * 7 * (3 + 5 + 5 + 3)
    convolution = Convolution(2, 3, 6, 8, (4, 3, 3, 1), (1, 0))
    assert moved_values(convolution) == 2 * 3 * 6 * 8 + 4 * 3 * 3 + 2 * 4 * 6 * 8
    assert convolution.flops == 2 * (2 * 4 * 6 * 8) * (3 * 3)


def test_what_is_kept_block_after_block_is_seen() -> None:
    kept: list[torch.Tensor] = []
    grown = steady_state(lambda: kept.append(torch.zeros(10)), torch.device("cpu"))
    assert grown == {"blocks": 3, "tensors": 3, "bytes": 120}


def test_time_outside_of_torch_is_the_hosts() -> None:
    x = torch.ones(2000, 8)
    assert host_share(lambda: time.sleep(0.02)) > 0.9
    assert host_share(lambda: torch.zeros(2000, 2000).exp() @ x) < 0.5


def test_a_stop_before_the_first_block() -> None:
    assert measure(tiny(torch.float32), 3, Stop(requested=True)) is None


def test_the_command(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "CASES", {"sprites": tiny, "mid": lambda dtype: tiny(dtype, codec=False)})
    assert main(["bench", "--blocks", "2", "--json", "b.json", "--png", "b.png"]) == 0
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert "bound: the matrix products" in captured.out and captured.err.startswith("measuring sprites in fp32")
    values = json.loads(Path("b.json").read_text())
    kinds = [(one["suite"], one["dtype"], one["threads"]) for one in values["results"]]
    assert kinds == [("sprites", "fp32", 1), ("sprites", "bf16", 1), ("mid", "fp32", 1), ("mid", "bf16", 1)]
    for one in values["results"]:
        assert {
            "block_ms",
            "bound_ms",
            "ratio_to_bound",
            "denoise_ms",
            "commit_ms",
            "decode_ms",
            "text_ms",
        } <= one.keys()
    assert {"cpu", "cpu_flags", "cores", "torch", "python"} == values["environment"].keys()
    assert main(["bench", "--suite", "mid", "--dtype", "fp32", "--blocks", "1", "--json", "b.json"]) == 0
    assert [one["suite"] for one in json.loads(Path("b.json").read_text())["results"]] == ["mid"]
    capsys.readouterr()
    assert main(["bench", "--png", "b.png"]) == 2 and "add --overwrite" in one_line(capsys)
    assert main(["bench", "--suite", "engine", "--png", "c.png"]) == 2 and "leave it out" in one_line(capsys)


def test_the_cases_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "shipped_models", list)
    case = cases.sprites(torch.bfloat16)
    assert case.dtype == torch.bfloat16 and case.weights.startswith("random (none shipped)")
    assert (case.geometry.height, case.geometry.fps) == (64, 16) and case.codec is not None
    with torch.device("meta"):
        case = cases.mid(torch.float32)
    config, geometry = case.transformer.config, case.geometry
    assert (config.dim, config.num_layers, config.num_heads) == (768, 12, 12)
    assert (geometry.tokens_per_frame, geometry.block_frames) == (208, 3)
    assert (case.window_frames, case.sink_frames, len(case.sampling.sigmas), case.codec) == (12, 3, 4, None)


def test_wan_1_3b_on_the_meta_device() -> None:
    """A dry run: the published count of weights, and a block through a cache that is full, without any memory."""
    with torch.device("meta"):
        case = cases.wan_1_3b(torch.bfloat16)
    model, geometry = case.transformer, case.geometry
    assert sum(p.numel() for p in model.parameters()) == 1_418_996_800
    assert case.dtype == torch.bfloat16 and geometry.tokens_per_frame == 104
    spec = CacheSpec(
        num_layers=30, num_heads=12, head_dim=128, grid_height=8, grid_width=13, window_frames=6, sink_frames=3
    )
    cache = KVCache(spec, dtype=case.dtype, device="meta")
    text = case.encode_text()
    shape = (1, 3, 16, geometry.latent_height, geometry.latent_width)
    with torch.no_grad():
        for block in range(3):
            handle = cache.begin(3 * block, 3)
            out = model(torch.zeros(shape, device="meta"), torch.zeros(1, 1, device="meta"), text, cache=handle)
            cache.commit(handle)
    assert out.shape == shape and out.is_meta and cache.frames == [0, 1, 2, 6, 7, 8]


def test_all_leaves_the_large_suite_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command._choice("--suite", "all", tuple(cases.CASES)) == ("sprites", "mid")
    assert command._choice("--suite", "wan_1_3b", tuple(cases.CASES)) == ("wan_1_3b",)
    monkeypatch.setattr(machine, "memory_mb", lambda: (8000.0, 5000.0))
    with pytest.raises(UserError, match=r"takes 11\.4 GB in fp32, 5\.0 GB are free"):
        cases.wan_1_3b(torch.float32)
