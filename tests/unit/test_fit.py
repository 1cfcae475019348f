"""What a model needs is what it then takes: every figure against the real thing, and the published sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from streamgen import costs
from streamgen.cache import CacheSpec, KVCache
from streamgen.codecs.taehv import TaehvCodec, TaehvConfig
from streamgen.errors import UserError
from streamgen.ops import Ops
from streamgen.pipeline import StreamPipeline
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from streamgen_infer import machine
from streamgen_infer.cli import main
from streamgen_infer.models import fit
from streamgen_infer.models.fit_sizes import read_sizes, umt5_parameters
from streamgen_infer.models.live_bytes import peak_bytes
from tests.command_line import one_line
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("fit") / "m"))


def test_the_sizes_are_those_of_the_loaded_model(tiny: str) -> None:
    sizes = read_sizes(tiny)
    pipe = StreamPipeline.from_pretrained(tiny, dtype="fp32")
    assert (sizes.transformer, sizes.geometry, sizes.scheduler) == (
        pipe.transformer.config,
        pipe.geometry,
        pipe.scheduler,
    )
    latents = torch.zeros(1, 3, 4, 4, 4)
    for dtype in ("fp32", "bf16"):
        needs = fit.demand(sizes, dtype)
        pipe = StreamPipeline.from_pretrained(tiny, dtype=dtype)
        assert needs.transformer == sum(p.nbytes for p in pipe.transformer.parameters())
        assert needs.codec == sum(t.nbytes for t in pipe.codec.state_dict().values())
        assert needs.kv == pipe.new_cache("relative").nbytes()
        assert fit.demand(sizes, dtype, "window").kv == pipe.new_cache("window").nbytes()
        stream = pipe.stream("a red star spinning over a snow background", max_blocks=2)
        list(stream)
        assert stream.state.codec is not None
        assert needs.codec_state == sum(t.nbytes for t in stream.state.codec.values())
        text = pipe.transformer.encode_text(torch.zeros(1, 1, 8, 8, dtype=pipe.dtype))
        assert needs.prompt == sum(tensor.nbytes for pair in text.kv for tensor in pair)
        decode = partial(pipe.codec.decode_stream, latents, stream.state.codec)
        assert needs.decode == peak_bytes(decode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["window", "relative"])
@pytest.mark.parametrize("ratio", [1, 4, 6, 8])
def test_the_memory_of_a_pass(dtype: torch.dtype, policy: str, ratio: int) -> None:
    config = TransformerConfig(
        dim=128, ffn_dim=128 * ratio, num_heads=4, num_layers=2, in_channels=4, out_channels=4, text_dim=8, text_len=8
    )
    # `auto` may hold scores besides, and oneDNN's GELU, where there is one, saves a wide tensor: both are left out.
    ops = Ops(gelu_tanh=partial(F.gelu, approximate="tanh"))
    model = CausalWanModel(config, ops=ops, attention_backend="sdpa").to(dtype)
    spec = {"num_layers": 2, "num_heads": 4, "head_dim": 32, "grid_height": 8, "grid_width": 8, "window_frames": 12}
    cache = KVCache(CacheSpec(**spec, policy=policy), dtype=dtype)
    text = model.requires_grad_(False).encode_text(torch.zeros(1, 1, 8, 8, dtype=dtype))

    def block() -> None:
        handle = cache.begin(len(cache.frames), 3)
        model(torch.zeros(1, 3, 4, 16, 16), torch.zeros(1, 1), text, cache=handle)
        cache.commit(handle)

    for _ in range(3):
        block()
    counted = costs.pass_bytes(
        config, 3 * 64, 9 * 64, rotates_past=policy == "relative", bytes_per_value=dtype.itemsize
    )
    assert 0.75 < peak_bytes(block) / counted < 1.25


def test_published_sizes() -> None:
    """The arithmetic of the papers' models: cache per latent frame, keys of the text, the encoder of 5.7 G weights."""
    sizes = read_sizes("self_forcing_dmd")
    config = sizes.transformer
    assert sizes.parameters / 1e9 == pytest.approx(1.419, abs=1e-3) and sizes.geometry.tokens_per_frame == 1560
    assert costs.cache_bytes(config, 1560) / 1e6 == pytest.approx(287.5, abs=0.1)
    assert costs.text_bytes(config) / 1e6 == pytest.approx(94.4, abs=0.1)
    assert costs.cache_bytes(read_sizes("krea_14b").transformer, 1560) / 1e9 == pytest.approx(1.28, abs=0.01)
    five = read_sizes("wan2_2_5b")
    assert (five.geometry.tokens_per_frame, five.codec_config.z_dim) == (880, 48)
    assert costs.cache_bytes(five.transformer, 880) / 1e6 == pytest.approx(324, abs=1)
    assert sizes.text_bytes / 1e9 == pytest.approx(11.36, abs=0.01) and sizes.text_offloads


