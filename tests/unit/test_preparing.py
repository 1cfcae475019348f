"""What a model does once before it streams is told while it happens."""

import logging

import pytest

from streamgen_infer.live_view import Live, Plain, Quiet
from streamgen_infer.preparing import told

LOG = logging.getLogger("streamgen")


def prepare() -> None:
    LOG.info("measuring attention")
    for done in range(1, 5):
        LOG.info("kernels compiled and compared: k%d", done, extra={"done": done, "of": 4})
    LOG.warning("plain torch operations on cuda: a kernel is wrong")


def test_a_log_gets_the_first_and_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    before = (LOG.level, list(LOG.handlers))
    with told(Plain()):
        prepare()
    assert capsys.readouterr().err.splitlines() == [
        "measuring attention",
        "kernels compiled and compared: k1 (1 of 4)",
        "kernels compiled and compared: k4 (4 of 4)",
        "streamgen: warning: plain torch operations on cuda: a kernel is wrong",
    ]
    assert (LOG.level, LOG.handlers) == before
    LOG.info("nobody listens")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_in_place(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with told(Live()):
        prepare()
    shown = capsys.readouterr().err
    steps = [part.rstrip() for part in shown.split("\n")[1].split("\r")]
    assert steps[0] == "[######------------------] 1 of 4  kernels compiled and compared: k1"
    assert steps[-1] == "[########################] 4 of 4  kernels compiled and compared: k4"
    assert len(steps) == 4 and "\x1b" not in shown  # the cursor stays


def test_quiet_leaves_the_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with told(Quiet()):
        prepare()
    assert capsys.readouterr().err == "streamgen: warning: plain torch operations on cuda: a kernel is wrong\n"
