"""The transformer against Wan's formulas written out, and its three uses against each other (fp32, 1e-5)."""

import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamgen.ops import Ops, select
from streamgen.rope import apply_rope, rope_table
from streamgen.transformer import CausalWanModel, sinusoid
from streamgen.transformer_config import TransformerConfig
from streamgen.visibility import block_causal_mask, teacher_forcing_mask

SMALL = {
    "dim": 48,
    "ffn_dim": 80,
    "num_heads": 3,
    "num_layers": 2,
    "in_channels": 5,
    "out_channels": 4,
    "freq_dim": 32,
    "text_dim": 12,
    "text_len": 7,
}


def make(**changes) -> CausalWanModel:
    """A small model with weights that leave no term at zero."""
    model = CausalWanModel(TransformerConfig(**{**SMALL, **changes}))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.15)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
            parameter.data += 1
    return model.eval().requires_grad_(False)


def inputs(frames, *, batch=2, height=4, width=6, channels=5, groups=1):
    latents = torch.randn(batch, frames, channels, height, width)
    timestep = torch.rand(batch, frames) * 1000
    return latents, timestep, torch.randn(batch, groups, 7, 12)


def table(frames, height=4, width=6):
    return rope_table(frames, height // 2, width // 2, 16)


def wan_forward(model, latents, timestep, text, frames) -> Tensor:
    """Wan's forward, written from its formulas for one text and full attention; parameters are read by name."""
    p, c = dict(model.named_parameters()), model.config
    B, frame_count = latents.shape[:2]

    def linear(name, x):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def layer_norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + c.eps).sqrt()

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def heads(name, x, norm=None):
        x = linear(name, x)
        if norm and c.qk_norm:
            x = x / (x.square().mean(-1, keepdim=True) + c.eps).sqrt() * p[norm + ".weight"]
        return x.view(*x.shape[:-1], c.num_heads, c.head_dim).transpose(1, 2)

    def attention(q, k, v):
        out = ((q @ k.mT) / math.sqrt(c.head_dim)).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)

    x = F.conv3d(latents.transpose(1, 2), p["patch_embedding.weight"], p["patch_embedding.bias"], stride=c.patch)
    tokens_per_frame = x.shape[-1] * x.shape[-2]
    grid = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)

    half = c.freq_dim // 2
    angles = timestep.double()[..., None] * torch.tensor([10000 ** (-i / half) for i in range(half)]).double()
    wave = torch.cat([angles.cos(), angles.sin()], -1).float()
    e = linear("time_embedding.2", F.silu(linear("time_embedding.0", wave)))
    context = linear("text_embedding.2", gelu(linear("text_embedding.0", text)))
    if c.pooled_text:
        e = e + linear("pooled_embedding.2", F.silu(linear("pooled_embedding.0", text.mean(1))))[:, None]
    e0 = linear("time_projection.1", F.silu(e)).view(B, frame_count, 6, c.dim)

    def per_token(row):
        return row.repeat_interleave(tokens_per_frame, dim=1)

    rope = rope_table(frames, *grid, c.head_dim)
    for i in range(c.num_layers):
        name = f"blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2 = (per_token(row) for row in (p[name + ".modulation"] + e0).unbind(2))
        y = layer_norm(x) * (1 + scale) + shift
        q = apply_rope(heads(name + ".self_attn.q", y, name + ".self_attn.norm_q"), *rope)
        k = apply_rope(heads(name + ".self_attn.k", y, name + ".self_attn.norm_k"), *rope)
        y = attention(q, k, heads(name + ".self_attn.v", y))
        x = x + linear(name + ".self_attn.o", y) * gate
        y = layer_norm(x) * p[name + ".norm3.weight"] + p[name + ".norm3.bias"] if c.cross_attn_norm else x
        q = heads(name + ".cross_attn.q", y, name + ".cross_attn.norm_q")
        k = heads(name + ".cross_attn.k", context, name + ".cross_attn.norm_k")
        y = attention(q, k, heads(name + ".cross_attn.v", context))
        x = x + linear(name + ".cross_attn.o", y)
        y = layer_norm(x) * (1 + scale2) + shift2
        x = x + linear(name + ".ffn.2", gelu(linear(name + ".ffn.0", y))) * gate2
    shift, scale = (per_token(row) for row in (p["head.modulation"] + e[:, :, None]).unbind(2))
    x = linear("head.head", layer_norm(x) * (1 + scale) + shift)
    x = x.view(B, frame_count, *grid, *c.patch, c.out_channels)
    return torch.einsum("bfhwpqrc->bfpchqwr", x).reshape(B, frame_count, c.out_channels, *latents.shape[-2:])


