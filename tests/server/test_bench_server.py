"""`streamgen bench --suite server`: a server in a process of its own, and what its viewers saw."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamgen_infer.bench import server as bench_server
from streamgen_infer.bench.suites import Options
from streamgen_infer.errors import Failure
from streamgen_infer.interrupts import Stop
from tests.tiny_model import save_tiny_model

OPTIONS = Options(
    suite="server",
    dtype="fp32",
    threads=1,
    blocks=None,
    seconds=1.0,
    viewers=2,
    device="cpu",
    json=None,
    png=None,
    overwrite=False,
)


def test_viewers_of_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_server, "PER_SECOND", 20.0)
    found = bench_server.server(OPTIONS, Stop(), str(save_tiny_model(tmp_path / "tiny")))
    assert found is not None and found["served"] == 2 and (found["frames"], found["blocks"]) == (48, 4)
    assert found["lost_frames"] == 0 and found["connect_to_first_frame_ms"]["p50"] > 0 and found["encode_ms"] > 0
    assert "connect_to_first_frame_ms: p50" in capsys.readouterr().out


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"the server ended with exit code 2: .* does not exist: give a model folder"):
        bench_server.server(OPTIONS, Stop(), str(tmp_path / "none"))


def test_a_stop_before_it_is_ready(tmp_path: Path) -> None:
    assert bench_server.server(OPTIONS, Stop(requested=True), str(save_tiny_model(tmp_path / "tiny"))) is None
