"""Keys and values in one byte: the error is bounded, the bytes are half, and saved states are exact."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from streamgen import StreamPipeline
from streamgen.attention import attend
from streamgen.cache import STORAGES, CacheSpec, KVCache, QuantisedKVCache, RowsCache
from streamgen.cache.quantised import dequantise, quantise
from streamgen.errors import UserError
from streamgen.stream import Stream
from tests.command_line import STAR, one_line, stream_command, y4m_frames
from tests.tiny_model import save_tiny_model

LAYERS, HEADS, TOKENS, WIDTH = 2, 3, 6, 64
FRAMES, WINDOW, SINK = 2, 7, 1
ERROR = {"int8": 0.012, "fp8": 0.04}
"""Of attention's output, relative: half a code of 127, and 3 bits after the point, each in two factors."""


def spec(policy: str) -> CacheSpec:
    return CacheSpec(
        num_layers=LAYERS,
        num_heads=HEADS,
        head_dim=WIDTH,
        grid_height=2,
        grid_width=3,
        window_frames=WINDOW,
        sink_frames=SINK,
        policy=policy,
    )


def new(policy: str, storage: str, **options: object) -> QuantisedKVCache:
    return QuantisedKVCache(spec(policy), storage=storage, **options)  # type: ignore[arg-type]


def tensors(seed: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block, some channels ten times as large as others."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, FRAMES * TOKENS, WIDTH)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    k[..., :2] *= 10
    return q / 4, k, v


def advance(cache: KVCache, block: int, passes: int = 2) -> list[Tensor]:
    """Blocks of FRAMES; attention's output in each layer, in the last pass."""
    handle, out = cache.begin(FRAMES * block, FRAMES), []
    for number in range(passes):
        out = []
        for layer in range(LAYERS):
            q, k, v = (t.to(cache.read_k.dtype) for t in tensors(100 * block + 10 * layer + number))
            out.append(attend(q, *handle.append(layer, k, v)).clone())
    cache.commit(handle)
    return out


@pytest.mark.parametrize("storage", list(STORAGES))
def test_a_row_is_brought_back_to_half_a_code(storage: str) -> None:
    x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 3, 50)[:, None]
    codes, scale = quantise(x, STORAGES[storage])
    back = dequantise(codes, scale, torch.empty_like(x))
    assert codes.dtype == STORAGES[storage].dtype and scale.shape == (50, 1)
    largest = x.abs().amax(1, keepdim=True)
    half_a_code = (0.5 / 127 if storage == "int8" else 2.0**-4) * 1.01
    assert ((back - x).abs() <= half_a_code * largest).all()
    assert dequantise(*quantise(torch.zeros(2, 4), STORAGES[storage]), torch.ones(2, 4)).abs().max() == 0


@pytest.mark.parametrize("policy", ["window", "relative"])
@pytest.mark.parametrize("storage", list(STORAGES))
def test_attention_is_off_by_a_bounded_error(storage: str, policy: str) -> None:
    exact, cache = KVCache(spec(policy)), new(policy, storage)
    for block in range(8):
        for layer, (want, got) in enumerate(zip(advance(exact, block), advance(cache, block), strict=True)):
            error = ((got - want).norm() / want.norm()).item()
            assert error < ERROR[storage], (block, layer)
            assert (error == 0) == (block == 0)  # a block itself is seen as it is


def test_half_the_bytes() -> None:
    for policy, buffers in (("window", 2), ("relative", 3)):
        cache = new(policy, "int8", dtype=torch.bfloat16)
        half = KVCache(spec(policy), dtype=torch.bfloat16)
        held = sum(buffer.nbytes for buffer in cache.stored.values())
        assert 2 * half.k.nbytes / held > 1.9
        scratch = 2 * half.k[0].nbytes
        assert half.nbytes() == buffers * half.k.nbytes and cache.nbytes() == held + scratch


@pytest.mark.parametrize("policy", ["window", "relative"])
@pytest.mark.parametrize("storage", list(STORAGES))
def test_a_saved_state_goes_on_to_the_bit(storage: str, policy: str) -> None:
    cache = new(policy, storage)
    for block in range(5):
        advance(cache, block)
    state, other = cache.state_dict(), new(policy, storage)
    advance(other, 0)
    other.reset()
    other.load_state_dict(state)
    again = other.state_dict()
    for name in ("k", "v", "k_scale", "v_scale"):
        assert torch.equal(state[name].float(), again[name].float())
    for block in range(5, 8):
        for one, two in zip(advance(cache, block), advance(other, block), strict=True):
            assert torch.equal(one, two)