class ListCache:
    """The plainest cache with absolute positions: Python lists of frames, concatenated at every read."""

    def __init__(self, num_layers, tokens_per_frame, window, sink):
        self.layers = [[] for _ in range(num_layers)]  # per layer: (frame, k, v) rotated
        self.tokens, self.window, self.sink = tokens_per_frame, window, sink

    def begin(self, start, frames, **size):
        self.current = list(range(start, start + frames))
        self.table = table(self.current, **size)
        for layer in self.layers:
            while self.window is not None and len(layer) + frames > self.window:
                layer.pop(self.sink)
        self.staged = {}
        return self

    def rope(self):
        return self.table

    def append(self, layer, k, v):
        k = apply_rope(k, *self.table)
        frames = list(zip(self.current, k.split(self.tokens, 2), v.split(self.tokens, 2), strict=True))
        self.staged[layer] = frames
        visible = self.layers[layer] + frames
        return torch.cat([k for _, k, _ in visible], 2), torch.cat([v for _, _, v in visible], 2)

    def commit(self):
        for layer, frames in self.staged.items():
            self.layers[layer] += frames


@pytest.mark.parametrize(
    "changes",
    [{}, {"pooled_text": True}, {"patch": (1, 1, 3)}, {"qk_norm": False}, {"cross_attn_norm": False}],
    ids=str,
)
def test_equals_wan_written_out(changes):
    model = make(**changes)
    latents, timestep, text = inputs(3)
    grid = (4 // model.config.patch[1], 6 // model.config.patch[2])
    got = model(latents, timestep, model.encode_text(text), rope=rope_table([4, 5, 9], *grid, 16))
    wanted = wan_forward(model, latents, timestep, text[:, 0], [4, 5, 9])
    assert wanted.std() > 0.3
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_parameters_have_wan_names():
    names = set(make().state_dict())
    one_block = {name.removeprefix("blocks.1.") for name in names if name.startswith("blocks.1.")}
    affine = ("weight", "bias")
    assert one_block == (
        {"modulation"}
        | {f"{a}.{m}.{p}" for a in ("self_attn", "cross_attn") for m in "qkvo" for p in affine}
        | {f"{a}.norm_{m}.weight" for a in ("self_attn", "cross_attn") for m in "qk"}
        | {f"{m}.{p}" for m in ("norm3", "ffn.0", "ffn.2") for p in affine}
    )
    assert {name for name in names if not name.startswith("blocks.")} == {"head.modulation"} | {
        f"{module}.{p}"
        for module in (
            "patch_embedding",
            "text_embedding.0",
            "text_embedding.2",
            "time_embedding.0",
            "time_embedding.2",
            "time_projection.1",
            "head.head",
        )
        for p in affine
    }
    with torch.device("meta"):
        wan = CausalWanModel(
            TransformerConfig(
                dim=1536,
                ffn_dim=8960,
                num_heads=12,
                num_layers=30,
                in_channels=16,
                out_channels=16,
                text_dim=4096,
                text_len=512,
            )
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in wan.state_dict().items()}
    assert shapes["patch_embedding.weight"] == (1536, 16, 1, 2, 2)
    assert shapes["time_projection.1.weight"] == (9216, 1536)
    assert shapes["blocks.29.modulation"] == (1, 6, 1536) and shapes["head.modulation"] == (1, 2, 1536)
    assert shapes["head.head.weight"] == (64, 1536) and shapes["time_embedding.0.weight"] == (1536, 256)
    assert sum(p.numel() for p in wan.parameters()) == 1_418_996_800


CASES = [
    ([3] * 6, None, 0, 4, 6),
    ([3] * 6, 9, 3, 4, 6),
    ([3] * 6, 9, 0, 6, 2),
    ([3] * 7, 13, 1, 2, 10),
    ([1, 3, 3, 3, 3], 8, 2, 4, 6),
    ([1] * 6, 3, 1, 16, 32),  # 128 tokens a frame
    ([2, 2, 2, 2], 4, 1, 2, 2),
]


@pytest.mark.parametrize(("sizes", "window", "sink", "height", "width"), CASES, ids=str)
def test_cached_streaming_equals_one_masked_forward(sizes, window, sink, height, width):
    model = make()
    total = sum(sizes)
    latents, timestep, text = inputs(total, height=height, width=width)
    context = model.encode_text(text)
    tokens = height * width // 4
    mask = block_causal_mask(sizes, tokens, window_frames=window, sink_frames=sink)
    rope = table(range(total), height, width)
    wanted = model(latents, timestep, context, rope=rope, mask=mask)
    cache, start = ListCache(2, tokens, window, sink), 0
    for size in sizes:
        now = slice(start, start + size)
        block = cache.begin(start, size, height=height, width=width)
        got = model(latents[:, now], timestep[:, now], context, cache=block)
        torch.testing.assert_close(got, wanted[:, now], atol=1e-5, rtol=0)
        cache.commit()
        start += size


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (9, 3)])
def test_teacher_forcing_equals_streaming(window, sink, backend):
    """Noisy block b of the joined forward = the block streamed after clean blocks, whose text may differ."""
    sizes = [3] * 5
    model = make(pooled_text=True)
    model.attention_backend = backend
    clean, _, text = inputs(15, groups=5)
    noisy, timestep, _ = inputs(15)
    mask = teacher_forcing_mask(sizes, 6, window_frames=window, sink_frames=sink)
    rope = table([*range(15), *range(15)])
    out = model(
        torch.cat([clean, noisy], 1),
        torch.cat([torch.zeros_like(timestep), timestep], 1),
        model.encode_text(text),
        rope=rope,
        mask=mask,
        text_repeats=2,
    )
    cache = ListCache(2, 6, window, sink)
    for b in range(5):
        now = slice(3 * b, 3 * b + 3)
        context = model.encode_text(text[:, b : b + 1])
        got = model(noisy[:, now], timestep[:, now], context, cache=cache.begin(3 * b, 3))
        torch.testing.assert_close(got, out[:, 15:][:, now], atol=1e-5, rtol=0)
        got = model(clean[:, now], torch.zeros(2, 1), context, cache=cache)  # one level for all frames
        torch.testing.assert_close(got, out[:, :15][:, now], atol=1e-5, rtol=0)
        cache.commit()


