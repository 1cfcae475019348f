"""`streamgen record` and `replay`: a file of ours plays back to the bit, a foreign one within the tolerance, and what
is wrong with a file is said in one line.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamgen_infer.cli import main
from tests.command_line import one_line
from tests.slow_reference import Rules, SlowReference, random_weights
from tests.tiny_model import save_tiny_model

RULES = Rules(layers=2, width=4, window=9)
BLOCKS = 5
REPLAY = ("replay", "--weights", "w.safetensors", "--recording", "r.safetensors")


def contract_config(rules: Rules) -> dict[str, Any]:
    sizes = ("dim", "heads", "layers", "ffn", "text_dim", "text_len", "freq_dim", "channels", "height", "width")
    values = {name: getattr(rules, name) for name in (*sizes, "frames", "window", "sink", "shift")}
    return {**values, "rope": "relative" if rules.relative else "absolute"}


def foreign_tensors(rules: Rules, batch: int = 2) -> dict[str, Tensor]:
    """What another implementation would record: the slow reference's rollout."""
    torch.manual_seed(3)
    noise = torch.randn(BLOCKS, rules.steps, batch, rules.frames, rules.channels, rules.height, rules.width)
    text = torch.cat([torch.randn(1, 4, rules.text_dim), torch.zeros(1, 2, rules.text_dim)], 1)
    slow = SlowReference(random_weights(rules), rules, batch=batch)
    made = [slow.block(one, text) for one in noise]
    sigmas = torch.tensor(rules.sigmas())
    return {
        "noise": noise,
        "text": text,
        "timesteps": torch.tensor([rules.clock(1000 * sigma) for sigma in rules.sigmas()]),
        "sigmas": sigmas,
        "latents": torch.stack([latents for latents, _ in made]),
        "flows": torch.stack([flows for _, flows in made]),
    }


@pytest.fixture(scope="module")
def foreign() -> dict[str, Tensor]:
    return foreign_tensors(RULES)


def write(tensors: dict[str, Tensor], config: dict[str, Any] | None = None, rules: Rules = RULES) -> None:
    save_file(tensors, "r.safetensors", {"config": json.dumps(config or contract_config(rules))})
    save_file(random_weights(rules), "w.safetensors")


