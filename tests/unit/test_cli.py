"""The command line on a tiny real model: every exit code, one line on stderr, and nothing lost when it is stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest

from streamgen import __version__
from streamgen_infer import stream_command, stream_options
from streamgen_infer.cli import main
from tests import command_line
from tests.command_line import RING, STAR, mp4_frames, one_line, y4m_frames
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def stream(in_tmp_path: Path, model: str) -> Callable[..., int]:
    return command_line.stream_command(model)


# Help.


@pytest.mark.parametrize(
    "argv", [["--version"], ["--help"], ["stream", "--help"], ["eval", "-h"], ["doctor", "--help"]]
)
def test_help_and_version(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and ("Usage: streamgen" in captured.out or captured.out == f"streamgen {__version__}\n")


# The user's mistakes.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a prompt"),
        ([""], "the prompt is empty"),
        (["  \n "], "the prompt is empty"),
        (["zorp quux"], "no word that this model knows"),
        (["zorp " * 2000], "no word that this model knows"),
        ([STAR, "--seconds", "0"], "must be above 0"),
        ([STAR, "--seconds", "-3"], "must be above 0"),
        ([STAR, "--seconds", "nan"], "must be above 0"),
        ([STAR, "--seconds", "1e300"], "at most 10000000 "),
        ([STAR, "--seconds", "ten"], "is no number"),
        ([STAR, "--fps", "0"], "--fps is 0.0; it must be 1 to 240"),
        ([STAR, "--fps", "1000"], "it must be 1 to 240"),
        ([STAR, "--fps", "nan"], "it must be 1 to 240"),
        ([STAR, "--steps", "0"], "--steps is 0; it must be 1 to 1000"),
        ([STAR, "--steps", "99999999999999999999"], "it must be 1 to 1000"),
        ([STAR, "--seed", "-1"], "--seed is -1; it must be 0 to 18446744073709551615"),
        ([STAR, "--threads", "0"], "--threads is 0"),
        ([STAR, "--scale", "1000"], "--scale is 1000"),
        ([STAR, "--steps", "few"], "Invalid value for '--steps'"),
        ([STAR, "--schedule", "pipeline"], "--schedule 'pipeline' does not exist; there are: serial"),
        ([STAR, "--cache", "deep"], "there are: relative, window, ema_sink"),
        ([STAR, "--transition", "wipe"], "there are: cut, recache, blend, scene"),
        ([STAR, "--dtype", "fp8"], "there are: auto, fp32, bf16"),
        ([STAR, "--device", "meta"], "there are: cpu, cuda, cuda:N, mps"),
        ([STAR, "--device", "cuda:77"], "device 'cuda:77' is not available here"),
        ([STAR, "--switch", "5"], "is not SECONDS=PROMPT"),
        ([STAR, "--switch", "x=y"], "is not SECONDS=PROMPT"),
        ([STAR, "--switch", "inf=y"], "is not SECONDS=PROMPT"),
        ([STAR, "--switch", "0.5="], "the prompt after = is empty"),
        ([STAR, "--switch", f"0={RING}"], "it must be after 0 s"),
        ([STAR, "--switch", f"-1={RING}"], "it must be after 0 s"),
        ([STAR, "--switch", f"1={RING}"], "is past the end of the video at 1 s"),
        ([STAR, "--switch", f"0.9={RING}"], "past the end: the stream has 2 blocks"),
        ([STAR, "--switch", f"0.5={RING}", "--switch", f"0.5={STAR}"], "order them by time"),
        ([STAR, "--switch", "0.5=zorp"], "no word that this model knows"),
        ([STAR, "--out", "a.mov"], "cannot write .mov files"),
        ([STAR, "--out", "no/a.mp4"], "the folder no does not exist"),
        ([STAR, "--report", "no/r.json"], "--report no/r.json: the folder no does not exist"),
        ([STAR, "--save-state", "no/s"], "--save-state no/s: the folder no does not exist"),
        ([STAR, "--report", "x", "--save-state", "x"], "must be different files"),
        ([STAR, "--resume", "missing"], "there is no such file"),
        ([STAR, "--model", "nowhere"], "model 'nowhere' does not exist"),
        ([STAR, "--bogus"], "No such option"),
        ([STAR, "extra"], "unexpected extra argument"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[-40:],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    stream: Callable[..., int], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stream(*arguments) == 2
    assert message in one_line(capsys)
    assert not list(Path().iterdir())


def test_a_damaged_model(stream: Callable[..., int], model: str, capsys: pytest.CaptureFixture[str]) -> None:

    shutil.copytree(model, "damaged")
    weights = Path("damaged/transformer/diffusion_pytorch_model.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    assert stream(STAR, "--model", "./damaged") == 2
    assert "truncated" in one_line(capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["bench", "--suite", "huge"], "--suite 'huge' does not exist; there are: sprites, mid, wan_1_3b,"),
        (["bench", "--dtype", "fp8"], "--dtype 'fp8' does not exist"),
        (["bench", "--blocks", "0"], "--blocks is 0"),
        (["bench", "--json", "no/b.json"], "the folder no does not exist"),
        (["eval"], "Missing argument 'suite'"),
        (["eval", "faces"], "no suite 'faces'; there are: sprites"),
        (["eval", "sprites", "--n", "1"], "--n is 1; it must be 2 to"),
        (["eval", "sprites", "--seconds", "1"], "--seconds is 1.0; it must be 5 to 3600"),
        (["eval", "sprites", "--model", "nowhere"], "model 'nowhere' does not exist"),
        (["train", "experiment=nothing"], "no experiment 'nothing'"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_mistakes_in_other_commands(
    in_tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "Usage: streamgen" in captured.out
    commands = "bench, convert, distill, doctor, eval, latents, live, load, plan, pull, record, replay, serve"
    commands += ", stream, study, train"
    assert captured.err == f"streamgen: name a command: {commands}\n"


@pytest.mark.parametrize("command", ["train", "distill"])
def test_without_hydra(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "hydra", None)
    assert main([command, "experiment=sprites_ar"]) == 2
    assert f"{command} needs hydra-core" in one_line(capsys)


@pytest.mark.parametrize("command", ["train", "distill"])
def test_train_and_distill_get_their_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"streamgen {command} experiment=" in capsys.readouterr().out


# Failures.


def test_an_unexpected_failure_is_one_line(
    stream: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: stream_options.Options) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(stream_command, "check", fail)
    assert stream(STAR) == 1
    assert one_line(capsys) == "RuntimeError: two lines (STREAMGEN_DEBUG=1 shows where)"
    monkeypatch.setenv("STREAMGEN_DEBUG", "1")
    assert stream(STAR) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("streamgen: RuntimeError: two lines\n")


def test_a_failure_in_the_middle_keeps_what_was_made(
    stream: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from streamgen import stream as library

    commit, made = library.rollout_block, []

    def third_fails(*args: Any, **kwargs: Any) -> Any:
        made.append(None)
        if len(made) > 3:  # one is the warm-up
            raise FloatingPointError("block 2: the denoised latents are not finite")
        return commit(*args, **kwargs)

    monkeypatch.setattr(library, "rollout_block", third_fails)
    assert stream(STAR, "-q", seconds="8", out="a.mp4") == 1
    assert one_line(capsys).startswith("FloatingPointError: block 2: the denoised latents are not finite")
    assert mp4_frames("a.mp4") == 24


PROGRAM = """
import resource, sys
from streamgen_infer.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk(run_python: Callable[..., Any], model: str, tmp_path: Path) -> None:
    done = run_python("-c", PROGRAM, "stream", STAR, "--model", model, "--seconds", "60", "--out", "a.mp4", "-q")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done
    assert "cannot write a.mp4: File too large (errno 27)" in done.stderr and "are kept in a.part.mp4" in done.stderr
    frames = mp4_frames(tmp_path / "a.part.mp4")
    assert frames > 0 and frames % 12 == 0 and f"; {frames} frames are kept" in done.stderr


