"""Eight bits: codes are those of the cache, products of codes are exact, and what is no number format is refused."""

import pytest
import torch

from streamgen.cache.quantised import STORAGES, quantise
from streamgen.kernel_choice import float8_product
from streamgen.ops import kernel_linear
from streamgen.quantised_linear import QuantisedLinear, bytes_saved, quantise_weights
from streamgen.rope import rope_table
from streamgen_kernels import norm_rope_store
from streamgen_kernels.linear import linear, scaled_product
from streamgen_kernels.quantise import quantise_rows

BOTH = pytest.mark.parametrize("storage", STORAGES)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_comes_back_to_half_a_step(device, storage, dtype):
    torch.manual_seed(0)
    x = (torch.randn(40, 20, device=device) * torch.logspace(-3, 3, 40, device=device)[:, None]).to(dtype)
    x[3], x[4, 1:] = 0, 0
    q, scale = quantise_rows(x, STORAGES[storage].dtype)
    assert q.shape == x.shape and scale.shape == x.shape[:1] and scale.dtype == torch.float32
    step = scale[:, None] * (1 if storage == "int8" else torch.maximum(q.float().abs() / 8, torch.tensor(2.0**-9)))
    assert ((q.float() * scale[:, None] - x.float()).abs() <= 0.501 * step + 1e-12).all()
    assert q[3].float().eq(0).all() and q.float().abs().amax(1)[4] == STORAGES[storage].largest


@BOTH
def test_the_ring_holds_what_the_cache_would(device, storage):
    """Codes and float16 scales of `streamgen.cache.quantised`, of keys turned in float32 and values as they are."""
    torch.manual_seed(0)
    dtype = STORAGES[storage].dtype
    qkv = tuple(torch.randn(2, 4, 36, device=device) for _ in "qkv")
    tables = tuple(table.to(device) for table in rope_table([5.0], 2, 2, 12))
    rings = tuple(torch.zeros(2, 3, 9, 12, device=device).to(dtype) for _ in "kv")
    scales = tuple(torch.full((2, 3, 9), torch.nan, dtype=torch.float16, device=device) for _ in "kv")
    places = torch.tensor([[7, 8, 0, 1], [2, 3, 4, 5]], dtype=torch.int32, device=device)
    norm_rope_store.norm_rope_store(qkv, (None, None), 1e-6, tables, places, rings, None, scales)
    k = norm_rope_store.norm_rope.reference(qkv[1], None, 1e-6, 3, *tables)
    v = norm_rope_store.norm_rope.reference(qkv[2], None, 1e-6, 3, None, None)
    for ring, held, x in zip(rings, scales, (k, v), strict=True):
        codes, scale = quantise(x, STORAGES[storage])
        for b in range(2):
            at = places[b].long()
            assert torch.equal(held[b, :, at], scale[b, ..., 0])
            apart = (ring[b].float()[:, at] - codes[b].float()).abs()
            assert (apart > 0).float().mean() < 0.02  # a rotation that is rounded otherwise may cross an edge
            assert (apart <= codes[b].float().abs().mul(0.13).clamp(min=1)).all()
            rest = [i for i in range(9) if i not in at.tolist()]
            assert held[b, :, rest].isnan().all() and ring[b].float()[:, rest].eq(0).all()


def test_integer_products_are_exact(device):
    """Sums beyond 2^24, which float32 cannot hold; all values at the edge of the format."""
    x = torch.full((3, 5000), 127, dtype=torch.int8, device=device)
    weight = torch.full((20, 5000), -127, dtype=torch.int8, device=device)
    x[1, 0], weight[7, 1] = 126, 1
    one = torch.ones(20, device=device)
    got = scaled_product(x, one[:3].clone(), weight, one)
    wanted = (x.double() @ weight.double().T).float()
    assert torch.equal(got, wanted) and len(wanted.unique()) > 2


