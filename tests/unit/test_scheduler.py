"""The scheduler's rules one by one, and the cost model that it asks."""

from __future__ import annotations

import json
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgen.errors import UserError
from streamgen_infer.cost_model import CostModel
from streamgen_infer.requests import FEWER_STEPS, PREVIEW_CODEC, REPEATED
from streamgen_infer.scheduler import Launch, Rules, StreamView, Wait, choose
from streamgen_infer.simulate.scenario import lines

RULES = Rules(max_rows=8, max_wait_s=2.0)


def view(id: str, **changed: Any) -> StreamView:
    """A stream whose next block could begin at 0 s, due at 1 s."""
    known = {"shape": "a", "ready": "step", "due_at_s": 1.0, "period_s": 1.0, "trained_steps": (4,)}
    return StreamView(id=id, **{**known, "last_served_s": 0.0, **changed})


def curve(*seconds: float, kinds: str = "forward decode recache", shape: str = "a") -> CostModel:
    """The same cost of 1, 2, ... rows for each kind."""
    costs = CostModel()
    for kind in kinds.split():
        for rows, one_s in enumerate(seconds, 1):
            costs.give(kind, shape, rows, one_s)
    return costs


def launched(decision: Launch | Wait) -> Launch:
    assert isinstance(decision, Launch), decision
    return decision


SHARED = curve(0.010, 0.011, 0.012, 0.013)  # rows are nearly free
SOLO = curve(0.010, 0.020, 0.030, 0.040)  # rows gain nothing


def test_least_slack_goes_first() -> None:
    # b is due later, but has three passes more, of 20 ms with both in them
    streams = [view("a", due_at_s=1.0, passes_left=1), view("b", due_at_s=1.05, passes_left=4)]
    assert launched(choose(0.0, streams, SOLO, RULES)).streams == ("b",)
    streams = [view("a", due_at_s=1.0, passes_left=1), view("b", due_at_s=1.07, passes_left=4)]
    assert launched(choose(0.0, streams, SOLO, RULES)).streams == ("a",)


def test_steps_and_commits_of_different_streams_share_a_launch_and_other_shapes_do_not() -> None:
    costs = curve(0.010, 0.011, 0.012, 0.013)
    costs.merge(curve(0.010, 0.011, shape="other"))
    streams = [
        view("begins"),
        view("midway", passes_left=2),
        view("commits", ready="commit", passes_left=0, due_at_s=2.0),
        view("recaches", ready="recache", due_at_s=3.0),
        view("other", shape="other", due_at_s=3.0),
    ]
    launch = launched(choose(0.0, streams, costs, RULES))
    assert launch.kind == "forward"
    assert set(launch.streams) == {"begins", "midway", "commits"}
    assert launch.steps == {"begins": 4} and launch.flags == {}
    assert launch.predicted_s == pytest.approx(0.012)


def test_rows_that_gain_nothing_stay_out() -> None:
    streams = [view("a", passes_left=2), view("b", passes_left=2, due_at_s=2.0)]
    assert launched(choose(0.0, streams, SOLO, RULES)).streams == ("a",)
    assert len(launched(choose(0.0, streams, SHARED, RULES)).streams) == 2


def test_a_plateau_of_the_curve_does_not_hide_the_gain_after_it() -> None:
    costs = curve(0.010, 0.020, 0.030, 0.031)  # 2 and 3 rows gain nothing, 4 do
    streams = [view(str(n), passes_left=2) for n in range(4)]
    assert len(launched(choose(0.0, streams, costs, RULES)).streams) == 4


def test_rows_are_added_only_while_no_chosen_deadline_breaks() -> None:
    costs = curve(0.010, 0.015, 0.020, 0.025)
    # the decode after it takes 15 ms (two streams), so the pass has 11 ms: one row takes 10, two take 15
    streams = [view("tight", passes_left=1, due_at_s=0.026), view("b", passes_left=3, due_at_s=9.0)]
    assert launched(choose(0.0, streams, costs, RULES)).streams == ("tight",)
    streams[0] = streams[0]._replace(due_at_s=0.040)
    assert launched(choose(0.0, streams, costs, RULES)).streams == ("tight", "b")