def test_the_encoders_weights_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from streamgen.umt5 import UMT5TextConfig

    sizes = {"vocab_size": 40, "num_layers": 2, "num_heads": 3}
    with torch.device("meta"):
        encoder = transformers.UMT5EncoderModel(
            transformers.UMT5Config(d_model=16, d_kv=4, d_ff=24, feed_forward_proj="gated-gelu", **sizes)
        )
    ours = UMT5TextConfig(weights="", text_dim=16, head_dim=4, ffn_dim=24, num_buckets=32, **sizes)
    assert umt5_parameters(ours) == sum(parameter.numel() for parameter in encoder.parameters())


def place(needs: fit.Demand, extra: int = 0, *, streams: int = 1, text: bool = True) -> fit.Place:
    """A device on which exactly so many streams fit, and so many bytes more."""
    wanted = needs.peak(streams, text=text) + extra
    total = round(wanted / (1 - fit.MARGIN)) + 2
    return fit.Place("cuda:9", total, total)


def test_what_fits(tiny: str) -> None:
    taehv = TaehvConfig(encoder_dim=8, latent_channels=4, decoder_dims=(8, 8, 8, 8))
    sizes = replace(read_sizes(tiny), text_offloads=True, text_bytes=10**8, codec_class=TaehvCodec, codec_config=taehv)
    needs = fit.demand(sizes, "bf16")
    room = place(needs, needs.stream - 100, streams=3)
    choice = fit.choose(sizes, room, "bf16")
    assert choice is not None and (choice.streams, choice.text, choice.dtype) == (3, True, "bf16")
    tight = fit.choose(sizes, place(needs, -100), "bf16")
    assert tight is not None and not tight.text and tight.streams > 1
    assert fit.choose(sizes, place(needs, -100, text=False), "bf16") is None
    assert fit.choose(replace(sizes, text_offloads=False), place(needs, -100), "bf16") is None
    why, advice = fit.shortage(sizes, place(needs, -100, text=False), "fp32")
    assert "does not fit cuda:9: one stream in fp32 takes" in why and "text encoder 0.1 GB" in why
    assert advice.startswith("take --dtype bf16, free memory")


def test_a_large_model_is_refused_before_it_is_loaded(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_mb", lambda: (0.3, 0.2))
    fit.guard(tiny, "cpu")  # a small one is let through
    fit.guard(tiny, "elsewhere")
    monkeypatch.setattr(fit, "LARGE_BYTES", 1)
    with pytest.raises(UserError, match=r"does not fit cpu: one stream in (fp32|bf16) takes .*, 0.185 MB can be used"):
        fit.guard(tiny, "cpu")
    monkeypatch.setattr(machine, "memory_mb", lambda: (1000.0, 900.0))
    fit.guard(tiny, "cpu")


def test_doctor_of_a_model(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--model", tiny, "--dtype", "fp32", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["checks"]}
    sizes = read_sizes(tiny)
    assert found["fp32 cache"]["found"] == fit.gigabytes(fit.demand(sizes, "fp32").kv)
    assert "streams in fp32" in found["cpu"]["found"] and "window 9, sink 1" in found["model"]["found"]
    monkeypatch.setattr(machine, "memory_mb", lambda: (0.3, 0.2))
    assert main(["doctor", "--model", tiny]) == 1
    assert "does not fit cpu" in capsys.readouterr().out
    for arguments, message in (
        (("--model", "nothing"), "or the name of a preset or config: wan2_2_5b, wan_14b, wan_1_3b"),
        (("--model", tiny, "--device", "cuda:7"), "--device 'cuda:7' is not here; there are: cpu"),
        (("--model", tiny, "--dtype", "fp8"), "--dtype 'fp8' does not exist"),
    ):
        assert main(["doctor", *arguments]) == 2
        assert message in one_line(capsys)


def test_a_checkpoint_of_somebody_else(tmp_path: Path) -> None:
    from tests import tiny_wan

    model = tiny_wan.transformer(channels=16)
    torch.save({"generator": {f"model.{name}": t for name, t in model.state_dict().items()}}, tmp_path / "model.pt")
    sizes = read_sizes(str(tmp_path / "model.pt"))
    assert replace(sizes.transformer, text_len=12) == model.config and sizes.scheduler.window_frames == 21
    assert any("counted as published" in note for note in sizes.notes)


def test_live_bytes() -> None:
    x = torch.zeros(1000)

    def work() -> torch.Tensor:
        y = x + 1  # 4000 bytes
        z = y + 1
        del y
        w = z.view(10, 100)  # no bytes
        del z
        return (w * 2).sum()

    assert peak_bytes(work) == 8000 + 4