@pytest.mark.parametrize(("dtype", "loss"), [(torch.int8, 0.015), (torch.float8_e4m3fn, 0.045)], ids=str)
def test_a_linear_layer(device, dtype, loss):
    torch.manual_seed(0)
    layer = torch.nn.Linear(90, 50, device=device)
    x = torch.randn(2, 7, 90, device=device)
    got, wanted = linear(x, *quantise_rows(layer.weight.detach(), dtype), layer.bias.detach()), layer(x)
    assert got.shape == wanted.shape and got.dtype == x.dtype
    assert 0 < (got - wanted).norm() / wanted.norm() < loss


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wq_OC": torch.zeros(4, 8).to(torch.float8_e4m3fn)}, "must be both torch.int8 or both torch.float8_e4m3fn"),
        ({"wq_OC": torch.zeros(4, 9, dtype=torch.int8)}, r"weight is \[4, 9\]: must be \[4, 8\]"),
        ({"w_scale_O": torch.ones(8)[::2]}, "must be contiguous"),
        ({"bias_O": torch.ones(3)}, r"bias is \[3\]: must be \[4\]"),
    ],
    ids=["formats", "width", "strided", "bias"],
)
def test_products_that_are_none(device, changes, message):
    given = {"xq_MC": torch.zeros(3, 8, dtype=torch.int8), "x_scale_M": torch.ones(3)}
    given |= {"wq_OC": torch.zeros(4, 8, dtype=torch.int8), "w_scale_O": torch.ones(4), **changes}
    with pytest.raises(ValueError, match=message):
        scaled_product(**{name: value.to(device) for name, value in given.items()})


def test_other_formats_are_refused(device):
    with pytest.raises(ValueError, match=r"dtype=torch\.int16: must be torch\.int8 or torch\.float8_e4m3fn"):
        quantise_rows(torch.ones(2, 2, device=device), torch.int16)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_a_layer_in_float8_is_the_same_with_kernels_and_without(device, dtype, tolerance):
    """The same codes, summed in another order; a stream goes on where there is no such kernel."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(90, 50, device=device).to(dtype)
    x = (torch.randn(2, 7, 90, device=device) * torch.logspace(-2, 2, 7, device=device)[:, None]).to(dtype)
    x[0, 0] = 0
    plain, fast = QuantisedLinear(layer, "fp8"), QuantisedLinear(layer, "fp8", kernel_linear()[1])
    assert torch.equal(plain.weight.float(), fast.weight.float())
    assert torch.equal(plain.weight.float(), quantise_rows(layer.weight.detach(), torch.float8_e4m3fn)[0].float())
    for wanted, got in ((plain(x), fast(x)), (plain.gelu(x), fast.gelu(x))):
        assert got.shape == wanted.shape and got.dtype == dtype
        apart = (got.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
        assert apart.max() < tolerance


@torch.no_grad()
def test_a_model_in_float8(device):
    """Every product of the blocks, near to the model's own; text's keys and values too."""
    from streamgen import ops
    from tests.kernels.test_streams import CONFIG, make_model, make_text, noise

    model = make_model(device)
    model.ops = ops.select("triton")

    def out() -> torch.Tensor:
        rope = tuple(torch.ones(12, 6, device=device) for _ in range(2))
        return model(noise(3, 1).to(device), torch.full((1, 1), 500.0, device=device), make_text(model), rope=rope)

    wanted = out()
    product = float8_product(model.ops, torch.device("cpu"))  # by the interpreter it is taken untried
    assert quantise_weights(model, "fp8", product) == bytes_saved(CONFIG, 4)
    kinds = [module.float8_product for module in model.modules() if type(module) is QuantisedLinear]
    assert kinds == [linear] * 10 * CONFIG.num_layers
    assert model.blocks[0].ffn[0].weight.dtype == torch.float8_e4m3fn
    error = float((out() - wanted).norm() / wanted.norm())
    assert 1e-4 < error < 0.1