def test_rows_are_added_only_while_no_deadline_outside_breaks() -> None:
    costs = curve(0.010, 0.015, 0.020, 0.025)
    streams = [view("a", passes_left=2, due_at_s=0.1), view("b", passes_left=2, due_at_s=9.0)]
    waits = view("c", ready=None, decode_due_s=0.085)
    assert set(launched(choose(0.0, [*streams, waits], costs, RULES)).streams) == {"a", "b"}
    # the decode must start within 14 ms: one row (10 ms) leaves room for it, two (15 ms) do not
    assert launched(choose(0.0, [*streams, waits._replace(decode_due_s=0.024)], SHARED, RULES)).kind == "decode"
    streams[0] = streams[0]._replace(due_at_s=0.050)  # must start within 10 ms and end within 20
    assert launched(choose(0.0, [*streams, waits._replace(decode_due_s=0.024)], costs, RULES)).streams == ("a",)
    assert len(launched(choose(0.0, [*streams, waits._replace(decode_due_s=0.026)], costs, RULES)).streams) == 2


def test_never_more_rows_than_the_rules_allow() -> None:
    streams = [view(str(n), passes_left=2, due_at_s=1 + n) for n in range(20)]
    launch = launched(choose(0.0, streams, SHARED, RULES))
    assert launch.streams == tuple(str(n) for n in range(8))


def test_a_near_decode_goes_before_new_work_and_a_far_one_after() -> None:
    streams = [view("new", due_at_s=0.5), view("done", ready="commit", passes_left=0, due_at_s=2.0, decode_due_s=0.02)]
    launch = launched(choose(0.0, streams, SHARED, RULES))
    assert (launch.kind, launch.streams, launch.flags) == ("decode", ("done",), {})
    streams[1] = streams[1]._replace(decode_due_s=1.0)
    assert launched(choose(0.0, streams, SHARED, RULES)).kind == "forward"


def test_the_last_pass_of_a_block_waits_for_the_decode_of_the_one_before() -> None:
    waiting = view("a", passes_left=1, due_at_s=0.1, decode_due_s=9.0)
    assert launched(choose(0.0, [waiting], SHARED, RULES)).kind == "decode"
    assert launched(choose(0.0, [waiting._replace(passes_left=2)], SHARED, RULES)).kind == "forward"
    one_step = waiting._replace(passes_left=None, trained_steps=(2, 1))
    assert launched(choose(0.0, [one_step], SHARED, RULES)).kind == "decode"


def test_it_waits_for_the_earliest_block_that_may_begin() -> None:
    streams = [view("a", not_before_s=3.0), view("b", not_before_s=2.0), view("c", ready=None)]
    assert choose(1.0, streams, SHARED, RULES) == Wait(2.0)
    assert choose(1.0, streams[2:], SHARED, RULES) == Wait(None)
    assert choose(1.0, [], SHARED, RULES) == Wait(None)
    assert launched(choose(2.0, streams, SHARED, RULES)).streams == ("b",)
    # what has begun does not wait
    assert launched(choose(1.0, [streams[0]._replace(passes_left=2)], SHARED, RULES)).streams == ("a",)


def test_a_stream_on_hold_is_never_due() -> None:
    streams = [view("paused", due_at_s=inf, passes_left=2, decode_due_s=inf), view("b", trained_steps=(4, 2))]
    launch = launched(choose(0.0, streams, SOLO, RULES))
    assert launch.streams == ("b",) and launch.steps == {"b": 4}


@pytest.mark.parametrize(("room_s", "steps"), [(0.051, 4), (0.049, 2), (0.031, 2), (0.029, 1), (-5.0, 1)])
def test_a_block_gets_the_most_steps_that_hold_its_deadline(room_s: float, steps: int) -> None:
    """4, 2 or 1 passes of 10 ms and a decode of 10 ms."""
    launch = launched(choose(7.0, [view("a", trained_steps=(4, 2, 1), due_at_s=7 + room_s)], SOLO, RULES))
    assert launch.steps == {"a": steps}
    assert launch.flags == ({} if steps == 4 else {"a": FEWER_STEPS})


