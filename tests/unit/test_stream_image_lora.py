"""`streamgen stream --image --lora --lora-at`: the same frames as the library's, and every mistake in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from streamgen.pipeline import StreamPipeline
from streamgen.stream import Stream
from tests import command_line
from tests.command_line import STAR, one_line, y4m_frames
from tests.tiny_model import save_tiny_model

LAYER = "blocks.1.ffn.0"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def stream(in_tmp_path: Path, model: str) -> Callable[..., int]:
    generator = torch.Generator().manual_seed(0)
    for name in ("ink", "oil"):
        down, up = torch.randn(2, 24, generator=generator), torch.randn(32, 2, generator=generator)
        save_file({f"{LAYER}.lora_down.weight": down, f"{LAYER}.lora_up.weight": up}, f"{name}.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("start.png")
    return command_line.stream_command(model)


def library(model: str, blocks: int, begin: Callable[[StreamPipeline], Stream]) -> np.ndarray:
    stream = begin(StreamPipeline.from_pretrained(model, dtype="fp32"))
    return np.concatenate([next(stream).frames for _ in range(blocks)])


def written(frames: np.ndarray, path: str) -> None:
    """Compare with the command's PNGs, which lose nothing."""
    files = sorted(Path(path).glob("*.png"))
    assert len(files) <= len(frames)
    for file, frame in zip(files, frames, strict=False):
        assert np.array_equal(np.asarray(Image.open(file)), frame)


def test_an_image_begins_the_video_and_a_saved_stream_goes_on(stream: Callable[..., int], model: str) -> None:
    assert stream(STAR, "--image", "start.png", "--save-state", "s", seconds="2", out="first") == 0
    assert stream("--resume", "s", seconds="1", out="second") == 0
    assert (len(list(Path("first").glob("*.png"))), len(list(Path("second").glob("*.png")))) == (32, 16)
    frames = library(model, 5, lambda pipe: pipe.stream(STAR, image="start.png"))
    written(frames, "first")
    written(frames[32:], "second")
    assert not np.array_equal(frames[:48], library(model, 4, lambda pipe: pipe.stream(STAR)))


def test_loras_are_merged_and_switched(stream: Callable[..., int], model: str) -> None:
    at = ("--lora-at", "0.75=oil.safetensors=-0.5", "--lora-at", "1.5=none")
    assert stream(STAR, "--lora", "ink.safetensors=0.5", *at, "--report", "r.json", seconds="2.2", out="made") == 0

    def begin(pipe: StreamPipeline) -> Stream:
        pipe.load_lora("ink.safetensors", 0.5)
        pipe.adapters.load(Path("oil.safetensors"))
        made = pipe.stream(STAR)
        made.use_loras({"oil": -0.5}, at_block=1)
        made.use_loras({}, at_block=2)
        return made

    frames = library(model, 3, begin)
    written(frames, "made")
    assert len(list(Path("made").glob("*.png"))) == 35
    assert not np.array_equal(frames[:12], library(model, 1, lambda pipe: pipe.stream(STAR)))
    assert json.loads(Path("r.json").read_text())["loras"] == {"ink.safetensors": 0.5}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--image", "none.png"), "there is no such file"),
        (("--image", "ink.safetensors"), "is no image that can be read"),
        (("--lora", "none.safetensors"), "there is no file none.safetensors"),
        (("--lora", "start.png"), "start.png"),
        (("--lora", "ink.safetensors=1e6"), "it must be -100 to 100"),
        (("--lora-at", "ink.safetensors"), "is not SECONDS=FILE"),
        (("--lora-at", "5=ink.safetensors"), "before the end of the video at 1 s"),
        (("--lora-at", "0.5=none", "--lora-at", "0.2=none"), "order them by time"),
        (("--image", "start.png", "--ranks", "2", "--schedule", "step_chain"), "leave --ranks out"),
        (("--image", "start.png", "--schedule", "stream_batch", "--force"), "made block after block"),
        (("--lora-at", "0=ink.safetensors", "--schedule", "stream_batch", "--force"), "have the same weights"),
    ],
)
def test_mistakes(
    stream: Callable[..., int], arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stream(STAR, *arguments, "--quiet") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "trained for" not in line]
    assert len(lines) == 1 and said in lines[0]
    assert not Path("out.y4m").exists()


def test_an_image_and_a_saved_stream_exclude_each_other(
    stream: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert stream(STAR, "--save-state", "s") == 0
    assert len(y4m_frames("out.y4m")) == 16
    capsys.readouterr()
    assert stream("--resume", "s", "--image", "start.png", "--overwrite") == 2
    assert "begins a new stream" in one_line(capsys)


def test_a_saved_stream_goes_on_with_its_loras_and_no_others(
    stream: Callable[..., int], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = ("--lora", "ink.safetensors=0.5", "--lora-at", "1.2=oil.safetensors=-0.5")
    assert stream(STAR, *begun, "--save-state", "s", seconds="1.8", out="first") == 0
    capsys.readouterr()
    for wrong in ((), ("--lora", "ink.safetensors=0.5"), ("--lora", "oil.safetensors=0.7")):
        assert stream("--resume", "s", *wrong, seconds="1", out="no") == 2
        said = one_line(capsys)
        assert ("made with the adapter" in said) if "oil.safetensors=0.7" not in wrong else ("oil" in said)
    again = ("--lora", "oil.safetensors=-0.5", "--lora-at", "0=none")
    assert stream("--resume", "s", *again, seconds="1.2", out="second") == 0

    def begin(pipe: StreamPipeline) -> Stream:
        pipe.load_lora("ink.safetensors", 0.5)
        pipe.adapters.load(Path("oil.safetensors"))
        made = pipe.stream(STAR)
        made.use_loras({"oil": -0.5}, at_block=2)
        made.use_loras({}, at_block=3)
        return made

    frames = library(model, 4, begin)
    written(frames, "first")
    written(frames[29:], "second")
    assert stream(STAR, "--save-state", "plain", out="plain.y4m") == 0
    capsys.readouterr()
    assert stream("--resume", "plain", "--lora", "ink.safetensors", out="no") == 2
    assert "goes on with no --lora; give that" in one_line(capsys)
