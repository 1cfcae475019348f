"""What the tests of the command line share: prompts, a runner, and readers of what it left behind."""

from collections.abc import Callable
from pathlib import Path

import av
import pytest

from streamgen_infer.cli import main

STAR = "a red star spinning over a snow background"
RING = "a blue ring rising over a navy background"


def stream_command(model: str) -> Callable[..., int]:
    """`streamgen stream` of one second to out.y4m in fp32, with more arguments; later ones win."""

    def run(*arguments: str, seconds: str = "1", out: str | None = "out.y4m") -> int:
        place = () if out is None else ("--out", out)
        return main(["stream", "--model", model, "--dtype", "fp32", "--seconds", seconds, *place, *arguments])

    return run


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith(("loading", "from "))]
    assert len(lines) == 1 and lines[0].startswith("streamgen: "), err
    return lines[0].removeprefix("streamgen: ")


def y4m_frames(path: str | Path) -> list[bytes]:
    return Path(path).read_bytes().split(b"FRAME\n")[1:]


def mp4_frames(path: str | Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))