def test_steps_are_chosen_by_the_p90() -> None:
    costs = CostModel()
    for kind in ("forward", "decode"):
        costs.give(kind, "a", 1, 0.010, p90_s=0.013)
    # medians need 50 ms; five gaps of 3 ms add as squares: 50 + 3 x sqrt(5) = 56.7
    assert launched(choose(0.0, [view("a", trained_steps=(4, 2), due_at_s=0.056)], costs, RULES)).steps == {"a": 2}
    assert launched(choose(0.0, [view("a", trained_steps=(4, 2), due_at_s=0.058)], costs, RULES)).steps == {"a": 4}


def test_what_others_need_before_the_deadline_counts() -> None:
    mine = view("a", trained_steps=(4, 2), due_at_s=0.100, last_served_s=-1.0)
    busy = [view(f"b{n}", passes_left=3, due_at_s=0.099, last_served_s=0.9) for n in range(2)]
    later = [one._replace(due_at_s=5.0) for one in busy]
    rules = Rules(max_rows=1, max_wait_s=0.5)  # `a` has waited longest, so it is its turn in either case
    assert launched(choose(0.0, [mine, *later], SOLO, rules)).steps == {"a": 4}
    assert launched(choose(0.0, [mine, *busy], SOLO, rules)).steps == {"a": 2}


def test_a_fixed_number_of_steps_stays() -> None:
    launch = launched(choose(0.0, [view("a", trained_steps=(4,), due_at_s=-9.0)], SOLO, RULES))
    assert launch.steps == {"a": 4} and launch.flags == {}


def test_the_ladder_goes_on_with_the_preview_codec_and_the_last_frame() -> None:
    costs = curve(0.100)
    costs.give("preview", "a", 1, 0.010)
    late = view("a", ready=None, decode_due_s=0.05, preview=True)
    launch = launched(choose(0.0, [late], costs, RULES))
    assert (launch.kind, launch.flags) == ("preview", {"a": PREVIEW_CODEC})
    launch = launched(choose(0.045, [late], costs, RULES))
    assert (launch.kind, launch.flags) == ("preview", {"a": PREVIEW_CODEC | REPEATED})
    launch = launched(choose(0.0, [late._replace(preview=False)], costs, RULES))
    assert (launch.kind, launch.flags) == ("decode", {"a": REPEATED})
    launch = launched(choose(0.0, [late._replace(decode_due_s=0.2)], costs, RULES))
    assert (launch.kind, launch.flags) == ("decode", {})


def test_a_lost_deadline_goes_first_unless_it_costs_another() -> None:
    late = view("late", passes_left=3, due_at_s=-1.0)
    # `good` needs 10 ms and, with both streams in each launch, 3 x 20: it must start within 5, `late` would take 10
    good = view("good", passes_left=3, due_at_s=0.075)
    assert launched(choose(0.0, [late, good], SOLO, RULES)).streams == ("good",)
    assert launched(choose(0.0, [late, good._replace(due_at_s=0.085)], SOLO, RULES)).streams == ("late",)


def test_who_has_waited_too_long_goes_first_the_longest_first() -> None:
    good = view("good", passes_left=3, due_at_s=3.105, last_served_s=3.0)
    late = [view(id, passes_left=3, due_at_s=-9.0, last_served_s=at_s) for id, at_s in (("a", 0.9), ("b", 0.8))]
    assert launched(choose(3.0, [good, *late], SOLO, RULES)).streams == ("b",)
    fresh = [one._replace(last_served_s=1.1) for one in late]
    assert launched(choose(3.0, [good, *fresh], SOLO, RULES)).streams == ("good",)
    # waiting for the viewer is no waiting for the device
    held = view("held", not_before_s=2.5, due_at_s=9.0)
    assert launched(choose(3.0, [good, held], SOLO, RULES)).streams == ("good",)


def test_choosing_changes_nothing_and_has_no_memory() -> None:
    costs = lines("a", forward=(0.02, 0.004), decode=(0.01, 0.006))
    before = json.dumps(costs.values())
    streams = [view(str(n), due_at_s=n / 7, trained_steps=(4, 2), passes_left=n % 3 or None) for n in range(9)]
    first = choose(0.0, streams, costs, RULES)
    assert choose(0.0, streams, costs, RULES) == first
    assert json.dumps(costs.values()) == before


