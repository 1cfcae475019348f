"""Recorded passes on a GPU: the same stream as without graphs and as by plain torch, over a ring that wraps."""

import pytest
import torch

from streamgen import ops
from streamgen.cache import CacheSpec, KVCache, QuantisedKVCache
from streamgen.capture import Captures
from streamgen.flow import step_sigmas
from streamgen.geometry import VideoGeometry
from streamgen.rollout import Sampling, StreamState, rollout_block
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
CONFIG = TransformerConfig(
    dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=32, text_len=16
)
GEOMETRY = VideoGeometry(height=64, width=96, latent_channels=4)


@pytest.fixture
def model() -> CausalWanModel:
    torch.manual_seed(0)
    made = CausalWanModel(CONFIG).to(CUDA, torch.bfloat16).eval().requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return made


@torch.no_grad()
def stream(model: CausalWanModel, policy: str, storage: str | None) -> list[torch.Tensor]:
    spec = CacheSpec(
        num_layers=2, num_heads=2, head_dim=128, grid_height=4, grid_width=6, window_frames=9, sink_frames=1,
        policy=policy,
    )  # fmt: skip
    cache = (
        KVCache(spec, dtype=torch.bfloat16, device=CUDA)
        if storage is None
        else QuantisedKVCache(spec, storage=storage, dtype=torch.bfloat16, device=CUDA)
    )
    state = StreamState(geometry=GEOMETRY, cache=cache, seeds=(5,), ops=model.ops)
    rows = torch.randn(2, 1, 1, 16, 32, generator=torch.Generator().manual_seed(3)).to(CUDA, torch.bfloat16)
    texts = [model.encode_text(one) for one in rows]
    sampling = Sampling(sigmas=step_sigmas(2, 5.0))
    return [
        rollout_block(model, state, texts[b > 4], sampling, transition="recache" if b == 5 else None) for b in range(8)
    ]


@pytest.mark.parametrize(("policy", "storage"), [("window", None), ("relative", None), ("window", "fp8")])
def test_graphs_change_nothing(model: CausalWanModel, policy: str, storage: str | None) -> None:
    plain = stream(model, policy, storage)
    model.ops = ops.select("triton")
    launched = stream(model, policy, storage)
    model.captures = Captures()
    replayed = stream(model, policy, storage)
    assert model.captures.problem == ""
    assert model.captures.replays >= 12
    for block, one in enumerate(replayed):
        # A library may choose another product in a graph; a buffer that was not filled differs by far more.
        for other, share in ((launched[block], 0.02), (plain[block], 0.1)):
            assert float((one - other).abs().max()) < share * float(other.abs().max())


@torch.no_grad()
def test_steady_state_allocates_nothing(model: CausalWanModel) -> None:
    """Once a ring is full and its passes are recorded, no block asks the driver for memory."""
    model.ops, model.captures = ops.select("triton"), Captures()
    spec = CacheSpec(num_layers=2, num_heads=2, head_dim=128, grid_height=4, grid_width=6, window_frames=9)
    cache = KVCache(spec, dtype=torch.bfloat16, device=CUDA)
    state = StreamState(geometry=GEOMETRY, cache=cache, seeds=(5,), ops=model.ops)
    text = model.encode_text(torch.randn(1, 1, 16, 32, device=CUDA, dtype=torch.bfloat16))
    counts = []
    for _ in range(12):
        rollout_block(model, state, text, Sampling(sigmas=step_sigmas(2, 5.0)))
        counts.append(torch.cuda.memory_stats()["num_device_alloc"])
    assert model.captures.replays > 20 and counts[-1] == counts[6]
