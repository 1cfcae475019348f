"""`streamgen bench compare`: ratios decide, times do so when asked, and only like is compared with like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamgen_infer.bench.compare import compare as lines_of
from streamgen_infer.cli import main
from tests.command_line import one_line

RESULT = {"suite": "sprites", "dtype": "fp32", "threads": 1, "steps": 4, "block_ms": 100.0, "cpu_ratio_to_bound": 1.2}


def write(name: str, cpu: str = "a CPU", **changes: Any) -> str:
    result = {**RESULT, "tokens_per_s": 1000.0, "host_share": 0.04, **changes}
    Path(name).write_text(
        json.dumps({"command": "bench", "version": "0", "environment": {"cpu": cpu}, "results": [result]})
    )
    return name


def compare(*arguments: str) -> int:
    return main(["bench", "compare", *arguments])


def test_a_ratio_that_grew_is_a_regression(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, same, worse = write("old.json"), write("same.json"), write("worse.json", cpu_ratio_to_bound=1.5)
    assert compare(old, same) == 0
    assert "no regression beyond 5 % in 1 figures" in capsys.readouterr().out
    assert compare(old, worse) == 1
    out = capsys.readouterr().out
    assert "regression: sprites fp32 1 thread cpu_ratio_to_bound: 1.2 -> 1.5, 1.250 x as bad" in out
    assert out.count("REGRESSION") == 1
    assert compare(old, worse, "--threshold", "0.3") == 0
    assert compare(worse, old) == 0


def test_times_and_rates_decide_only_when_asked(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, slow = write("old.json"), write("slow.json", block_ms=200.0, tokens_per_s=500.0)
    assert compare(old, slow) == 0
    assert capsys.readouterr().out.count("(depends on the load)") == 3
    assert compare(old, slow, "--times") == 1
    assert capsys.readouterr().out.count("REGRESSION") == 2
    assert compare(slow, old, "--times") == 0


def test_a_small_share_may_double(in_tmp_path: Path) -> None:
    old = write("old.json")
    assert compare(old, write("new.json", host_share=0.08), "--times") == 0
    assert compare(old, write("new.json", host_share=0.10), "--times") == 1


def test_a_loaded_machine_is_named(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(Path(write("old.json")).read_text())
    values["environment"]["cores"] = 2
    for name, load in (("busy.json", 9.0), ("idle.json", 0.5)):
        Path(name).write_text(json.dumps({**values, "load": load}))
    assert compare("idle.json", "busy.json") == 0
    out = capsys.readouterr().out
    assert "note: busy.json was measured under load 9.0 on 2 cores" in out and "note: idle.json" not in out


def test_from_nothing_to_something() -> None:
    old, new = ({"cpu": "x", "results": [{**RESULT, "cache_bytes": count}]} for count in (0, 8))
    (line,) = [line for line in lines_of(old, new, times=False, force=False) if line.name == "cache_bytes"]
    assert line.regressed(0.05)
    assert not any(line.name == "cache_bytes" for line in lines_of(old, old, times=False, force=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpu": "another CPU"}, "measured on different CPUs, a CPU and another CPU"),
        ({"suite": "mid"}, "the files measured different things: mid fp32 1 thread; sprites fp32 1 thread"),
        ({"steps": 2}, "steps is 4 in one file and 2 in the other"),
    ],
)
def test_only_like_with_like(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    old, new = write("old.json"), write("new.json", **changes)
    assert compare(old, new) == 2
    assert message in one_line(capsys)
    assert compare(old, new, "--force") == (2 if "suite" in changes else 0)  # nothing is in common


def test_mistakes(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write("old.json")
    Path("other.json").write_text('{"command": "eval"}')
    Path("text.json").write_text("no")
    for arguments, message in (
        ((old,), "takes two files"),
        ((old, "none.json"), "cannot read none.json"),
        ((old, "text.json"), "text.json is no JSON file"),
        ((old, "other.json"), "is no file of `streamgen bench --json`"),
        ((old, old, "--threshold", "0"), "--threshold is 0"),
    ):
        assert compare(*arguments) == 2
        assert message in one_line(capsys)