@given(
    st.lists(
        st.builds(
            StreamView,
            id=st.uuids().map(str),
            shape=st.sampled_from("ab"),
            ready=st.sampled_from([None, "step", "commit", "recache"]),
            due_at_s=st.floats(-5, 5),
            period_s=st.floats(0.1, 2),
            trained_steps=st.sampled_from([(4,), (4, 2, 1), (1,)]),
            last_served_s=st.floats(-5, 0),
            passes_left=st.sampled_from([None, 1, 3]),
            not_before_s=st.floats(-1, 1),
            decode_due_s=st.none() | st.floats(-5, 5),
            preview=st.booleans(),
        ),
        max_size=12,
    )
)
def test_whatever_the_streams_a_launch_holds_only_what_may_run(streams: list[StreamView]) -> None:
    costs = lines("a", forward=(0.02, 0.004), decode=(0.01, 0.006))
    costs.merge(lines("b", forward=(0.05, 0.001), decode=(0.01, 0.002)))
    for shape in "ab":
        costs.give("preview", shape, 1, 0.002)
    decision = choose(0.0, streams, costs, RULES)
    by_id = {one.id: one for one in streams}
    can = {one.id for one in streams if waits(one)}
    if isinstance(decision, Wait):
        assert not can
        return
    rows = [by_id[id] for id in decision.streams]
    assert rows and {one.id for one in rows} <= can
    assert len(rows) == len(set(decision.streams)) <= RULES.max_rows
    assert len({one.shape for one in rows}) == 1
    if decision.kind in ("decode", "preview"):
        assert all(one.decode_due_s is not None for one in rows)
        assert decision.kind == "decode" or all(one.preview for one in rows)
    else:
        stages = {"recache"} if decision.kind == "recache" else {"step", "commit"}
        assert {one.ready for one in rows} <= stages
    beginning = {one.id for one in rows if one.ready == "step" and one.passes_left is None}
    assert set(decision.steps) == (beginning if decision.kind == "forward" else set())
    assert all(count in by_id[id].trained_steps for id, count in decision.steps.items())
    # who has waited too long is not passed over for one who has not
    starving = [one for one in streams if one.id in can and max(waits(one)) > RULES.max_wait_s]
    assert not starving or any(max(waits(one)) > RULES.max_wait_s for one in rows)


def waits(one: StreamView) -> list[float]:
    """At 0 s, how long what may run of this stream has waited."""
    found = [-one.last_served_s] if one.decode_due_s is not None else []
    opens = one.passes_left is None and one.ready in ("step", "recache")
    last = one.ready == "step" and (one.passes_left == 1 or (opens and 1 in one.trained_steps))
    if one.ready and not (opens and one.not_before_s > 0) and not (last and one.decode_due_s is not None):
        found.append(-max(one.last_served_s, one.not_before_s) if opens else -one.last_served_s)
    return found


# The cost model.


def test_a_curve_is_learned_from_noise() -> None:
    random = np.random.default_rng(0)
    costs = CostModel()
    for _ in range(400):
        for rows in (1, 2, 4):
            costs.observe("forward", "a", rows, (0.01 + 0.002 * rows) * float(np.exp(0.2 * random.standard_normal())))
    for rows in (1, 2, 3, 4):
        median_s = 0.01 + 0.002 * rows
        assert costs.predict("forward", "a", rows) == pytest.approx(median_s, rel=0.1)
        assert costs.predict("forward", "a", rows, 0.9) == pytest.approx(median_s * np.exp(0.2 * 1.2816), rel=0.12)


def test_between_and_beyond_the_points() -> None:
    costs = curve()
    costs.give("forward", "a", 2, 0.010)
    costs.give("forward", "a", 4, 0.014)
    seconds = [costs.predict("forward", "a", rows) for rows in (1, 2, 3, 4, 6, 40)]
    assert seconds == pytest.approx([0.010, 0.010, 0.012, 0.014, 0.018, 0.086])
    assert costs.predict("forward", "a", 8, 0.9) == pytest.approx(0.028)  # promises count on no gain that was not seen


