"""`streamgen eval sprites`: right video scores, wrong video does not, and a stop keeps what was judged."""

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from streamgen.metrics import adherence
from streamgen.worlds import sprites
from streamgen_infer.cli import main
from streamgen_infer.evaluation import measure, options
from streamgen_infer.evaluation.report import plain
from tests.command_line import one_line
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


def report(name: str = "e.json") -> dict[str, Any]:
    return json.loads(Path(name).read_text())


def test_a_model_that_obeys(in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "generate", rendered)
    arguments = ("--n", "12", "--seed", "3", "--seconds", "12", "--long-n", "4", "--switches", "4", "--batch", "5")
    assert run(model, *arguments, "--json", "e.json", "--sheet", "e.png") == 0
    found = report()
    assert min(found["adherence"].values()) > 0.9 and set(found["adherence"]) == {*sprites.ATTRIBUTES, "obeys"}
    assert found["presence"] > 0.95
    assert [one["start_s"] for one in found["by_segment"]] == [0, 5]
    assert all(one["obeys"] > 0.8 and one["n"] == 4 for one in found["by_segment"])
    assert found["nulls"]["shuffled"] < 0.1 and found["nulls"]["background_only"] == 0
    assert found["switch"]["obeys"] >= 0.75 and found["switch"]["median_latency_s"] <= 1 and found["switch"]["n"] == 4
    assert found["switches"] == [found["switch"]] and found["switch"]["within_1s"] >= 0.5
    assert 0.8 < found["drift"]["ratio"] < 1.2 and found["drift"]["n"] == 4 and found["drift"]["last_start_s"] == 5
    motion, real = found["motion"], found["motion"]["reference"]
    assert motion["speed"] == pytest.approx(real["speed"], rel=0.2) and motion["jerk"] < 3 * real["jerk"]
    assert found["stream"]["t"] > 0.2 and found["stream"]["f"] > 0.8 < found["stream"]["d"]
    assert found["stream"]["features"] == "random-conv-64" and set(found["stream"]["ceiling"]) == {"t", "f", "d"}
    assert (found["n"], found["held_out"], found["interrupted"], found["steps"]) == (12, True, False, 2)
    for name in ("frames", "fps", "load_s", "ttff_s", "block_ms", "deadline_misses", "peak_rss_mb", "version"):
        assert found[name] is not None, name
    # 12 clips of 7 blocks, 4 streams of 16, 4 of 4 + 7
    assert found["frames"] == BLOCK * (12 * 7 + 4 * 16 + 4 * 11)
    with Image.open("e.png") as sheet:
        assert sheet.size == (2 * (8 * 66 + 2), 6 * (64 + 13 + 4))


