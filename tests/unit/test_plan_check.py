"""`streamgen plan check`: bounds beside what a virtual clock makes of the same costs."""

import json
from pathlib import Path

import pytest

from streamgen.resources import configs_dir
from streamgen_infer.cli import main
from streamgen_infer.models.fit_sizes import read_sizes
from streamgen_infer.plan import check
from streamgen_infer.plan.measure import load_costs
from tests.command_line import one_line

COSTS = configs_dir() / "simulate" / "h200-wan-1.3b-costs.json"


def test_every_schedule_reaches_its_bound_and_the_bound_is_of_the_costs() -> None:
    sizes = read_sizes("longlive")
    found = list(check.checks(sizes, load_costs(COSTS, sizes.geometry), devices=2, steps=4, send_ms=0.0))
    assert all(0.95 < one.share < 1.01 for one in found)
    bounds = {(one.schedule, one.devices): one.bound_fps for one in found}
    assert len(bounds) == 8
    # 12 frames; 5 passes of 105 ms and a decode of 190 where there is a commit; halves where the work can be halved
    assert bounds["replicas", 1] == bounds["interleaved", 1] == pytest.approx(12 / 0.715)
    assert bounds["replicas", 2] == pytest.approx(2 * 12 / 0.715)
    assert bounds["step_chain", 2] == pytest.approx(12 / (2 * 0.105 + 0.190))


def test_the_table_the_file_and_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "check.json"
    command = ["plan", "check", "--costs", str(COSTS), "--devices", "1", "--json", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "replicas" in said and "layer_ring" in said and "was not trained for same_level" in said
    values = json.loads(out.read_text())
    assert {one["schedule"] for one in values["checks"]} == {"replicas", "step_chain", "layer_ring", "interleaved"}
    assert all(one["share"] == one["played_fps"] / one["bound_fps"] for one in values["checks"])
    monkeypatch.setattr(check, "LEAST", 1.5)
    assert main([*command, "--overwrite"]) == 1


def test_a_file_that_is_not_of_costs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "check", "--costs", str(COSTS.with_name("faults.json"))]) == 2
    assert "not a file of measured costs" in one_line(capsys)
