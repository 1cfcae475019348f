"""The ring against a model of lists, staging, and saved states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamgen.cache import POLICIES, CacheSpec, KVCache
from streamgen.rope import apply_rope, rope_table

NEVER_CHANGED = [name for name, policy in sorted(POLICIES.items()) if policy.committed is None]
"""Policies under which keys stay what they were."""

GRID, LAYERS, HEADS, WIDTH = (1, 2), 2, 2, 6
TOKENS = GRID[0] * GRID[1]


def make(window: int, sink: int, policy: str = "relative", **options: object) -> KVCache:
    spec = CacheSpec(
        num_layers=LAYERS,
        num_heads=HEADS,
        head_dim=WIDTH,
        grid_height=GRID[0],
        grid_width=GRID[1],
        window_frames=window,
        sink_frames=sink,
        policy=policy,
    )
    return KVCache(spec, **options)  # type: ignore[arg-type]


def tagged(frames: list[int], layer: int, version: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values that depend on frame, token, layer and version alone."""
    generators = [torch.Generator().manual_seed(1000 * version + 100 * layer + f) for f in frames]
    k = [torch.randn(1, HEADS, TOKENS, WIDTH, generator=g) for g in generators]
    v = [torch.randn(1, HEADS, TOKENS, WIDTH, generator=g) for g in generators]
    return torch.cat(k, 2), torch.cat(v, 2)


def by_content(keys: Tensor, values: Tensor) -> list[list[float]]:
    """Rows (key, value) as a set in canonical order: attention does not see the order of keys."""
    rows = torch.cat([keys, values], -1)[0].transpose(0, 1).flatten(1)
    return sorted(rows.tolist())


def expected(visible: list[int], versions: dict[int, int], layer: int, policy: str) -> tuple[Tensor, Tensor]:
    parts = [tagged([frame], layer, versions[frame]) for frame in visible]
    positions = visible if policy == "window" else range(len(visible))
    table = rope_table(list(positions), *GRID, WIDTH)
    return apply_rope(torch.cat([k for k, _ in parts], 2), *table), torch.cat([v for _, v in parts], 2)


operations = st.lists(
    st.tuples(
        st.sampled_from(["block"] * 6 + ["fail", "reset", "recache", "reload", "recache all"]),
        st.integers(1, 4),  # frames of a block
        st.integers(1, 3),  # passes before the commit pass
    ),
    min_size=8,
    max_size=25,
)


@settings(max_examples=60)
@given(policy=st.sampled_from(NEVER_CHANGED), window=st.integers(2, 9), sink=st.integers(0, 4), operations=operations)
def test_ring_equals_a_list(policy: str, window: int, sink: int, operations: list[tuple[str, int, int]]) -> None:
    """Blocks of any sizes, failed launches, recaches, resets and reloads; the model keeps a plain list of frames."""
    sink = min(sink, window - 1)
    cache = make(window, sink, policy)
    held: list[int] = []
    versions: dict[int, int] = {}
    failed_size = 0  # a block that failed is made again with the same size
    next_frame = 0
    pointers = (cache.k.data_ptr(), cache.v.data_ptr(), cache.read_k.data_ptr())
    for number, (operation, size, passes) in enumerate(operations, start=1):
        size = min(size, window - sink)
        if operation in ("block", "fail"):
            size = failed_size or size
            frames = list(range(next_frame, next_frame + size))
            seen = held + frames
            seen = seen[:sink] + seen[sink:][-(window - sink) :]
            block = cache.begin(next_frame, size)
            assert block.visible_frames == seen
            assert block.q_positions == (frames if policy == "window" else list(range(len(seen) - size, len(seen))))
            for attempt in range(passes + 1):
                version = number if attempt == passes else -attempt - 1
                for layer in range(LAYERS if operation == "block" else 1):  # a launch that fails between layers
                    got = block.append(layer, *tagged(frames, layer, version))
                    want = expected(seen, {**versions, **dict.fromkeys(frames, version)}, layer, policy)
                    assert torch.allclose(torch.tensor(by_content(*got)), torch.tensor(by_content(*want)), atol=1e-5)
                    assert got[0].untyped_storage().data_ptr() == cache.read_k.untyped_storage().data_ptr()
            if operation == "block":
                cache.commit(block)
                held, next_frame = seen, next_frame + size
                versions.update(dict.fromkeys(frames, number))
                failed_size = 0
            else:
                failed_size = size
                with pytest.raises(RuntimeError, match="1 of 2 layers"):
                    cache.commit(block)
        elif operation == "reset":
            cache.reset()
            held, failed_size = [], 0
            next_frame += passes  # a new shot may start anywhere
        elif operation == "reload":
            fresh = make(window, sink, policy)
            fresh.load_state_dict(cache.state_dict())
            cache, pointers = fresh, (fresh.k.data_ptr(), fresh.v.data_ptr(), fresh.read_k.data_ptr())
        else:
            protect = operation == "recache"
            frames = held[sink:] if protect else held
            if not frames:
                with pytest.raises(ValueError, match="nothing to re-encode"):
                    cache.begin_recache(protect_sink=protect)
                continue
            block = cache.begin_recache(protect_sink=protect)
            for layer in range(LAYERS):
                got = block.append(layer, *tagged(frames, layer, number))
                want = expected(held, {**versions, **dict.fromkeys(frames, number)}, layer, policy)
                assert torch.allclose(torch.tensor(by_content(*got)), torch.tensor(by_content(*want)), atol=1e-5)
            cache.commit(block)
            versions.update(dict.fromkeys(frames, number))
        assert cache.frames == held
        assert cache.fill() == (len(held), window)
        assert pointers == (cache.k.data_ptr(), cache.v.data_ptr(), cache.read_k.data_ptr())