@pytest.mark.parametrize("batch", [1, 2])
def test_one_level_for_all_frames(batch):
    model = make(pooled_text=True)
    latents, timestep, text = inputs(6, batch=batch, groups=2)
    context = model.encode_text(text)
    one = model(latents, timestep[:, :1], context, rope=table(range(6)))
    each = model(latents, timestep[:, :1].expand(-1, 6), context, rope=table(range(6)))
    torch.testing.assert_close(one, each, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_a_level_needs_is_made_once_for_a_prompt():
    torch.manual_seed(0)
    model = make(pooled_text=True)
    embedded = []
    model.time_embedding.register_forward_hook(lambda *_: embedded.append(1))
    latents, _, rows = inputs(2, batch=1)
    text, other = model.encode_text(rows), model.encode_text(rows + 1)
    assert text.levels == {} and other.levels is not text.levels
    wanted = {}
    for at, context in (("a", text), ("b", other)):
        for level in (937.5, 500.0):
            nothing_kept = context._replace(levels=None)
            wanted[at, level] = model(latents, torch.tensor([[level]]), nothing_kept, rope=table(range(2)))
    assert len(embedded) == 4
    for _ in range(3):
        for (at, level), out in wanted.items():
            context = text if at == "a" else other
            assert torch.equal(model(latents, torch.tensor([[level]]), context, rope=table(range(2))), out)
    assert len(embedded) == 8 and set(text.levels) == set(other.levels) == {937.5, 500.0}
    assert not torch.equal(wanted["a", 500.0], wanted["b", 500.0])


def test_levels_are_kept_for_a_stream_alone_and_without_gradients():
    model = make(pooled_text=True)
    one, two = inputs(2, batch=1), inputs(2, batch=2)
    level = torch.tensor([[500.0]])
    for latents, timestep, rows, grad in (
        (two[0], level.expand(2, 1), two[2], False),
        (one[0], torch.rand(1, 2), one[2], False),
        (one[0], level, inputs(2, batch=1, groups=2)[2], False),
        (one[0], level, one[2], True),
    ):
        with torch.set_grad_enabled(grad):
            text = model.encode_text(rows)
            model(latents, timestep, text, rope=table(range(2)))
        assert text.levels == {}


def test_new_model_predicts_zero_and_ignores_the_pooled_text():
    model = CausalWanModel(TransformerConfig(**SMALL, pooled_text=True))
    latents, timestep, text = inputs(3)
    context = model.encode_text(text)
    assert context.pooled_BGD is not None and context.pooled_BGD.abs().max() == 0
    assert model(latents, timestep, context, rope=table(range(3))).abs().max() == 0


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_training_step_is_one_graph(backend):
    """Compiled whole (no break), and its gradients are those of eager."""
    model = make(pooled_text=True).requires_grad_(True)
    model.attention_backend = backend
    latents, timestep, text = inputs(12, groups=2)
    mask, rope = teacher_forcing_mask([3, 3], 6), table([*range(6), *range(6)])

    def loss(latents, timestep, text):
        context = model.encode_text(text)
        return model(latents, timestep, context, rope=rope, mask=mask, text_repeats=2).square().mean()

    parameters = list(model.parameters())
    wanted = torch.autograd.grad(loss(latents, timestep, text), parameters)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(latents, timestep, text), parameters)
    for (name, _), a, b in zip(model.named_parameters(), got, wanted, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_bfloat16_model_keeps_the_clock_exact():
    """Timesteps stay float32 to the sinusoid: in bfloat16 they would cost 0.6 (facts/parity.md)."""
    model = make()
    latents, _, text = inputs(3)
    timestep = torch.full((2, 3), 937.5)
    wanted = model(latents, timestep, model.encode_text(text), rope=table(range(3)))
    half = model.bfloat16()
    got = half(latents, timestep, half.encode_text(text.bfloat16()), rope=table(range(3)))
    assert got.dtype == latents.dtype
    assert (got - wanted).square().mean().sqrt() < 0.02 * wanted.std()


def test_sinusoid_keeps_fractions_cosine_first():
    wave = sinusoid(torch.tensor([[937.5]]), 256)[0, 0]
    assert wave.dtype == torch.float64 and wave.shape == (256,)
    assert wave[0].item() == pytest.approx(math.cos(937.5)) and wave[128].item() == pytest.approx(math.sin(937.5))
    assert wave[127].item() == pytest.approx(math.cos(937.5 * 10000 ** (-127 / 128)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 50}, "dim=50"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"patch": (2, 2, 2)}, "patch="),
        ({"prediction": "eps"}, "prediction='eps'"),
        ({"freq_dim": 3}, "freq_dim=3"),
    ],
    ids=str,
)
def test_bad_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**SMALL, **change})


def test_ops_report_what_runs():
    active = make().ops.active()
    assert set(active) == {field.name for field in fields(Ops)} >= {"layer_norm_modulate", "rms_norm_rope", "gelu_tanh"}
    assert set(active.values()) == {"streamgen.ops"}
    with pytest.raises(ValueError, match=r"backend='cuda9'.*reference"):
        select("cuda9")


def test_bad_calls_are_named():
    model = make()
    latents, timestep, text = inputs(3, groups=2)
    context = model.encode_text(text)
    with pytest.raises(ValueError, match="rope=None"):
        model(latents, timestep, context)
    with pytest.raises(ValueError, match="3 frames"):
        model(latents, timestep, context, rope=table(range(3)))
    with pytest.raises(ValueError, match="text of shape"):
        model.encode_text(text[..., :5])
