"""Admission: which resource is short, with its numbers; and deadlines that are spread over the period."""

from __future__ import annotations

from typing import Any

import pytest

from streamgen_infer.admission import Admitted, Limits, Load, Memory, admit, device_load
from streamgen_infer.cost_model import CostModel
from streamgen_infer.requests import Refused
from streamgen_infer.scheduler import Rules
from streamgen_infer.simulate.scenario import lines

RULES = Rules(max_rows=8)
COSTS = lines("a", forward=(0.020, 0.004), decode=(0.010, 0.006))
PLENTY = Memory(total_bytes=2**40)


def load(**changed: Any) -> Load:
    known: dict[str, Any] = {"shape": "a", "period_s": 1.0, "steps": 4, "bytes": 100}
    return Load(**{**known, **changed})


def ask(
    loads: list[Load],
    wanted: Load | None = None,
    costs: CostModel = COSTS,
    memory: Memory = PLENTY,
    start_s: float = 1.0,
    limits: Limits | None = None,
) -> Admitted | Refused:
    return admit(50.0, loads, wanted or load(), costs, memory, start_s=start_s, rules=RULES, limits=limits or Limits())


def refused(answer: Admitted | Refused) -> Refused:
    assert isinstance(answer, Refused), answer
    assert str(answer).startswith(f"{answer.resource}: ") and answer.retry_after_s > 0
    return answer


def admitted(answer: Admitted | Refused) -> Admitted:
    assert isinstance(answer, Admitted), answer
    return answer


def test_the_load_is_that_of_full_launches() -> None:
    # 5 passes and a decode a second, alone: 5 x 24 + 16 ms
    assert device_load([load()], COSTS, RULES) == pytest.approx(0.136)
    # four share each: 5 x 36 + 34 ms
    assert device_load([load()] * 4, COSTS, RULES) == pytest.approx(0.214)
    # twelve are two launches of six: 2 x (5 x 44 + 46) ms
    assert device_load([load()] * 12, COSTS, RULES) == pytest.approx(0.532)
    # half of the rate, half of the load; other shapes add up
    assert device_load([load(period_s=2.0)] * 12, COSTS, RULES) == pytest.approx(0.266)
    both = lines("b", forward=(0.020, 0.004), decode=(0.010, 0.006))
    both.merge(COSTS)
    assert device_load([load(), load(shape="b")], both, RULES) == pytest.approx(0.272)
    assert device_load([], COSTS, RULES) == 0


def test_the_load_is_taken_at_p90() -> None:
    noisy = CostModel()
    for kind, seconds in (("forward", 0.024), ("decode", 0.016)):
        noisy.give(kind, "a", 1, seconds, p90_s=1.5 * seconds)
    assert device_load([load()], noisy, RULES) == pytest.approx(1.5 * 0.136)


def test_streams_are_admitted_until_the_time_is_taken_and_the_refusal_says_so() -> None:
    loads: list[Load] = []
    while isinstance(answer := ask(loads), Admitted):
        assert answer.load == pytest.approx(device_load([*loads, load()], COSTS, RULES))
        loads.append(load(due_s=answer.due_s))
    assert 12 < len(loads) < 30
    assert device_load(loads, COSTS, RULES) <= 0.85 < device_load([*loads, load()], COSTS, RULES)
    answer = refused(answer)
    assert answer.resource == "time"
    assert answer.numbers["load"] <= answer.numbers["most_load"] == 0.85 < answer.numbers["load_with"]
    assert f"{answer.numbers['load']:.0%} of the device is taken" in str(answer)


def test_memory_counts_all_that_is_held() -> None:
    memory = Memory(total_bytes=1000, other_bytes=500)
    admitted(ask([load()] * 4, memory=memory))
    answer = refused(ask([load()] * 5, memory=memory))
    assert answer.resource == "memory"
    assert answer.numbers == {"bytes": 100, "free_bytes": 0, "total_bytes": 1000}


def test_the_number_of_streams_can_be_limited() -> None:
    admitted(ask([load()], limits=Limits(most_streams=2)))
    answer = refused(ask([load()] * 2, limits=Limits(most_streams=2)))
    assert (answer.resource, answer.numbers) == ("streams", {"streams": 2, "most_streams": 2})


def test_a_block_that_lasts_shorter_than_its_making_is_refused_on_an_empty_device() -> None:
    answer = refused(ask([], load(period_s=0.13)))  # 5 passes and a decode: 136 ms
    assert answer.resource == "latency" and "lasts 0.130 s" in str(answer)
    assert answer.numbers["block_s"] == pytest.approx(0.136)
    assert refused(ask([], load(period_s=0.14))).resource == "time"  # it would fit, but not into 85 %
    admitted(ask([], load(period_s=0.2)))


def test_a_first_frame_that_cannot_be_in_time_is_refused() -> None:
    answer = refused(ask([], start_s=0.1))  # 4 passes and a decode: 112 ms
    assert answer.resource == "latency" and "first frame" in str(answer)
    admitted(ask([], start_s=0.12))
    answer = refused(ask([load()] * 7, start_s=0.12))  # eight share: 4 x 52 + 58 ms
    assert answer.resource == "latency" and answer.numbers["block_s"] == pytest.approx(0.266)


def test_when_to_try_again_is_the_next_known_end() -> None:
    busy = [load(ends_s=ends_s) for ends_s in (90.0, 62.0, None)]
    limits = Limits(most_streams=3, retry_s=7.0)
    assert refused(ask(busy, limits=limits)).retry_after_s == pytest.approx(12.0)
    assert refused(ask([load()] * 3, limits=limits)).retry_after_s == 7.0
    assert refused(ask([load(ends_s=40.0)] * 3, limits=limits)).retry_after_s > 0


def test_equal_streams_get_deadlines_spread_over_the_period() -> None:
    loads: list[Load] = []
    for _ in range(4):
        answer = admitted(ask(loads, start_s=2.0))
        assert 50.0 < answer.due_s <= 52.0
        loads.append(load(due_s=answer.due_s))
    phases = sorted(one.due_s % 1.0 for one in loads)
    gaps = [(b - a) % 1.0 for a, b in zip(phases, [*phases[1:], phases[0]], strict=True)]
    assert min(gaps) == pytest.approx(0.25) and max(gaps) == pytest.approx(0.25)


def test_a_short_start_leaves_less_choice_and_is_kept() -> None:
    first = admitted(ask([], start_s=0.3))
    assert first.due_s == pytest.approx(50.3)
    second = admitted(ask([load(due_s=first.due_s)], start_s=0.3))
    # as far from 50.3 as the time for the first block (two share: 4 x 28 + 22 ms) allows
    assert second.due_s == pytest.approx(50.134)
    other_rate = admitted(ask([load(due_s=first.due_s, period_s=0.7)], start_s=0.3))
    assert other_rate.due_s == pytest.approx(50.3)
