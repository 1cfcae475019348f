"""The real scheduler, admission and clocks under faults: what must hold, whatever is thrown at them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamgen.errors import UserError
from streamgen_infer import simulator
from streamgen_infer.admission import Admitted, Limits
from streamgen_infer.cli import main
from streamgen_infer.cost_model import CostModel
from streamgen_infer.scheduler import Launch, Rules, StreamView
from streamgen_infer.simulate import command as simulate_command
from streamgen_infer.simulate.command import Given
from streamgen_infer.simulate.parallel import seed_of, simulate_parts
from streamgen_infer.simulate.report import Histogram, Tally, merged
from streamgen_infer.simulate.scenario import Faults, Scenario, Viewers, lines, plain
from streamgen_infer.simulator import Broken, Watch, simulate
from tests.command_line import one_line

COSTS = lines("stream", forward=(0.020, 0.004), decode=(0.010, 0.006), rows=16)
VIEWERS = Viewers(per_minute=40, mean_s=40, trained_steps=(4, 2, 1), prompts_per_minute=2, bytes=3, slow_share=0.2)
FAULTS = Faults(failures=0.02, slowdowns_per_hour=60, slowdown_s=3, deaths_per_hour=60, rebuild_s=2)
SCENARIO = Scenario(viewers=(VIEWERS,), seconds=40, devices=2, memory_bytes=40, noise=0.1, faults=FAULTS)


@dataclass
class Seen:
    """What a watcher saw, checked on the way."""

    rules: Rules
    blocks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    ended: dict[str, int] = field(default_factory=dict)
    slacks: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    lines: list[str] = field(default_factory=list)
    waiting: dict[str, int] = field(default_factory=dict)
    """Launches of its device since a stream has waited too long."""

    def launch(self, now_s: float, device: int, views: Sequence[StreamView], launch: Launch) -> None:
        self.lines.append(f"{now_s} {device} {launch}")
        by_id = {view.id: view for view in views}
        assert len(by_id) == len(views) and set(launch.streams) <= set(by_id)
        for view in views:
            if view.id in launch.streams:
                self.waiting.pop(view.id, None)
                continue
            opens = view.passes_left is None and view.ready != "commit"
            since_s = max(view.last_served_s, view.not_before_s) if opens else view.last_served_s
            if now_s - since_s > self.rules.max_wait_s:
                self.waiting[view.id] = self.waiting.get(view.id, 0) + 1
                # the bound of the scheduler: N launches more at most
                assert self.waiting[view.id] <= len(views), f"{view.id} starves"

    def delivered(self, now_s: float, stream: str, block: int, slack_s: float) -> None:
        self.lines.append(f"{now_s} {stream} {block} {slack_s}")
        assert stream not in self.ended
        self.blocks[stream].append(block)
        self.slacks[stream].append(slack_s)

    def end(self, now_s: float, stream: str, blocks: int) -> None:
        assert stream not in self.ended
        self.ended[stream] = blocks


def play(scenario: Scenario, costs: CostModel = COSTS) -> tuple[Seen, dict[str, Any]]:
    """Run it and check what must always hold."""
    seen = Seen(scenario.rules)
    tally = simulate(scenario, costs, watch=Watch(seen.launch, seen.delivered, seen.end))
    values = tally.values()
    for stream, blocks in seen.blocks.items():
        assert blocks == list(range(len(blocks))), f"{stream}: twice, lost or out of order"
        assert seen.ended[stream] == len(blocks)
    streams = values["streams"]
    assert streams["offered"] == streams["admitted"] + sum(streams["refused"].values())
    assert len(seen.ended) == streams["admitted"]
    assert max(values["most_bytes"]) <= scenario.memory_bytes
    assert sum(map(len, seen.blocks.values())) == values["blocks"]
    assert all(0 <= busy <= 1 for busy in values["utilisation"])
    return seen, values


# streams that lose their device before their first block
@example(
    seed=1310,
    devices=2,
    noise=0.5,
    viewers=Viewers(per_minute=5, mean_s=2, block_s=0.25, lead_s=0, start_s=1),
    faults=Faults(slowdowns_per_hour=300, slowdown_factor=3, deaths_per_hour=300, rebuild_s=1),
    rules=Rules(max_rows=1, max_wait_s=0),
)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    devices=st.integers(1, 3),
    noise=st.floats(0, 0.6),
    viewers=st.builds(
        Viewers,
        per_minute=st.floats(5, 200),
        mean_s=st.floats(2, 60),
        block_s=st.floats(0.2, 1.5),
        trained_steps=st.sampled_from([(4,), (4, 2, 1), (1,), (2, 1)]),
        bytes=st.integers(0, 9),
        lead_s=st.floats(0, 3),
        start_s=st.floats(0.3, 2),
        prompts_per_minute=st.sampled_from([0.0, 20.0]),
        slow_share=st.sampled_from([0.0, 0.5]),
        slow_rate=st.floats(0.1, 1),
    ),
    faults=st.builds(
        Faults,
        failures=st.sampled_from([0.0, 0.2]),
        slowdowns_per_hour=st.sampled_from([0.0, 300.0]),
        slowdown_factor=st.floats(1, 20),
        deaths_per_hour=st.sampled_from([0.0, 300.0]),
        rebuild_s=st.floats(0.1, 10),
    ),
    rules=st.builds(Rules, max_rows=st.integers(1, 16), max_wait_s=st.floats(0, 3), commit_passes=st.integers(0, 1)),
)
def test_whatever_breaks_nothing_is_lost_doubled_disordered_or_starved_and_memory_holds(
    seed: int, devices: int, noise: float, viewers: Viewers, faults: Faults, rules: Rules
) -> None:
    limits = Limits(most_load=3.0)  # more than the device can do: everybody is late, and nobody may starve
    scenario = Scenario(
        viewers=(viewers,),
        seconds=10,
        devices=devices,
        memory_bytes=40,
        noise=noise,
        faults=faults,
        rules=rules,
        limits=limits,
        seed=seed,
    )
    play(scenario)


def test_the_faults_happen_and_streams_survive_them() -> None:
    seen, values = play(replace(SCENARIO, seconds=120))
    assert values["deaths"] >= 2 and values["failed_launches"] >= 10
    assert values["launches"]["recache"] > 5 and values["degraded"]["fewer_steps"] > 0
    assert max(map(len, seen.blocks.values())) > 80  # longer than a life of a device
    assert values["streams"]["refused"].get("memory", 0) > 0


def test_the_same_seed_gives_the_same_run_and_another_does_not() -> None:
    first, values = play(SCENARIO)
    again, same = play(SCENARIO)
    assert first.lines == again.lines and values == same
    assert play(replace(SCENARIO, seed=1))[0].lines != first.lines


@pytest.mark.parametrize("seed", [0, 1])
def test_under_twice_the_load_that_fits_accepted_streams_miss_less_than_one_percent(seed: int) -> None:
    # about 17 fit at a time, and 35 want to
    viewers = Viewers(per_minute=52, mean_s=40, trained_steps=(4, 2, 1))
    _, values = play(Scenario(viewers=(viewers,), seconds=120, noise=0.2, seed=seed))
    streams = values["streams"]
    assert streams["refused"]["time"] > 0.3 * streams["offered"]
    assert values["utilisation"][0] > 0.8
    assert values["blocks"] > 1000 and values["miss_rate"] < 0.01
    assert values["miss_rate_per_stream"]["p99"] < 0.05


def test_without_admission_the_same_load_is_missed_by_everybody() -> None:
    """The test above can fail: it is admission that keeps the promise."""
    viewers = Viewers(per_minute=52, mean_s=40)
    scenario = Scenario(viewers=(viewers,), seconds=120, noise=0.2, limits=Limits(most_load=inf))
    assert play(scenario)[1]["miss_rate"] > 0.2


def test_fewer_steps_carry_streams_through_a_slow_device_and_come_back() -> None:
    slow = Faults(slowdowns_per_hour=60, slowdown_factor=2, slowdown_s=10)
    viewers = Viewers(per_minute=60, mean_s=60, trained_steps=(4, 2, 1), lead_s=3.0)
    with_steps = play(Scenario(viewers=(viewers,), seconds=150, faults=slow))[1]
    fixed = replace(viewers, trained_steps=(4,))
    without = play(Scenario(viewers=(fixed,), seconds=150, faults=slow))[1]
    assert with_steps["degraded"]["fewer_steps"] > 20
    assert with_steps["steps"]["4"] > 0.9 * with_steps["blocks"]  # only while it was needed
    assert without["miss_rate"] > 0.01 and with_steps["miss_rate"] < 0.2 * without["miss_rate"]


def test_the_preview_codec_is_used_only_when_a_decode_would_be_late() -> None:
    costs = lines("stream", forward=(0.010, 0.002), decode=(0.100, 0.020))
    for rows in (1, 8):
        costs.give("preview", "stream", rows, 0.010)
    viewers = Viewers(per_minute=30, mean_s=30, trained_steps=(2,), preview=True, prompts_per_minute=1)
    slow = Faults(slowdowns_per_hour=360, slowdown_factor=4, slowdown_s=5)
    values = play(Scenario(viewers=(viewers,), seconds=60), costs)[1]
    assert values["degraded"]["preview"] < 0.05 * values["blocks"]
    slowed = play(Scenario(viewers=(viewers,), seconds=60, faults=slow), costs)[1]
    assert slowed["degraded"]["preview"] > 3 * values["degraded"]["preview"] + 3


def test_a_slow_viewer_costs_its_own_frames_only() -> None:
    viewers = Viewers(per_minute=6, mean_s=60, lead_s=3.0)
    made: list[float] = []
    for rate in (1.0, 0.5):
        kinds = (replace(viewers, slow_share=1.0, slow_rate=rate), viewers)
        seen, values = play(Scenario(viewers=kinds, seconds=200, noise=0))
        assert values["late_blocks"] == 0 and len(seen.blocks) > 20
        made.append(values["blocks"] * 0.75 / (values["stream_minutes"] * 60))
    # half of the viewers get half of the frames; the lead of 3 s at the beginning is the same
    assert made[0] == pytest.approx(1.03, abs=0.03)
    assert made[1] == pytest.approx(0.79, abs=0.03)


@pytest.mark.parametrize("commit_passes", [1, 0])
def test_a_device_serves_what_a_single_stream_needs_and_no_more(commit_passes: int) -> None:
    """One viewer, no noise: every number can be worked out by hand."""
    viewers = Viewers(per_minute=60, mean_s=1e5, trained_steps=(4,))
    rules = Rules(commit_passes=commit_passes)
    scenario = Scenario(viewers=(viewers,), seconds=61, noise=0, limits=Limits(most_streams=1), rules=rules)
    seen, values = play(scenario)
    first = 4 * 0.024 + 0.016
    assert values["first_frame"]["p50_s"] == pytest.approx(first, abs=0.0011)
    assert values["streams"]["refused"] == {"streams": values["streams"]["offered"] - 1}
    (blocks,) = seen.blocks.values()
    stayed_s = values["stream_minutes"] * 60
    # the first frame is due 1 s after the viewer came, and a block begins when the one before comes on screen
    assert len(blocks) == int((stayed_s - 1.0 + 0.75 - first) / 0.75) + 1
    busy_s = len(blocks) * ((4 + commit_passes) * 0.024 + 0.016)
    assert values["utilisation"][0] * 61 == pytest.approx(busy_s, abs=0.2)
    assert values["jitter"]["max_s"] == 0 and values["slack"]["p50_s"] == pytest.approx(0.75 - first, abs=0.04)


def test_two_devices_carry_twice_the_streams() -> None:
    viewers = Viewers(per_minute=200, mean_s=60)
    one, two = (play(Scenario(viewers=(viewers,), seconds=60, devices=n))[1] for n in (1, 2))
    assert two["stream_minutes"] == pytest.approx(2 * one["stream_minutes"], rel=0.15)


def test_a_histogram_keeps_milliseconds() -> None:
    histogram = Histogram()
    assert histogram.values() is None
    for milliseconds in range(100):
        histogram.add(milliseconds / 1000)
    histogram.add(1e6)
    histogram.add(-1.0)
    found = histogram.values()
    assert found is not None
    assert found["p50_s"] == pytest.approx(0.05, abs=0.0015) and found["p95_s"] == pytest.approx(0.095, abs=0.0025)
    assert found["max_s"] == 60


# Many runs at once.


def test_processes_count_together_what_each_would_count_alone() -> None:
    scenario = replace(SCENARIO, seconds=15, seed=5)
    assert [seed_of(5, part) for part in range(3)] == [seed_of(5, part) for part in range(3)]
    assert len({seed_of(seed, part) for seed in (5, 6) for part in range(50)}) == 100 and seed_of(5, 0) == 5
    alone = [simulate(replace(scenario, seed=seed_of(5, part)), COSTS) for part in range(2)]
    together = simulate_parts(scenario, COSTS, 2)
    values = together.values()
    assert values == merged(alone).values() and together.miss_rates == alone[0].miss_rates + alone[1].miss_rates
    assert values["devices"] == 4 and len(values["utilisation"]) == 4 and values["seconds"] == 15
    assert values["blocks"] == sum(one.blocks for one in alone) > 150
    assert values["steps"]["4"] == sum(one.steps[4] for one in alone)
    assert values["slack"]["max_s"] == max(one.values()["slack"]["max_s"] for one in alone)
    assert alone[0].values() != alone[1].values()
    assert simulate_parts(scenario, COSTS, 1).values() == alone[0].values()


def test_runs_of_different_lengths_are_not_counted_together() -> None:
    with pytest.raises(ValueError, match="one length"):
        merged([Tally(devices=1, seconds=1), Tally(devices=1, seconds=2)])


# What it looks for is found.


def test_a_scheduler_that_starves_a_stream_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def favourite(now_s: float, views: Sequence[StreamView], costs: CostModel, rules: Rules) -> Launch | Any:
        return choose(now_s, views[:1], costs, rules)

    choose = simulator.choose
    monkeypatch.setattr(simulator, "choose", favourite)
    with pytest.raises(Broken, match="passed over by"):
        simulate(Scenario(viewers=(replace(VIEWERS, lead_s=100),), seconds=60), COSTS)


def test_memory_above_the_cap_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "admit", lambda now_s, *_, **__: Admitted(due_s=now_s + 1, load=0))
    with pytest.raises(Broken, match="device 0 holds 6 bytes of 5"):
        simulate(Scenario(viewers=(VIEWERS,), seconds=60, memory_bytes=5), COSTS)


# The command.


def test_the_command_writes_a_report_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given_ = Given(forward="20+4", decode="10+6", steps="4,2", viewers=60, stay=20, seconds=30, deaths=100, seed=3)
    report, picture = tmp_path / "a.json", tmp_path / "a.png"
    assert simulate_command.run(given_, json=report, plot=picture, overwrite=False) == 0
    values = json.loads(report.read_text())
    assert values["command"] == "plan simulate" and values["seed"] == 3
    assert values["scenario"]["viewers"][0]["trained_steps"] == [4, 2]
    assert values["scenario"]["faults"]["deaths_per_hour"] == 100 and values["blocks"] > 100
    for name in ("first_frame", "slack", "jitter", "lateness"):
        assert {"p50_s", "p95_s", "p99_s"} <= values[name].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{values['streams']['offered']} came" in printed and "continuous" in printed
    with pytest.raises(UserError, match="--overwrite"):
        simulate_command.run(given_, json=None, plot=picture, overwrite=False)
    again = tmp_path / "b.json"
    assert simulate_command.run(given_, json=again, plot=None, overwrite=False) == 0
    assert json.loads(again.read_text()) == values
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png", "b.json"]


def test_a_scenario_and_costs_come_from_files(tmp_path: Path) -> None:
    scenario = replace(SCENARIO, viewers=(VIEWERS, replace(VIEWERS, shape="big", block_s=1.5)), seed=5)
    (tmp_path / "scenario.json").write_text(json.dumps(plain(scenario)))
    read = simulate_command.scenario_of(Given(scenario=tmp_path / "scenario.json"))
    assert read == scenario
    read = simulate_command.scenario_of(Given(scenario=tmp_path / "scenario.json", devices=4, failures=0.5))
    assert read == replace(scenario, devices=4, faults=replace(FAULTS, failures=0.5))
    COSTS.save(tmp_path / "costs.json")
    found = simulate_command.costs_of(Given(costs=tmp_path / "costs.json"), scenario)
    assert found.predict("forward", "stream", 8) == pytest.approx(COSTS.predict("forward", "stream", 8))
    with pytest.raises(UserError, match=r"no cost of 'forward' for the shape 'big'; known: decode of 'stream', "):
        simulate_command.check_costs(scenario, found)


def test_default_viewers_watch_what_was_measured(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = lines("3 latent frames", forward=(0.020, 0.004), decode=(0.010, 0.006))
    costs.save(in_tmp_path / "costs.json")
    arguments = "plan simulate --costs costs.json --viewers 60 --seconds 20 --json out.json"
    assert main(arguments.split()) == 0
    values = json.loads((in_tmp_path / "out.json").read_text())
    assert values["scenario"]["viewers"][0]["shape"] == "3 latent frames" and values["blocks"] > 100
    capsys.readouterr()
    costs.merge(COSTS)
    costs.save(in_tmp_path / "costs.json")
    assert main([*arguments.split(), "--overwrite"]) == 2
    assert one_line(capsys).startswith("costs.json has costs of 2 shapes")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "must be an object"),
        ({"viewers": [], "seconds": 5, "colour": 1}, "unknown field 'colour'; there are: devices, factors, faults"),
        (
            {"viewers": [{"per_minute": "many"}], "seconds": 5},
            r"viewers\[0\]: per_minute is 'many'; it must be of type",
        ),
        ({"viewers": [{"per_minute": 1}]}, "missing 1 required keyword-only argument: 'seconds'"),
        ({"viewers": [], "seconds": 5}, "viewers is empty"),
        ({"viewers": [{"per_minute": 1, "trained_steps": [0]}], "seconds": 5}, "trained_steps is"),
        ({"viewers": [{"per_minute": -1}], "seconds": 5}, r"viewers\[0\].per_minute is -1; it must be 0 to"),
        ({"viewers": [{"per_minute": 1}], "seconds": 5, "faults": {"failures": 2}}, "faults.failures is 2; it must be"),
        ({"viewers": [{"per_minute": 1}], "seconds": 5, "devices": True}, "devices is True; it must be of type int"),
    ],
)
def test_a_scenario_that_makes_no_sense_is_named(tmp_path: Path, values: Any, message: str) -> None:
    (tmp_path / "s.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        simulate_command.scenario_of(Given(scenario=tmp_path / "s.json"))


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (Given(), "costs are missing"),
        (Given(forward="20+4"), "--decode None"),
        (Given(forward="20", decode="10+6"), "--forward '20'; give milliseconds"),
        (Given(forward="0+0", decode="10+6"), "--forward"),
        (Given(forward="1.2.3+4", decode="10+6"), "--forward"),
        (Given(forward="20+4", decode="10+6", costs=Path("x")), "not both"),
        (Given(steps="four"), "--steps 'four'"),
        (Given(devices=0), "devices is 0"),
        (Given(processes=0), "--processes is 0; it must be 1 to 1024"),
        (Given(scenario=Path("none.json")), "cannot be read"),
    ],
)
def test_a_mistake_is_one_line(given_: Given, message: str) -> None:
    with pytest.raises(UserError, match=message):
        simulate_command.run(given_, json=None, plot=None, overwrite=False)


def test_measured_factors_replace_the_noise() -> None:
    calm = replace(SCENARIO, faults=Faults(), noise=0.0)
    given_factors = replace(calm, factors=(1.0,), noise=0.5)
    assert play(given_factors)[0].lines == play(calm)[0].lines != play(replace(calm, factors=(1.0, 1.5)))[0].lines
    assert simulate_command.scenario_of(Given()).factors == ()
