"""Objectives on a person's own data: cached latents and prompts encoded beforehand instead of the world."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from streamgen.embedded_text import EmbeddedTextConfig
from streamgen.errors import UserError
from streamgen_train.loop import train
from streamgen_train.objectives import ar, bidirectional
from streamgen_train.videos.broken import Broken
from streamgen_train.videos.config import LatentConfig, PromptConfig, SourceConfig, VideoConfig
from streamgen_train.videos.latents import LatentSource
from tests.runs import turn
from tests.tiny_latents import save_latents, save_text
from tests.tiny_sprites import GEOMETRY, ar_values, build_ar, save_codec, spread, train_config
from tests.tiny_videos import damage, save_folder


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    latents = save_latents(folder / "latents", GEOMETRY, 9)
    text = save_text(folder / "text.safetensors", 8, 8)
    own = {
        "codec_from": None,
        "text": EmbeddedTextConfig(file=str(text), text_len=8, text_dim=8),
        "data": SourceConfig(latents=LatentConfig(path=str(latents))),
        "gap_share": 0.0,
        "text_drop": 0.0,
        "word_drop": 0.0,
    }
    return ar_values(folder, **(own | changes))


def prepared(folder: Path, **changes: Any) -> ar.ArObjective:
    torch.manual_seed(0)
    objective = ar.build(ar.Config(**values(folder, **changes)))
    spread(objective.model)
    objective.prepare(torch.device("cpu"), torch.float32)
    return objective


def test_a_batch_is_the_source_s_clips_under_their_captions(tmp_path: Path) -> None:
    objective = prepared(tmp_path, single_share=0.0)
    batch = objective.batch(turn(3))
    source = objective.source
    assert isinstance(source, LatentSource)
    latents, captions = source.batch(3, 0, 2)
    assert batch.kind == "story"
    assert torch.equal(batch.x0_BFCHW, latents[:, :8].float())  # four blocks of two frames
    assert torch.equal(batch.ids_BGL, objective.text.ids(captions)[:, None].expand(2, 4, 1))
    assert batch.scored_BG.all()


def test_single_blocks_are_the_first_ones(tmp_path: Path) -> None:
    objective = prepared(tmp_path, single_share=1.0)
    batch = objective.batch(turn(3))
    assert batch.kind == "single" and batch.x0_BFCHW.shape[1] == GEOMETRY.block_frames and batch.ids_BGL.shape[1] == 1


@pytest.mark.parametrize("single_share", [0.0, 1.0])
def test_objectives_learn_from_it(tmp_path: Path, single_share: float) -> None:
    objective = prepared(tmp_path, single_share=single_share)
    loss, _ = objective.loss(objective.batch(turn()), turn(), None)
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in objective.model.blocks.parameters())
    assert objective.validate(0, objective.modules()) == {} == objective.sample(0, objective.modules())


def test_dropped_prompts_are_the_empty_one(tmp_path: Path) -> None:
    objective = prepared(tmp_path, single_share=0.0)
    objective.config.text_drop = 1.0
    assert (objective.batch(turn()).ids_BGL == -1).all()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="codec_from is null"):
        ar.Config(**ar_values(tmp_path, codec_from=None))
    objective = prepared(tmp_path, clip_blocks=5, single_share=0.0)
    with pytest.raises(UserError, match="with at least so many frames"):
        objective.batch(turn())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a video of number 1\n")
    config = ar.Config(**values(tmp_path / "b", data=SourceConfig(prompts=PromptConfig(path=str(prompts)))))
    objective = ar.build(config)
    objective.prepare(torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="prompts alone"):
        objective.batch(turn())
    with pytest.raises(UserError, match="latents or embeddings instead"):
        objective.export(objective.modules(), tmp_path / "model")


def test_broken_clips_are_named_in_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that cannot be opened and those that cannot be decoded, each once, also when the run is continued."""
    clips = save_folder(tmp_path / "clips", dict.fromkeys("abcdef", 32), size=(32, 32))
    for name in "abcdef":
        (clips / f"{name}.txt").write_text("a red star over snow")
    damage(clips / "b.mp4")
    (clips / "e.mp4").write_bytes(b"no video")
    videos = VideoConfig(path=str(clips), buckets=((32, 32, 32),), max_broken_share=0.9)
    codec = save_codec(tmp_path / "codec")

    def run(steps: int) -> None:
        objective = build_ar(codec, data=SourceConfig(videos=videos), gap_share=0.0, single_share=0.0)
        train(objective, train_config(max_steps=steps), tmp_path / "run")

    run(3)
    rows = [json.loads(line) for line in (tmp_path / "run" / "broken.jsonl").read_text().splitlines()]
    assert sorted(row["file"] for row in rows) == ["b.mp4", "e.mp4"]
    assert {row["file"]: row["reason"] for row in rows}["b.mp4"].startswith("cannot be decoded")
    assert "skipping b.mp4: cannot be decoded" in capsys.readouterr().err
    run(6)
    assert len((tmp_path / "run" / "broken.jsonl").read_text().splitlines()) == 2


def test_processes_of_a_run_name_a_clip_once(tmp_path: Path) -> None:
    sources = [Broken(1.0, 20, tmp_path / "run") for _ in range(4)]
    found = {f"{name}.mp4": "no video" for name in range(50)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda source: source.index(found, 50), sources))
    rows = [json.loads(line)["file"] for line in (tmp_path / "run" / "broken.jsonl").read_text().splitlines()]
    assert sorted(rows) == sorted(found)


def test_whole_clips_too(tmp_path: Path) -> None:
    objective = bidirectional.build(bidirectional.Config(**values(tmp_path, single_share=0.0)))
    objective.prepare(torch.device("cpu"), torch.float32)
    assert torch.isfinite(objective.loss(objective.batch(turn()), turn(), None)[0])