# Signals. The child runs an endless stream; what it has made is looked at while it runs.


class Child:
    """`streamgen stream --seconds inf` as a process of its own."""

    def __init__(self, folder: Path, model: str, *arguments: str, out: str = "a.mp4") -> None:
        command = [
            sys.executable,
            "-m",
            "streamgen",
            "stream",
            STAR,
            "--model",
            model,
            "--seconds",
            "inf",
            "--out",
            out,
        ]
        self.folder = folder
        self.process = subprocess.Popen(
            [*command, "--fps", "240", *arguments],
            cwd=folder,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, name: str, size: int = 20_000) -> None:
        path = self.folder / name
        deadline_s = time.monotonic() + 100
        while not path.exists() or path.stat().st_size < size:
            assert self.process.poll() is None and time.monotonic() < deadline_s, self.process.communicate()
            time.sleep(0.01)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(number)
        try:
            err = self.process.communicate(timeout=60)[1]
        finally:
            self.process.kill()
        return self.process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_while_streaming_keeps_everything(tmp_path: Path, model: str, number: signal.Signals) -> None:
    child = Child(tmp_path, model, "--report", "r.json", "--save-state", "s")
    child.wait_for("a.part.mp4")
    code, err = child.end(number)
    assert code == 130, err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["interrupted"] is True
    assert mp4_frames(tmp_path / "a.mp4") == report["frames"] > 0 and report["frames"] % 12 == 0
    assert f"streamgen: interrupted; {report['frames']} frames are in a.mp4" in err and "Traceback" not in err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.mp4", "r.json", "s"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_while_loading(tmp_path: Path, model: str, number: signal.Signals) -> None:
    child = Child(tmp_path, model)
    assert child.process.stderr is not None
    assert child.process.stderr.readline().startswith("loading")
    code, err = child.end(number)
    assert (code, err) == (130, "streamgen: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_kill_leaves_a_part_that_plays(tmp_path: Path, model: str) -> None:
    child = Child(tmp_path, model)
    child.wait_for("a.part.mp4")
    assert child.end(signal.SIGKILL)[0] == -signal.SIGKILL
    with av.open(str(tmp_path / "a.part.mp4")) as container:
        frames = 0
        try:
            for _ in container.decode(video=0):
                frames += 1
        except av.error.InvalidDataError:  # the block that was being written
            pass
    assert frames >= 12


def test_a_paced_stream_stops_at_once(tmp_path: Path, model: str) -> None:
    child = Child(tmp_path, model, "--fps", "1", "--realtime", out="a.y4m")
    child.wait_for("a.part.y4m")
    assert child.end(signal.SIGTERM)[0] == 130
    assert len(y4m_frames(tmp_path / "a.y4m")) in (12, 24)  # one block, or the one made ahead too


def test_the_reader_of_stdout_goes_away(tmp_path: Path, model: str) -> None:
    child = Child(tmp_path, model, "-q", out="-")
    assert child.process.stdout is not None
    child.process.stdout.buffer.read(100_000)  # type: ignore[attr-defined]
    child.process.stdout.close()
    assert child.process.stderr is not None
    assert child.process.stderr.read() == "streamgen: the reader of stdout went away\n"
    assert child.process.wait(60) == 1
