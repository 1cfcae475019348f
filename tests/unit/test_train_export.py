"""Runs become folders that the rest of the project loads: a codec, a model that streams, and what is refused."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamgen.codec import load_codec
from streamgen.errors import UserError
from streamgen.pipeline import StreamPipeline
from streamgen.worlds import sprites
from streamgen_distill import cd
from streamgen_distill.main import OBJECTIVES as DISTILL
from streamgen_train.checkpoint import load_modules
from streamgen_train.export import export
from streamgen_train.loop import train
from streamgen_train.main import OBJECTIVES as TRAIN
from streamgen_train.objective import Objective
from streamgen_train.objectives import ar
from streamgen_train.objectives import codec as codec_objective
from tests.tiny_sprites import CODEC, ar_values, save_codec, spread, train_config
from tests.toy_objective import build_toy, toy_config

OBJECTIVES = TRAIN | DISTILL
STAR = "a red star spinning over a snow background"


def run(name: str, objective: Objective, config: Any, folder: Path, **train_options: Any) -> Path:
    """Two steps, with the config kept as `streamgen train` keeps it."""
    spread(*objective.modules().values(), std=0.1)
    settings = {"objective": {"name": name, **asdict(config)}}
    train(objective, train_config(max_steps=2, **train_options), folder, resolved=settings)
    return folder


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def teacher(codec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ar.Config(**ar_values(codec))
    return run("ar", ar.build(config), config, tmp_path_factory.mktemp("runs") / "ar")


def codec_run(folder: Path, precision: str = "fp32", **changes: Any) -> Path:
    config = codec_objective.Config(codec=CODEC, clips=2, pca_clips=8, side=32, crop=16, **changes)
    return run("codec", codec_objective.build(config), config, folder, precision=precision)


def test_a_codec_run_becomes_a_codec(tmp_path: Path) -> None:
    folder = export(codec_run(tmp_path / "run"), tmp_path / "new" / "codec", OBJECTIVES)
    codec, averaged = load_codec(folder), load_modules(tmp_path / "run")["codec"]
    for name, tensor in codec.state_dict().items():
        if not name.startswith("latents_"):
            assert torch.equal(tensor, averaged[name].half().float()), name
    scenes = sprites.sample_scenes(sprites.captions("train")[::70], torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = codec.encode(sprites.render(scenes, 12, side=32))
    assert float(latents.mean((0, 1, 3, 4)).abs().max()) < 0.2  # normalised on other clips
    assert float(latents.square().mean()) == pytest.approx(1.0, abs=0.4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_decoder_run_keeps_the_latents_to_the_bit(codec: Path, tmp_path: Path, precision: str) -> None:
    source = codec_run(tmp_path / "run", precision, train_encoder=False, init_from=str(codec))
    before, after = load_codec(codec), load_codec(export(source, tmp_path / "out", OBJECTIVES))
    video = torch.rand(1, 8, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = before.encode(video)
        assert torch.equal(latents, after.encode(video))
        assert not torch.equal(before.decode(latents), after.decode(latents))


def test_an_autoregressive_run_becomes_a_model_that_streams(teacher: Path, codec: Path, tmp_path: Path) -> None:
    folder = export(teacher, tmp_path / "model", OBJECTIVES)
    pipe = StreamPipeline.from_pretrained(folder, dtype="fp32")
    card = pipe.scheduler
    assert (card.trained_steps, card.sampler, card.window_frames, card.sink_frames) == ((2,), "euler", 8, 2)
    averaged = load_modules(teacher)
    for name, module in (("transformer", pipe.transformer), ("text", pipe.text)):
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor.float(), averaged[name][key].half().float()), key
    for key, tensor in load_codec(codec).state_dict().items():
        assert torch.equal(pipe.codec.state_dict()[key], tensor), key

    stream = pipe.stream(STAR, seed=3, max_blocks=4)
    stream.prompt("two blue rings rising over a navy background", at_block=2)
    blocks = list(stream)
    assert [block.frames.shape for block in blocks] == [(8, 32, 32, 3)] * 4
    again = StreamPipeline.from_pretrained(folder, dtype="fp32").stream(STAR, seed=3, max_blocks=1)
    assert np.array_equal(next(again).frames, blocks[0].frames)
    stream.state_dict()  # it has a fingerprint


def test_a_distilled_run_says_its_steps(teacher: Path, codec: Path, tmp_path: Path) -> None:
    config = cd.Config(**ar_values(codec, teacher_from=str(teacher), grid_steps=4, sample_steps=4))
    folder = export(run("cd", cd.build(config), config, tmp_path / "run"), tmp_path / "model", OBJECTIVES)
    pipe = StreamPipeline.from_pretrained(folder, dtype="fp32")
    assert (pipe.scheduler.trained_steps, pipe.scheduler.sampler) == ((4, 2, 1), "renoise")
    assert len(next(pipe.stream(STAR)).timing.denoise_ms) == 4


def test_a_bf16_run_is_exported_from_its_fp32_average(codec: Path, tmp_path: Path) -> None:
    config = ar.Config(**ar_values(codec))
    source = run("ar", ar.build(config), config, tmp_path / "run", precision="bf16")
    pipe = StreamPipeline.from_pretrained(export(source, tmp_path / "model", OBJECTIVES), dtype="fp32")
    weight, average = pipe.transformer.head.head.weight, load_modules(source)["transformer"]["head.head.weight"]
    assert torch.equal(weight, average.half().float()) and not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("occupied", ["file", "folder"])
def test_what_is_there_is_never_overwritten(teacher: Path, tmp_path: Path, occupied: str) -> None:
    target = tmp_path / "out"
    if occupied == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    else:
        target.write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty; name a new folder"):
        export(teacher, target, OBJECTIVES)
    assert [p.read_text() for p in ([target] if occupied == "file" else target.iterdir())] == ["mine"]


def test_an_empty_folder_is_filled(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (export(teacher, tmp_path / "out", OBJECTIVES) / "model_index.json").is_file()


def test_what_is_no_run_is_refused(teacher: Path, codec: Path, tmp_path: Path) -> None:
    out, here = tmp_path / "out", tmp_path / "run"
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
        export(codec, out, OBJECTIVES)
    here.mkdir()
    (here / "config.yaml").write_text("train: {}\n")
    with pytest.raises(UserError, match="is not the config of a run"):
        export(here, out, OBJECTIVES)
    (here / "config.yaml").write_text("objective: {name: nothing}\n")
    with pytest.raises(UserError, match="names the objective 'nothing'; known: codec, "):
        export(here, out, OBJECTIVES)
    (here / "config.yaml").write_text((teacher / "config.yaml").read_text())
    with pytest.raises(UserError, match="no checkpoint in"):
        export(here, out, OBJECTIVES)
    assert not out.exists()


def test_a_checkpoint_of_another_model_names_the_tensors(teacher: Path, tmp_path: Path) -> None:
    train(build_toy(), toy_config(max_steps=1), tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text((teacher / "config.yaml").read_text())
    with pytest.raises(UserError, match="was made by another model: tensors"):
        export(tmp_path / "run", tmp_path / "out", OBJECTIVES)
    assert not (tmp_path / "out").exists()


def test_an_objective_that_makes_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="makes nothing that can be exported"):
        build_toy().export({}, tmp_path)