def test_a_model_that_shows_something_else(
    in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(pipe: Any, prompts: Sequence[str], *rest: Any, **keywords: Any) -> None:
        rendered(pipe, [*prompts[1:], prompts[0]], *rest, **keywords)

    monkeypatch.setattr(measure, "generate", other)
    assert run(model, "--n", "6", "--switches", "0", "--json", "e.json") == 0
    found = report()
    assert found["adherence"]["obeys"] < 0.2
    switch = found["switch"]
    assert (switch["obeys"], switch["median_latency_s"], switch["reached"], switch["n"]) == (None, None, 0, 0)
    assert len(found["by_segment"]) == 1 and found["by_segment"][0]["n"] == 6 and found["drift"] is None
    assert "6 held-out captions, 2 steps" in capsys.readouterr().out


def test_the_model_itself_is_run(in_tmp_path: Path, model: str) -> None:
    """Random weights: no figure is expected, but every one is there."""
    arguments = ("--n", "3", "--seconds", "10", "--long-n", "2", "--switches", "2", "--steps", "4", "--json", "e.json")
    assert run(model, *arguments, "--cache", "window", "--transition", "cut") == 0
    found = report()
    assert (found["steps"], found["cache"], found["switch"]["transition"]) == (4, "window", "cut")
    assert len(found["by_segment"]) == 2 and found["n"] == 3
    assert 0 < found["codec"]["psnr_db"] < 20 and found["codec"]["n"] == 3  # a codec of random weights
    assert found["trained"] and found["motion"]["n"] == 3


def test_one_byte_modes_are_run_named_and_compared(
    in_tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    modes: dict[str, tuple[str, ...]] = {
        "plain": (),
        "keys": ("--cache-dtype", "int8"),
        "weights": ("--cache-dtype", "fp8", "--weights-dtype", "int8"),
    }
    for name, chosen in modes.items():
        files = ("--json", f"{name}.json", "--sheet", f"{name}.png")
        assert run(model, "--n", "2", "--switches", "0", *files, *chosen) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if "2 held-out captions" in line]
    assert [line.partition("2 steps")[2] for line in heads] == [
        ", fp32",
        ", fp32, keys and values int8",
        ", fp32, keys and values fp8, weights int8",
    ]
    dtypes = [(found["cache_dtype"], found["weights_dtype"]) for found in map(report, (f"{m}.json" for m in modes))]
    assert dtypes == [("fp32", "fp32"), ("int8", "fp32"), ("fp8", "int8")]
    assert len({Path(f"{name}.png").read_bytes() for name in modes}) == 3  # three videos
    assert main(["eval", "compare", *(f"{name}.json" for name in modes)]) == 0
    assert "plain" in capsys.readouterr().out


def test_captions_are_held_out_and_chosen_by_seed(
    in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def listen(pipe: Any, prompts: Sequence[str], *rest: Any, **keywords: Any) -> None:
        asked.append([*prompts, *(text for texts in (keywords["switches"] or {}).values() for text in texts)])
        rendered(pipe, prompts, *rest, **keywords)

    monkeypatch.setattr(measure, "generate", listen)
    for seed in ("0", "0", "1"):
        assert run(model, "--n", "2", "--switches", "1", "--seed", seed) == 0
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

    monkeypatch.setattr(measure, "generate", stopped)
    assert run(model, "--n", "6", "--batch", "3", "--json", "e.json") == 130
    found = report()
    assert (found["n"], found["interrupted"]) == (3, True)
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


def test_every_share_has_an_interval_and_every_word_its_count(
    in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "generate", rendered)
    assert run(model, "--n", "8", "--switches", "1", "--json", "e.json") == 0
    found = report()
    assert set(found["intervals"]) == {*found["adherence"], "presence"}
    for group, shares in (
        (found["intervals"], {**found["adherence"], "presence": found["presence"]}),
        (found["by_segment"][0]["intervals"], found["by_segment"][0]),
        (found["switch"]["intervals"], found["switch"]),
        (found["nulls"]["intervals"], found["nulls"]),
        (found["codec"]["intervals"], {**found["codec"]["adherence"], "presence": found["codec"]["presence"]}),
        (found["motion"]["intervals"], found["motion"]),
    ):
        for name, (low, high) in group.items():
            assert low <= shares[name] <= high, name
    for attribute, words in found["by_word"].items():
        assert attribute == "size" or sum(one["n"] for one in words.values()) == 8
        mean = sum(one["right"] * one["n"] for one in words.values()) / sum(one["n"] for one in words.values())
        assert mean == pytest.approx(found["adherence"][attribute])
    shown = capsys.readouterr().out
    word, one = next(iter(found["by_word"]["background"].items()))
    assert f"{word} 100 ({one['n']})" in shown and "dB PSNR" in shown


def test_several_seeds_and_steps(
    in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def worse_in_one_step(pipe: Any, prompts: Sequence[str], *rest: Any, **keywords: Any) -> None:
        prompts = [*prompts[1:], prompts[0]] if keywords["steps"] == 1 else prompts
        rendered(pipe, prompts, *rest, **keywords)

    monkeypatch.setattr(measure, "generate", worse_in_one_step)
    arguments = ("--n", "4", "--seeds", "4,5", "--steps", "2,1", "--switches", "0", "--seconds", "10", "--long-n", "2")
    assert run(model, *arguments, "--json", "e.json") == 0
    found = report()
    two, one = found["by_steps"]
    assert [(entry["steps"], entry["trained"]) for entry in (two, one)] == [(2, True), (1, False)]
    assert all(found[name] == two[name] for name in two)
    assert found["n"] == one["n"] == 8 and (found["seed"], found["seeds"]) == (4, [4, 5])
    assert two["adherence"]["obeys"] > 0.8 and one["adherence"]["obeys"] < 0.3
    per_seed = [entry["obeys"] for entry in two["per_seed"]]
    assert [entry["seed"] for entry in two["per_seed"]] == [4, 5] and all(e["n"] == 4 for e in two["per_seed"])
    assert two["over_seeds"]["obeys"]["mean"] == pytest.approx(sum(per_seed) / 2) == two["adherence"]["obeys"]
    assert two["over_seeds"]["obeys"]["error"] == pytest.approx(abs(per_seed[0] - per_seed[1]) / 2)
    assert two["by_segment"][0]["n"] == 4 and {"drift", "obeys_at_end"} <= set(two["over_seeds"])
    shown = capsys.readouterr()
    assert "1 step (not trained for)" in shown.out and "trained for (2, 4) steps, not 1" in shown.err


def test_transitions_are_compared_on_the_same_switches(
    in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, list[Any]] = {}

    def late_without_recache(pipe: Any, prompts: Sequence[str], *rest: Any, **keywords: Any) -> None:
        switches = keywords["switches"]
        if switches:
            asked.setdefault(keywords["transition"], []).append((list(prompts), rest[0], switches))
            late = 2 * (keywords["transition"] == "cut")
            keywords["switches"] = {block + late: texts for block, texts in switches.items()}
        rendered(pipe, prompts, *rest, **keywords)

    monkeypatch.setattr(measure, "generate", late_without_recache)
    assert run(model, "--n", "2", "--switches", "4", "--transitions", "recache,cut", "--json", "e.json") == 0
    assert asked["recache"] == asked["cut"]
    recache, cut = report()["switches"]
    assert (recache["transition"], cut["transition"]) == ("recache", "cut") and report()["switch"] == recache
    assert cut["median_latency_all_s"] - recache["median_latency_all_s"] == pytest.approx(1.5, abs=0.5)
    assert recache["within_1s"] > cut["within_1s"]
    assert "never" not in capsys.readouterr().out


def test_pictures(in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "generate", rendered)
    monkeypatch.setattr(measure, "FIXED_CAPTIONS", 3)
    arguments = ("--n", "2", "--switches", "2", "--transitions", "recache,scene", "--seconds", "10", "--long-n", "2")
    assert run(model, *arguments, "--steps", "2,4", "--pictures", "p") == 0
    assert sorted(path.name for path in Path("p").iterdir()) == sorted(options.PICTURES)
    sizes = {}
    for name in options.PICTURES:
        with Image.open(Path("p") / name) as picture:
            sizes[name] = picture.size
    assert sizes["captions.png"] == (3 * (8 * 66 + 2), 3 * (64 + 13 + 4))  # rendered, 2 steps, 4 steps
    assert sizes["switches.png"] == (2 * (12 * 66 + 2), 2 * (64 + 13 + 4))
    assert min(sizes["drift.png"]) > 300
    assert run(model, *arguments, "--pictures", "p") == 2


def test_pictures_need_matplotlib(
    in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    assert run(model, "--pictures", "p") == 2
    assert one_line(capsys).endswith(
        "--pictures needs matplotlib, which is not installed: pip install 'streamgen[eval]'"
    )


def test_a_part_of_the_world(in_tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "generate", rendered)
    only = ("--only", "shape=circle", "--only", "motion=moving left,rising")
    assert run(model, "--n", "5", "--switches", "2", *only, "--json", "e.json") == 0
    assert list(report()["by_word"]["shape"]) == ["circle"]
    assert set(report()["by_word"]["motion"]) <= {"moving left", "rising"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "shade=red"), "--only 'shade=red': must be ATTRIBUTE=VALUE,...; attributes are count, size"),
        (("--only", "color=pink"), "--only: color 'pink' is not in the world; allowed: red, green"),
        (("--only", "count=a", "--only", "count=two"), "--only count is given twice"),
        (("--seeds", "1,x"), "--seeds '1,x': must be whole numbers with commas between them"),
        (("--seeds", "1,1"), "--seeds '1,1': each one once"),
        (("--seeds", "-1"), "--seed is -1"),
        (("--steps", "4,0"), "--steps is 0; it must be 1 to 1000"),
        (("--transitions", "recache,blend"), "--transitions: 'blend' does not exist; there are: recache, cut, scene"),
        (("--pictures", "no/p"), "the folder no does not exist"),
        (("--cache", "far"), "--cache 'far' does not exist; there are: relative, window, ema_sink"),
        (("--cache-dtype", "int4"), "--cache-dtype 'int4' does not exist; there are: int8, fp8"),
        (("--cache", "ema_sink", "--cache-dtype", "int8"), "the averages of ema_sink need the model's own dtype"),
        (("--weights-dtype", "int4"), "--weights-dtype 'int4' does not exist; there are: int8, fp8"),
    ],
)
def test_mistakes(
    in_tmp_path: Path, model: str, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, *arguments) == 2
    assert message in one_line(capsys)


def test_json_has_no_nan() -> None:
    assert plain({"a": [float("nan"), 1.0], "b": (float("inf"), 2)}) == {"a": [None, 1.0], "b": [None, 2]}
    assert options.SEGMENT_S == adherence.SEGMENT_S
