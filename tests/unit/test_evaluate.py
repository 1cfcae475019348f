"""`streamgen eval sprites`: right video scores, wrong video does not, and a stop keeps what was judged."""

import json
import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from streamgen.worlds import sprites
from streamgen_infer import evaluate
from streamgen_infer.cli import main
from tests.tiny_model import save_tiny_model

BLOCK = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", height=64, width=64))


def rendered(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    blocks: int,
    *,
    on_block: Callable[[int, Tensor], None],
    switches: Mapping[int, Sequence[str]] | None = None,
    **rest: Any,
) -> None:
    """A model that obeys: the world's own renderer in the place of `generate`."""
    assert len(prompts) == len(set(seeds))
    segments, starts = [[sprites.parse(prompt) for prompt in prompts]], [torch.zeros(len(prompts), dtype=torch.long)]
    for block, after in (switches or {}).items():
        segments.append([sprites.parse(prompt) for prompt in after])
        starts.append(torch.full((len(prompts),), BLOCK * block))
    rng = torch.Generator().manual_seed(seeds[0])
    video = sprites.to_uint8(sprites.render_switched(segments, starts, BLOCK * blocks, rng))
    for block in range(blocks):
        on_block(block, video[:, BLOCK * block : BLOCK * (block + 1)])


def run(model: str, *arguments: str) -> int:
    return main(["eval", "sprites", "--model", model, "--dtype", "fp32", *arguments])


def test_a_model_that_obeys(in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "generate", rendered)
    arguments = ("--n", "24", "--seed", "3", "--seconds", "12", "--long-n", "6", "--switches", "8", "--batch", "10")
    assert run(model, *arguments, "--json", "e.json", "--sheet", "e.png") == 0
    found = json.loads(Path("e.json").read_text())
    assert min(found["adherence"].values()) > 0.9 and set(found["adherence"]) == {*sprites.ATTRIBUTES, "obeys"}
    assert found["presence"] > 0.95
    assert [one["start_s"] for one in found["by_segment"]] == [0, 5]
    assert all(one["obeys"] > 0.8 and one["n"] == 6 for one in found["by_segment"])
    assert found["nulls"]["shuffled"] < 0.1 and found["nulls"]["background_only"] == 0
    assert found["switch"]["obeys"] >= 0.75 and found["switch"]["median_latency_s"] <= 1 and found["switch"]["n"] == 8
    assert (found["n"], found["held_out"], found["interrupted"], found["steps"]) == (24, True, False, 2)
    for name in ("frames", "fps", "load_s", "ttff_s", "block_ms", "deadline_misses", "peak_rss_mb", "version"):
        assert found[name] is not None, name
    # 24 clips of 7 blocks, 6 streams of 16, 8 of 4 + 7
    assert found["frames"] == BLOCK * (24 * 7 + 6 * 16 + 8 * 11)
    with Image.open("e.png") as sheet:
        assert sheet.size == (2 * (8 * 66 + 2), 12 * (64 + 13 + 4))


def test_a_model_that_shows_something_else(
    in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(pipe: Any, prompts: Sequence[str], *rest: Any, **keywords: Any) -> None:
        rendered(pipe, [*prompts[1:], prompts[0]], *rest, **keywords)

    monkeypatch.setattr(evaluate, "generate", other)
    assert run(model, "--n", "12", "--switches", "0", "--json", "e.json") == 0
    found = json.loads(Path("e.json").read_text())
    assert found["adherence"]["obeys"] < 0.2
    assert found["switch"] == {"obeys": None, "median_latency_s": None, "reached": 0, "n": 0, "transition": "recache"}
    assert len(found["by_segment"]) == 1
    # The table's title is broken into lines where the model's path is long.
    assert "12 held-out captions, 2 steps" in " ".join(capsys.readouterr().out.split())


def test_the_model_itself_is_run(in_tmp_path: Path, model: str) -> None:
    """Random weights: no figure is expected, but every one is there."""
    arguments = ("--n", "3", "--seconds", "10", "--long-n", "2", "--switches", "2", "--steps", "4", "--json", "e.json")
    assert run(model, *arguments, "--cache", "window", "--transition", "cut") == 0
    found = json.loads(Path("e.json").read_text())
    assert (found["steps"], found["cache"], found["switch"]["transition"]) == (4, "window", "cut")
    assert len(found["by_segment"]) == 2 and found["n"] == 3


def test_captions_are_held_out_and_chosen_by_seed(
    in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def listen(pipe: Any, prompts: Sequence[str], *rest: Any, **keywords: Any) -> None:
        asked.append([*prompts, *(text for texts in (keywords["switches"] or {}).values() for text in texts)])
        rendered(pipe, prompts, *rest, **keywords)

    monkeypatch.setattr(evaluate, "generate", listen)
    for seed in ("0", "0", "1"):
        assert run(model, "--n", "4", "--switches", "2", "--seed", seed) == 0
    assert asked[:2] == asked[2:4] != asked[4:]
    assert all(sprites.is_held_out(sprites.parse(text)) for texts in asked for text in texts)


def test_a_stop_keeps_what_was_judged(
    in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = []

    def stopped(*arguments: Any, **keywords: Any) -> None:
        batches.append(None)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        rendered(*arguments, **keywords)

    monkeypatch.setattr(evaluate, "generate", stopped)
    assert run(model, "--n", "12", "--batch", "5", "--json", "e.json") == 130
    found = json.loads(Path("e.json").read_text())
    assert (found["n"], found["interrupted"]) == (5, True)
    assert "interrupted; these figures are of what was made so far" in capsys.readouterr().err


def test_existing_files_are_kept(in_tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("e.json", "e.png"):
        Path(name).write_text("mine")
    assert run(model, "--json", "e.json") == run(model, "--sheet", "e.png") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert Path("e.json").read_text() == Path("e.png").read_text() == "mine"


def test_a_model_that_is_not_square(
    in_tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = save_tiny_model(tmp_path_factory.mktemp("models") / "wide", width=64)
    assert run(str(wide)) == 2
    assert "the sprites world is square" in capsys.readouterr().err


def test_sizes_that_cannot_be_read_count_nowhere() -> None:
    row = dict.fromkeys((*sprites.ATTRIBUTES, "obeys", "presence"), 1.0)
    rows = [row, {**row, "size": math.nan, "obeys": 0.0}]
    merged = evaluate._merged(rows)
    assert (merged["size"], merged["obeys"], merged["n"]) == (1.0, 0.5, 2)
    assert evaluate._without_nan({"a": [math.nan, 1.0]}) == {"a": [None, 1.0]}