@pytest.mark.parametrize("relative", [False, True])
def test_a_foreign_recording(relative: bool, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = replace(RULES, relative=relative)
    write(foreign_tensors(rules), rules=rules)
    assert main([*REPLAY, "--json", "j.json"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows[1:-1]] == [str(block) for block in range(BLOCKS)] and not err
    assert all(0 < float(row[1]) < 2e-5 and float(row[2]) < 1e-4 for row in rows[1:-1])
    values = json.loads(Path("j.json").read_text())
    assert values["ok"] and values["cache"] == ("relative" if relative else "window") and values["steps"] == 4
    assert values["largest"] == max(one["latents"] for one in values["blocks"])
    assert main([*REPLAY, "--atol", "1e-9"]) == 1
    assert "block 0 is the first of 5 beyond --atol 1e-09" in capsys.readouterr().out
    assert main([*REPLAY, "--dtype", "bf16"]) == 1
    assert main([*REPLAY, "--dtype", "bf16", "--atol", "0.5"]) == 0


def test_flows_are_optional_and_short_text_is_padded(
    foreign: dict[str, Tensor], in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {name: tensor for name, tensor in foreign.items() if name != "flows"}
    write({**kept, "text": foreign["text"][:, :4].contiguous()})
    assert main(REPLAY) == 0
    assert "flows" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["latents", "noise"])
def test_one_wrong_number_is_found_in_its_block(
    name: str, foreign: dict[str, Tensor], in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = foreign[name].clone()
    wrong[3].view(-1)[-1] += 1e-2
    write({**foreign, name: wrong})
    assert main([*REPLAY, "--json", "j.json"]) == 1
    assert "block 3 is the first of" in capsys.readouterr().out
    blocks = json.loads(Path("j.json").read_text())["blocks"]
    assert [one["latents"] > 2e-5 for one in blocks] == [False, False, False, True, name == "noise"]


def test_flows_tell_the_pass_and_are_not_judged(foreign: dict[str, Tensor], in_tmp_path: Path) -> None:
    flows = foreign["flows"].clone()
    flows[2, 1, 0, 0, 0, 0, 0] += 1e-2
    write({**foreign, "flows": flows})
    assert main([*REPLAY, "--json", "j.json"]) == 0
    passes = json.loads(Path("j.json").read_text())["blocks"][2]["flows"]
    assert [flow > 5e-3 for flow in passes] == [False, True, False, False, False]


def test_not_a_number_is_no_match(foreign: dict[str, Tensor], in_tmp_path: Path) -> None:
    latents = foreign["latents"].clone()
    latents[4, 0, 0, 0, 0, 0] = float("nan")
    write({**foreign, "latents": latents})
    assert main([*REPLAY, "--atol", "1e9", "--json", "j.json"]) == 1
    assert json.loads(Path("j.json").read_text())["largest"] is None


def test_rounded_timesteps_are_an_input(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recorder that rounds its clock is matched with its clock, and the user is told; with a true one it is not."""
    rules = replace(RULES, clock=round)
    tensors = foreign_tensors(rules)
    write(tensors)
    assert main(REPLAY) == 0
    assert "timesteps are up to 0.5 from 1000 sigma" in capsys.readouterr().err
    write({**tensors, "timesteps": 1000 * tensors["sigmas"]})
    assert main(REPLAY) == 1


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"latents": None}, {}, "is no recording: it holds no latents; it begins with"),
        ({"noise": torch.zeros(2, 3)}, {}, r"noise is [2, 3]: must be [blocks, steps, B, F, C, H, W]"),
        ({"text": torch.zeros(1, 6, 5)}, {}, "text is [1, 6, 5], the config and noise say [1, 6, 16]"),
        ({"sigmas": torch.ones(3)}, {}, "sigmas is [3], the config and noise say [4]"),
        ({"sigmas": torch.ones(4)}, {}, "sigmas=[1.0, 1.0, 1.0, 1.0]: must fall, within (0, 1]"),
        ({}, {"channels": 5}, "noise is [5, 4, 2, 3, 4, 4, 4], the config and noise say [5, 4, 2, 3, 5, 4, 4]"),
        ({}, {"rope": "learned"}, "rope='learned': must be one of absolute, relative"),
        ({}, {"window": 5}, "a block of 3 latent frames does not fit a window of 5 with a sink of 3"),
        ({}, {"heads": 3}, "dim=64: must be a multiple of 2 * num_heads = 6"),
        ({}, {"dim": None}, "missing dim"),
        ({}, {"layers": 3}, "w.safetensors: 27 of 96 tensors are missing: blocks.*.modulation"),
        ({}, {"ffn": 64}, "tensors have another shape: blocks.0.ffn.0.weight is [128, 64], its config says [64, 64]"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    changes: dict[str, Tensor | None],
    config: dict[str, Any],
    message: str,
    foreign: dict[str, Tensor],
    in_tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = {name: tensor for name, tensor in {**foreign, **changes}.items() if tensor is not None}
    values = {name: value for name, value in {**contract_config(RULES), **config}.items() if value is not None}
    write(tensors, values)
    assert main(REPLAY) == 2
    assert message in one_line(capsys)


def test_files_that_are_none(foreign: dict[str, Tensor], in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(foreign)
    assert main([*REPLAY[:3], "--recording", "absent.safetensors"]) == 2
    assert "absent.safetensors is missing" in one_line(capsys)
    assert main([*REPLAY[:1], "--weights", "absent.safetensors", *REPLAY[3:]]) == 2
    assert "absent.safetensors is missing" in one_line(capsys)
    save_file(foreign, "r.safetensors")
    assert main(REPLAY) == 2
    assert "metadata 'config' must be a JSON object with dim, heads, layers" in one_line(capsys)
    for option, value in (
        ("--dtype", "fp8"),
        ("--atol", "-1"),
        ("--atol", "nan"),
        ("--threads", "0"),
        ("--json", "no/j"),
    ):
        assert main([*REPLAY, option, value]) == 2
        assert option in one_line(capsys)


def test_unknown_keys_are_told(
    foreign: dict[str, Tensor], in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(foreign, {**contract_config(RULES), "written_by": "somebody"})
    assert main(REPLAY) == 0
    assert "config also says written_by; not known here" in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["relative", "window"])
def test_record_then_replay_to_the_bit(cache: str, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a model that differs from Wan: another prediction, sampler or patch is said in the config."""
    save_tiny_model(in_tmp_path / "m")
    record = ("record", "--model", "./m", "--out", "r.safetensors", "--weights", "w.safetensors", "--blocks", "6")
    assert main([*record, "--cache", cache, "--flows", "--seed", "5"]) == 0
    assert "check: streamgen replay --weights w.safetensors --recording r.safetensors" in capsys.readouterr().out
    assert main([*REPLAY, "--atol", "0"]) == 0
    with safe_open("r.safetensors", "pt") as file:
        assert set(json.loads(file.metadata()["config"])) == set(contract_config(RULES))
        assert file.get_slice("flows").get_shape() == [6, 3, 1, 3, 4, 4, 4]
    assert main([*record, "--cache", cache]) == 2
    assert "r.safetensors exists; choose another name or add --overwrite" in one_line(capsys)
    other = "relative" if cache == "window" else "window"
    assert main([*record, "--cache", other, "--overwrite"]) == 0
    with safe_open("r.safetensors", "pt") as file:
        assert "flows" not in file.keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"guidance": 3.0}, "no place for its guidance"),
        ({"positions": "ema_sink"}, r"its cache ema_sink (--cache window or relative records it with another)"),
        ({"context_noise": 0.1, "guidance": 2.0}, "its context_noise, guidance"),
        ({"sampler": "unipc"}, None),
    ],
)
def test_what_a_recording_cannot_say_is_refused(
    card: dict[str, Any], said: str | None, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_tiny_model(in_tmp_path / "m") / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **card}))
    record = ("record", "--model", "./m", "--out", "r.safetensors", "--weights", "w.safetensors", "--blocks", "5")
    if said is None:
        assert main([*record, "--steps", "4"]) == 0
        assert main([*REPLAY, "--atol", "0"]) == 0
        return
    assert main(record) == 2
    assert said in one_line(capsys)
    assert not Path("r.safetensors").exists()


def test_record_of_random_weights(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sizes.json").write_text(json.dumps({**contract_config(RULES), "prediction": "x0", "sampler": "euler"}))
    record = ("record", "--random", "sizes.json", "--out", "r.safetensors", "--weights", "w.safetensors")
    assert main([*record, "--blocks", "5", "--steps", "2"]) == 0
    assert main([*REPLAY, "--atol", "0"]) == 0
    tensors = load_file("r.safetensors")
    assert tensors["sigmas"].tolist() == pytest.approx([1, 5 / 6]) and tensors["timesteps"][0] == 1000
    assert tensors["latents"].std() > 0.3 and set(load_file("w.safetensors")) == set(random_weights(RULES))
    capsys.readouterr()
    Path("sizes.json").write_text("{")
    assert main([*record, "--overwrite"]) == 2
    assert "sizes.json must be a JSON object with dim, heads" in one_line(capsys)
