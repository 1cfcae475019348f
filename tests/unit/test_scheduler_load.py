"""Decisions under load: one viewer's launches are serial, many share theirs; what the scheduler keeps between them."""

from __future__ import annotations

import pytest

from streamgen_infer.cost_model import CostModel
from streamgen_infer.scheduler import Launch, Rules, StreamView, chain_s, choose

RULES = Rules(max_rows=8, max_wait_s=2.0)


def curve(*seconds: float) -> CostModel:
    """The same cost of 1, 2, ... rows for passes and decodes."""
    costs = CostModel()
    for kind in ("forward", "decode"):
        for rows, one_s in enumerate(seconds, 1):
            costs.give(kind, "a", rows, one_s)
    return costs


SHARED = curve(0.010, 0.011, 0.012, 0.013)  # rows are nearly free
SOLO = curve(0.010, 0.020, 0.030, 0.040)  # rows gain nothing


def played(streams: int, blocks: int, costs: CostModel) -> list[tuple[float, Launch]]:
    """Streams that begin together, made as fast as it goes: (start, launch), as the engine would run them."""
    views = [StreamView(str(n), "a", "step", 1.0, 1.0, (4,), 0.0) for n in range(streams)]
    made, now_s, found = [0] * streams, 0.0, []
    while min(made) < blocks:
        launch = choose(now_s, views, costs, RULES)
        assert isinstance(launch, Launch)
        found.append((now_s, launch))
        now_s += costs.predict(launch.kind, "a", len(launch.streams))
        for name in launch.streams:
            n = int(name)
            one = views[n]._replace(last_served_s=now_s)
            block_due_s = one.due_at_s
            if launch.kind == "decode":
                made[n] += 1
                views[n] = one._replace(decode_due_s=None)
            elif one.ready == "commit":
                views[n] = one._replace(ready="step", passes_left=None)
            else:
                left = (launch.steps[name] if one.passes_left is None else one.passes_left) - 1
                views[n] = one._replace(passes_left=left)
                if left == 0:
                    views[n] = views[n]._replace(decode_due_s=block_due_s, ready="commit", due_at_s=block_due_s + 1)
    return found


def test_by_load_alone_launches_are_serial_for_one_viewer_and_shared_among_many() -> None:
    alone, many = played(1, 3, SHARED), played(4, 3, SHARED)
    assert {len(launch.streams) for _, launch in alone} == {1}
    # the first block: four passes and its decode, nothing between, and the commit after them
    assert [launch.kind for _, launch in alone[:6]] == ["forward"] * 4 + ["decode", "forward"]
    passes = [launch for _, launch in many if launch.kind == "forward"]
    assert {len(launch.streams) for launch in passes} == {4}
    assert len(passes) == len([launch for _, launch in alone if launch.kind == "forward"])
    # where a further row costs its full share, sharing would only make each of them wait
    assert {len(launch.streams) for _, launch in played(4, 1, SOLO)} == {1}


def test_what_is_kept_of_a_curve_is_void_when_the_curve_moves() -> None:
    costs = curve(0.010, 0.011)
    before_s = chain_s(costs, "a", 4, 2)
    assert before_s == pytest.approx(5 * 0.011) and chain_s(costs, "a", 4, 2) == before_s
    for _ in range(200):
        costs.observe("decode", "a", 2, 0.050)
    # as a model would say that has never been asked before, and has the same speed
    fresh = CostModel.from_values(costs.values())
    assert chain_s(costs, "a", 4, 2) == pytest.approx(chain_s(fresh, "a", 4, 2), rel=0.05)
    assert chain_s(costs, "a", 4, 2) > before_s + 0.03
    costs.give("forward", "a", 2, 1.0)
    assert chain_s(costs, "a", 4, 2) > 4