def advance(cache: KVCache, start: int, size: int = 3) -> None:
    block = cache.begin(start, size)
    for layer in range(LAYERS):
        block.append(layer, *(t.to(cache.k.dtype) for t in tagged(list(range(start, start + size)), layer)))
    cache.commit(block)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_exact_and_goes_on_exactly(policy: str, dtype: torch.dtype) -> None:
    cache = make(7, 2, policy, dtype=dtype)
    for start in range(0, 15, 3):
        advance(cache, start)
        other = make(7, 2, policy, dtype=dtype)
        other.load_state_dict(cache.state_dict())
        assert other.frames == cache.frames
        a, b = cache.begin(start + 3, 3), other.begin(start + 3, 3)
        k, v = (t.to(dtype) for t in tagged([99, 98, 97], 0))
        for one, two in zip(a.append(0, k, v), b.append(0, k, v), strict=True):
            assert one.dtype == dtype and torch.equal(one, two)


def test_state_is_a_copy() -> None:
    cache = make(6, 0)
    advance(cache, 0)
    state = cache.state_dict()
    before = state["k"].clone()
    for start in (3, 6, 9):
        advance(cache, start)
    assert torch.equal(state["k"], before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 8}, r"window_frames 7 \(this cache: 8\)"),
        ({"sink": 1}, r"sink_frames 2 \(this cache: 1\)"),
        ({"policy": "window"}, r"policy 'relative' \(this cache: 'window'\)"),
        ({"dtype": torch.bfloat16}, r"dtype 'float32' \(this cache: 'bfloat16'\)"),
        ({"batch": 2}, r"batch 1 \(this cache: 2\)"),
    ],
)
def test_state_of_another_cache_is_refused_by_name(options: dict, message: str) -> None:
    state = make(7, 2).state_dict()
    with pytest.raises(ValueError, match=message):
        make(**{"window": 7, "sink": 2, **options}).load_state_dict(state)


def test_state_with_a_wrong_tensor_is_refused() -> None:
    cache = make(7, 2)
    advance(cache, 0)
    state = cache.state_dict()
    with pytest.raises(ValueError, match="tensor 'v'"):
        make(7, 2).load_state_dict({**state, "v": state["v"][..., :-1, :]})


@pytest.mark.parametrize(("window", "sink"), [(0, 0), (3, 3), (3, 4), (3, -1)])
def test_impossible_windows_are_refused(window: int, sink: int) -> None:
    with pytest.raises(ValueError, match="window"):
        make(window, sink)


def test_misuse_says_what_is_wrong() -> None:
    cache = make(5, 3)
    with pytest.raises(ValueError, match=r"block of 3 latent frames.*window of 5 with a sink of 3.*4\.\.5"):
        cache.begin(0, 3)
    advance(cache, 0, 2)
    with pytest.raises(ValueError, match="starts at latent frame 5, but the cache continues at 2"):
        cache.begin(5, 2)
    stale = cache.begin(2, 2)
    advance(cache, 2, 2)
    with pytest.raises(RuntimeError, match="stale"):
        cache.commit(stale)
    with pytest.raises(ValueError, match=r"unknown cache policy 'absolute'; there are: ema_sink, relative, window"):
        make(5, 3, "absolute")


def test_reads_are_prefix_views_without_copies() -> None:
    cache = make(7, 1, "window")
    for start in range(0, 12, 3):
        block = cache.begin(start, 3)
        for layer in range(LAYERS):
            keys, values = block.append(layer, *tagged([0, 1, 2], layer))
            for view, buffer in ((keys, cache.k[layer]), (values, cache.v[layer])):
                assert view.data_ptr() == buffer.data_ptr() and view.stride() == buffer.stride()
                assert view.shape[2] == TOKENS * min(start + 3, 7)
        cache.commit(block)


def test_bytes_count_the_scratch() -> None:
    per_buffer = LAYERS * HEADS * 7 * TOKENS * WIDTH * 4
    assert make(7, 1, "window").nbytes() == 2 * per_buffer
    assert make(7, 1, "relative").nbytes() == 3 * per_buffer


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_with_gradients_nothing_is_written_and_the_context_is_constant(policy: str) -> None:
    cache = make(7, 1, policy)
    for start in (0, 3, 6):
        advance(cache, start)
    before = cache.state_dict()
    plain, traced = cache.begin(9, 3), cache.begin(9, 3)
    k, v = tagged([9, 10, 11], 0)
    k_grad, v_grad = k.clone().requires_grad_(), v.clone().requires_grad_()
    keys, values = traced.append(0, k_grad, v_grad)
    assert all(torch.equal(before[name], cache.state_dict()[name]) for name in ("k", "v"))
    (keys.sum() + values.sum()).backward()
    assert torch.equal(v_grad.grad, torch.ones_like(v)) and k_grad.grad is not None
    assert by_content(keys.detach(), values.detach()) == by_content(*plain.append(0, k, v))
    with pytest.raises(RuntimeError, match="0 of 2 layers"):
        cache.commit(traced)