def test_a_state_of_another_storage_is_refused() -> None:
    cache = new("window", "int8")
    advance(cache, 0)
    state = cache.state_dict()
    with pytest.raises(ValueError, match=r"storage 'int8' \(this cache: None\)"):
        KVCache(spec("window")).load_state_dict(state)
    with pytest.raises(ValueError, match=r"dtype 'float32' \(this cache: 'bfloat16'\)"):
        new("window", "int8", dtype=torch.bfloat16).load_state_dict(state)
    with pytest.raises(ValueError, match="cache dtype 'int4' does not exist; there are: int8"):
        new("window", "int4")


@pytest.mark.parametrize("policy", ["window", "relative"])
def test_a_failed_pass_and_a_peek_change_nothing_that_is_seen(policy: str) -> None:
    cache, disturbed = new(policy, "int8"), new(policy, "int8")
    for block in range(6):
        want = advance(cache, block)
        handle = disturbed.begin(FRAMES * block, FRAMES)
        handle.append(0, *tensors(7)[1:])  # a pass that broke off after a layer
        if block >= 2:
            before = disturbed.state_dict()
            peek = disturbed.begin(FRAMES * block, FRAMES, peek=True)
            for layer in range(LAYERS):
                peek.append(layer, *tensors(8)[1:])
            after = disturbed.state_dict()
            assert all(torch.equal(before[name], after[name]) for name in disturbed.stored)
        for one, two in zip(want, advance(disturbed, block), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("policy", ["window", "relative"])
def test_with_gradients_and_from_a_snapshot(policy: str) -> None:
    cache = new(policy, "int8")
    for block in range(4):
        advance(cache, block)
    handle = cache.begin(4 * FRAMES, FRAMES)
    frozen = handle.snapshot()
    for layer in range(LAYERS):
        q, k, v = tensors(50 + layer)
        k.requires_grad_(True)
        kept = [t.clone() for t in cache.stored.values()]
        out = attend(q, *handle.append(layer, k, v))
        assert all(torch.equal(one, two) for one, two in zip(kept, cache.stored.values(), strict=True))
        assert torch.equal(out, attend(q, *frozen.append(layer, k, v)))
        out.sum().backward()
        assert k.grad is not None
        with torch.no_grad():
            plain = attend(q, *handle.append(layer, k, v))
        torch.testing.assert_close(out.detach(), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache", ["window", "relative"])
def test_a_stream_resumes_and_shares_forwards_to_the_bit(tmp_path: Path, cache: str) -> None:
    pipe = StreamPipeline.from_pretrained(save_tiny_model(tmp_path / "model"), dtype="fp32")

    def frames(stream: Stream, count: int) -> np.ndarray:
        return np.concatenate([next(stream).frames for _ in range(count)])

    stream = pipe.stream("a red star", seed=3, cache=cache, cache_dtype="int8")
    frames(stream, 5)
    stream.save_state(tmp_path / "state")
    resumed = pipe.resume(tmp_path / "state")
    assert resumed.state.cache.stored_as == "int8"
    assert np.array_equal(frames(resumed, 4), frames(stream, 4))

    caches = [pipe.new_cache(cache, stored_as="int8") for _ in range(2)]
    q, k, v = (torch.randn(2, *shape) for shape in [(caches[0].spec.num_heads, 12, caches[0].spec.head_dim)] * 3)
    tokens = 2 * caches[0].spec.tokens_per_frame
    q, k, v = (t[:, :, :1].repeat(1, 1, tokens, 1) for t in (q, k, v))
    together = RowsCache([one.begin(0, 2) for one in caches]).attend(0, q, k, v, "sdpa")
    for row, one in enumerate(caches):
        here = slice(row, row + 1)
        alone = attend(q[here], *one.begin(0, 2).append(0, k[here], v[here]))
        assert torch.equal(together[here], alone)
    with pytest.raises(UserError, match="cache dtype 'int4' does not exist; there are: int8"):
        pipe.stream("a red star", cache_dtype="int4")


def test_the_option(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = stream_command(str(save_tiny_model(in_tmp_path / "model")))
    assert run(STAR, "--cache-dtype", "int8", "--save-state", "s", "--quiet") == 0
    exact = y4m_frames("out.y4m")
    assert run(STAR, "--overwrite", "--quiet") == 0
    assert len(exact) == len(y4m_frames("out.y4m"))
    capsys.readouterr()
    for arguments, message in (
        (("--resume", "s", "--cache-dtype", "fp8"), "--cache-dtype fp8: the saved stream goes on with int8"),
        ((STAR, "--cache-dtype", "int4"), "--cache-dtype 'int4' does not exist; there are: int8, fp8"),
        ((STAR, "--cache-dtype", "int8", "--schedule", "step_chain", "--ranks", "2"), "leave it or --ranks out"),
        ((STAR, "--attention", "math", "--schedule", "step_chain", "--ranks", "2"), "--attention is for one rank"),
        ((STAR, "--ops", "reference", "--schedule", "step_chain", "--ranks", "2"), "--ops is for one rank"),
    ):
        assert run(*arguments, "--overwrite") == 2
        assert message in one_line(capsys)
