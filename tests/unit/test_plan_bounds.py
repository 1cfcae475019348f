"""What the planner says of a GPU is what its schedules do: costs of Wan 1.3B on an H200, as configs/simulate has them.

They are assumed, not measured here. A pass over a block of 3 latent frames at 832x480 takes 105 ms: Forcing-KV reports
22.81 frames per second for Causal Forcing on an H200, with 5 passes per block and without the codec; it is bound by
compute, so each further stream costs 100 ms. Decoding takes 190 ms: users of Self-Forcing measured 6.05 s for 81 frames
on an H100, where the paper has 17 frames per second. 0.1 ms from one device to another.
"""

import pytest

from streamgen.grid import Visibility
from streamgen.initiation import figures, interval
from streamgen.resources import configs_dir
from streamgen.schedules import Machine, timeline
from streamgen_infer.admission import Limits
from streamgen_infer.cost_model import CostModel
from streamgen_infer.models.fit_sizes import read_sizes
from streamgen_infer.plan.capacity import grid_of
from streamgen_infer.plan.measure import in_ms, load_costs
from streamgen_infer.simulate.scenario import Scenario, Viewers
from streamgen_infer.simulator import simulate

COSTS = configs_dir() / "simulate" / "h200-wan-1.3b-costs.json"


@pytest.mark.parametrize(
    ("name", "visibility", "streams", "devices"),
    [
        *(("step_chain", "same_level", 1, devices) for devices in (1, 2, 3, 4, 5)),
        *(("layer_ring", "same_level", 1, devices) for devices in (1, 2, 4, 8)),
        *(("interleaved", "clean", 8, devices) for devices in (1, 2, 4, 8)),
    ],
)
def test_schedules_at_the_costs_of_a_gpu_reach_the_planners_bound(
    name: str, visibility: Visibility, streams: int, devices: int
) -> None:
    sizes = read_sizes("longlive")
    known = load_costs(COSTS, sizes.geometry)
    costs = in_ms(known, sizes.geometry, 0.1, 0.5)
    blocks = 48 if streams == 1 else 9
    grid = grid_of(sizes, visibility, ((4,) * blocks,) * streams)
    machine = Machine(devices=devices, most_rows=1)
    period = figures(timeline(name, grid, machine, costs), grid, devices).period
    assert 0.9 < interval(name, grid, machine, costs).period / period < 1.1


def test_replicas_at_the_costs_of_a_gpu_reach_the_planners_bound() -> None:
    """Viewers who take frames as fast as they are made."""
    costs = CostModel.load(COSTS)
    viewers = Viewers(per_minute=600, mean_s=1e6, shape="3 latent frames", lead_s=1e6)
    for devices in (1, 2, 4, 8):
        limits = Limits(most_load=10, most_streams=1)
        scenario = Scenario(viewers=(viewers,), seconds=200, devices=devices, limits=limits, seed=1)
        blocks = simulate(scenario, costs).blocks
        bound = devices / (5 * 0.105 + 0.190)  # blocks per second
        assert 0.9 * bound < blocks / 200 < 1.02 * bound