@given(
    st.lists(st.tuples(st.integers(1, 16), st.floats(1e-4, 10)), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(1, 16), st.floats(1e-4, 10)), max_size=4),
)
def test_more_rows_never_cost_less(observed: list[tuple[int, float]], given_: list[tuple[int, float]]) -> None:
    costs = CostModel()
    for rows, seconds in given_:
        costs.give("forward", "a", rows, seconds, p90_s=seconds * 1.5)
    for rows, seconds in observed:
        costs.observe("forward", "a", rows, seconds)
    for quantile in (0.5, 0.9):
        seconds_s = [costs.predict("forward", "a", rows, quantile) for rows in range(1, 33)]
        assert all(a <= b * (1 + 1e-12) for a, b in pairwise(seconds_s))
        assert seconds_s[0] > 0
    for rows in range(1, 33):
        assert costs.predict("forward", "a", rows, 0.9) >= costs.predict("forward", "a", rows) * (1 - 1e-12)


def test_a_slow_down_reaches_launches_that_are_not_made_and_passes() -> None:
    costs = CostModel()
    for _ in range(64):
        for kind, rows, seconds in (("forward", 1, 0.011), ("forward", 8, 0.018), ("decode", 1, 0.021)):
            costs.observe(kind, "a", rows, seconds)
    for _ in range(40):
        costs.observe("forward", "a", 1, 0.011 * 3)
    assert costs.predict("forward", "a", 1) == pytest.approx(0.011 * 3, rel=0.1)
    assert costs.predict("forward", "a", 8) == pytest.approx(0.018 * 3, rel=0.35)
    assert costs.predict("decode", "a", 1) == pytest.approx(0.021 * 3, rel=0.35)
    for _ in range(60):
        costs.observe("forward", "a", 1, 0.011)
    assert costs.predict("forward", "a", 8) == pytest.approx(0.018, rel=0.15)
    assert costs.predict("decode", "a", 1) == pytest.approx(0.021, rel=0.15)


def test_one_outlier_does_not_ruin_an_estimate() -> None:
    costs = CostModel()
    for _ in range(100):
        costs.observe("forward", "a", 1, 0.010)
    costs.observe("forward", "a", 1, 1.0)
    for _ in range(20):
        costs.observe("forward", "a", 1, 0.010)
    assert costs.predict("forward", "a", 1) < 0.013


def test_a_prior_is_scaled_to_what_was_measured_here() -> None:
    prior = lines("a", forward=(0.010, 0.001), decode=(0.02, 0.001), rows=8)
    costs = CostModel()
    for _ in range(20):
        costs.observe("forward", "a", 1, 0.022)  # twice the prior's
    costs.merge(prior)
    assert costs.predict("forward", "a", 8) == pytest.approx(0.036)
    assert costs.predict("forward", "a", 1) == pytest.approx(0.022)
    assert costs.predict("decode", "a", 1) == pytest.approx(0.021)


def test_saved_and_loaded_it_predicts_the_same(tmp_path: Path) -> None:
    costs = lines("a", forward=(0.010, 0.001), decode=(0.02, 0.001))
    random = np.random.default_rng(0)
    for _ in range(50):
        costs.observe("forward", "a", int(random.integers(1, 9)), float(random.uniform(0.01, 0.02)))
    costs.save(tmp_path / "costs.json")
    loaded = CostModel.load(tmp_path / "costs.json")
    for rows in range(1, 20):
        for quantile in (0.5, 0.9):
            expected = costs.predict("forward", "a", rows, quantile)
            assert loaded.predict("forward", "a", rows, quantile) == pytest.approx(expected, rel=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9, "curves": []}', '{"format": 1, "curves": [{"kind": "x"}]}'])
def test_a_file_that_holds_no_costs_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(UserError, match=r"costs\.json: not a file of measured costs"):
        CostModel.load(tmp_path / "costs.json")
    with pytest.raises(UserError, match="cannot be read"):
        CostModel.load(tmp_path / "none.json")


def test_what_is_not_known_or_not_possible_is_refused() -> None:
    costs = curve(0.01)
    with pytest.raises(LookupError, match="'preview' for shape 'a'"):
        costs.predict("preview", "a", 1)
    with pytest.raises(ValueError, match="quantile"):
        costs.predict("forward", "a", 1, 0.99)
    for rows, seconds in ((0, 1.0), (1, 0.0), (1, inf), (1, float("nan"))):
        with pytest.raises(ValueError, match="rows must be"):
            costs.observe("forward", "a", rows, seconds)
