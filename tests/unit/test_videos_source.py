"""Batches from people's own videos and prompts: what they hold, that nothing is remembered, what broken clips do."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from streamgen.errors import UserError
from streamgen_train.config import from_dict
from streamgen_train.videos.config import PromptConfig, SourceConfig, VideoConfig
from streamgen_train.videos.decode import BrokenClip
from streamgen_train.videos.prompts import PromptSource, read_prompts
from streamgen_train.videos.source import VideoSource, open_source
from tests.tiny_videos import damage, pack, save_folder, save_video, tags_and_frames

LENGTHS = {name: 8 + 3 * i for i, name in enumerate("abcdefgh")}
NAMES = {f"{name}.mp4" for name in LENGTHS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("videos") / "eight", LENGTHS)


def source(
    path: Path, *, seed: int = 0, microbatches: int = 1, log_dir: Path | None = None, **changes: Any
) -> VideoSource:
    values: dict[str, Any] = {"path": str(path), "buckets": ((16, 32, 8),)}
    return VideoSource(VideoConfig(**(values | changes)), seed, microbatches, log_dir)


def shown(video: torch.Tensor) -> list[tuple[int, int]]:
    """(clip, first frame) of each video of a batch, whose frames follow one another."""
    starts = []
    for one in video:
        read = tags_and_frames(one)
        tag, first = read[0]
        assert read == [(tag, first + i) for i in range(len(read))]
        starts.append((tag // 10, first))
    return starts


# What a batch holds.


def test_a_batch(folder: Path) -> None:
    made = source(folder)
    video, captions = made.batch(0, 0, 3)
    assert video.shape == (3, 8, 3, 16, 32) and video.dtype == torch.float32
    planned = made.planned(0, 0, 3)
    names = list(LENGTHS)
    assert [f"{names[clip]}.mp4" for clip, _ in shown(video)] == [clip.name for clip in planned]
    assert captions == [f"caption of {clip.place.file.stem}" for clip in planned]
    assert made.describe() == "8 clips (8 of 16x32x8), 0 broken"


def test_windows_begin_anywhere_in_the_clip(tmp_path: Path) -> None:
    made = source(save_folder(tmp_path, {"a": 12, "b": 8}))
    starts = Counter(start for step in range(60) for clip, start in shown(made.batch(step, 0, 1)[0]) if clip == 0)
    assert set(starts) == {0, 1, 2, 3, 4} and min(starts.values()) >= 2
    assert {start for step in range(20) for clip, start in shown(made.batch(step, 0, 1)[0]) if clip == 1} == {0}


def test_a_batch_is_a_function_of_its_arguments(folder: Path) -> None:
    """A source opened anew, asked in another order and with more workers gives the same."""
    one, other = source(folder, microbatches=2), source(folder, microbatches=2, workers=3)
    asked = [(step, micro) for step in range(6) for micro in range(2)]
    first = {key: one.batch(*key, 2) for key in asked}
    for key in reversed(asked):
        video, captions = other.batch(*key, 2)
        assert torch.equal(video, first[key][0]) and captions == first[key][1]
    assert [c.name for c in source(folder, seed=1).planned(0, 0, 8)] != [c.name for c in one.planned(0, 0, 8)]


def test_a_shard_gives_the_batches_of_its_folder(folder: Path, tmp_path: Path) -> None:
    shard = source(pack(folder, tmp_path / "shard.tar"))
    for step in range(4):
        (video, captions), (other, others) = source(folder).batch(step, 0, 3), shard.batch(step, 0, 3)
        assert torch.equal(video, other) and captions == others


def test_every_clip_once_per_epoch_and_none_for_two_microbatches(folder: Path) -> None:
    made = source(folder, microbatches=2)
    for epoch in range(3):
        lanes = [[c.name for step in range(4) for c in made.planned(4 * epoch + step, m, 1)] for m in range(2)]
        assert set(lanes[0]).isdisjoint(lanes[1])
        assert sorted(lanes[0] + lanes[1]) == sorted(NAMES)


def test_buckets(tmp_path: Path) -> None:
    """A batch holds one size; over an epoch each clip comes once, in its own size."""
    save_folder(tmp_path / "wide", dict.fromkeys("abcd", 10))
    save_folder(tmp_path / "tall", dict.fromkeys("ef", 10), size=(32, 16))
    made = source(tmp_path, buckets=((16, 32, 8), (32, 16, 4), (16, 16, 99)))
    shapes, names = Counter(), Counter[str]()
    for step in range(3):
        video, _ = made.batch(step, 0, 2)
        shapes[tuple(video.shape)] += 1
        names.update(clip.name for clip in made.planned(step, 0, 2))
    assert shapes == {(2, 8, 3, 16, 32): 2, (2, 4, 3, 32, 16): 1}
    assert sorted(names.values()) == [1] * 6
    assert made.describe() == "6 clips (4 of 16x32x8, 2 of 32x16x4), 0 broken"


# Broken clips.


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Eight clips of just the length of a window; three can be opened, but not decoded."""
    made = save_folder(tmp_path / "damaged", dict.fromkeys("abcdefgh", 20))
    for name in "bdg":
        damage(made / f"{name}.mp4")
    return made


def batches(path: Path, **how: Any) -> list[list[tuple[int, int]]]:
    made = source(path, buckets=((16, 32, 20),), max_broken_share=0.9, **how)
    return [shown(made.batch(step, 0, 2)[0]) for step in range(8)]


def test_another_clip_takes_the_place_of_a_broken_one(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = source(damaged, buckets=((16, 32, 20),), max_broken_share=0.9, microbatches=2, log_dir=tmp_path / "log")
    assert len(made.clips) == 8
    seen: list[set[int]] = [set(), set()]
    for step in range(2):  # one epoch
        for micro in range(2):
            planned = [ord(clip.name[0]) - ord("a") for clip in made.planned(step, micro, 2)]
            got = [clip for clip, _ in shown(made.batch(step, micro, 2)[0])]
            for wanted, clip in zip(planned, got, strict=True):
                assert clip == wanted or (wanted in (1, 3, 6) and clip not in (1, 3, 6))
            seen[micro] |= set(got)
    assert set(made.broken.reasons) == {"b.mp4", "d.mp4", "g.mp4"}
    rows = [json.loads(line) for line in (tmp_path / "log" / "broken.jsonl").read_text().splitlines()]
    assert {row["file"]: row["reason"] for row in rows} == made.broken.reasons
    assert all(reason.startswith("cannot be decoded") for reason in made.broken.reasons.values())
    assert capsys.readouterr().err.count("skipping") == 3


def test_stand_ins_do_not_depend_on_what_was_found_before(damaged: Path) -> None:
    whole = batches(damaged)
    assert batches(damaged, workers=2) == whole
    made = source(damaged, buckets=((16, 32, 20),), max_broken_share=0.9)
    assert [shown(made.batch(step, 0, 2)[0]) for step in (5, 6)] == whole[5:7]


def test_a_stand_in_is_no_clip_of_another_microbatch(tmp_path: Path) -> None:
    """While a slot of the microbatch has a whole clip left in the epoch."""
    made = save_folder(tmp_path / "many", {f"{i:02d}": 8 for i in range(24)})
    for number in (0, 5, 10, 15):
        damage(made / f"{number:02d}.mp4")
    opened = source(made, microbatches=2, max_broken_share=0.9)
    lanes = [{clip for step in range(6) for clip, _ in shown(opened.batch(step, micro, 2)[0])} for micro in range(2)]
    assert lanes[0].isdisjoint(lanes[1]) and len(lanes[0] | lanes[1]) == 20


def test_too_many_broken_clips_end_the_run(damaged: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"buckets": ((16, 32, 20),), "max_broken_share": 0.2, "log_dir": tmp_path / "log"}
    made = source(damaged, broken_tries=6, **how)
    with pytest.raises(UserError, match=r"of \d clips decoded so far are broken, .* max_broken_share=0\.2 allows 20 %"):
        for step in range(10):
            made.batch(step, 0, 2)
    assert (tmp_path / "log" / "broken.jsonl").is_file()
    patient = source(damaged, broken_tries=9, **how)  # there are only eight to try
    for step in range(10):
        patient.batch(step, 0, 2)


def test_what_was_broken_from_the_start_counts_too(damaged: Path) -> None:
    """Three of eight cannot be decoded, four more have no caption: 7 of 12 in all."""
    for name in ("v", "w", "x", "y"):
        save_video(damaged / f"{name}.mp4", 20)
    how: dict[str, Any] = {"buckets": ((16, 32, 20),), "broken_tries": 8}
    made = source(damaged, max_broken_share=7 / 12 + 1e-6, **how)
    for step in range(8):
        made.batch(step, 0, 2)
    assert len(made.broken.reasons) == 7
    strict = source(damaged, max_broken_share=7 / 12 - 1e-6, **how)
    with pytest.raises(UserError, match=r"3 of 8 clips decoded so far are broken, 58\.3 % of the source"):
        for step in range(8):
            strict.batch(step, 0, 2)


def test_no_clip_can_be_decoded(tmp_path: Path) -> None:
    made = save_folder(tmp_path / "all", {"a": 20, "b": 20})
    for name in "ab":
        damage(made / f"{name}.mp4")
    opened = source(made, buckets=((16, 32, 20),))
    with pytest.raises(UserError, match="no clip of 16x32x20 can be decoded"):
        opened.batch(0, 0, 1)


def test_a_file_that_goes_away_is_broken(tmp_path: Path) -> None:
    made = save_folder(tmp_path / "two", {"a": 8, "b": 8})
    opened = source(made)
    (made / "a.mp4").unlink()
    with pytest.raises(BrokenClip, match="No such file"):
        opened.read(opened.clips[0], 0)
    assert [clip for clip, _ in shown(opened.batch(0, 0, 2)[0])] == [1, 1]
    assert set(opened.broken.reasons) == {"a.mp4"}


# Prompts.


def test_prompts(tmp_path: Path) -> None:
    lines = [f"prompt {i}" for i in range(10)]
    (tmp_path / "p.txt").write_text("\n\n".join(lines) + "\r\n  \n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f" {line} "}) + "\n" for line in lines))
    assert read_prompts(tmp_path / "p.txt") == read_prompts(tmp_path / "p.jsonl") == lines
    made = PromptSource(PromptConfig(path=str(tmp_path / "p.txt")), 0, 2)
    other = PromptSource(PromptConfig(path=str(tmp_path / "p.jsonl")), 0, 2)
    epoch = [prompt for step in range(5) for micro in range(2) for prompt in made.batch(step, micro, 1)]
    assert sorted(epoch) == sorted(lines) and epoch != lines
    assert [p for step in range(5) for micro in range(2) for p in other.batch(step, micro, 1)] == epoch


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", b" \n\n", "p.txt is empty; it needs at least one prompt"),
        ("p.jsonl", b"", "p.jsonl is empty"),
        ("p.txt", None, "p.txt does not exist; give a text file"),
        ("p.txt", b"\xff\xff", "p.txt is not readable text"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt"\n', "line 3: is no JSON"),
        ("p.jsonl", b'{"prompt": ""}\n', "line 1: needs a text `prompt`"),
        ("p.jsonl", b'"a red star"\n', "line 1: needs a text `prompt`"),
    ],
)
def test_what_is_no_file_of_prompts(tmp_path: Path, name: str, text: bytes | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


# Opening.


def test_open_source(folder: Path, tmp_path: Path) -> None:
    values = {"videos": {"path": str(folder), "buckets": [[16, 32, 8]]}, "seed": 3, "microbatches": 2}
    opened = open_source(from_dict(SourceConfig, values), tmp_path)
    assert isinstance(opened, VideoSource)
    same = source(folder, seed=3, microbatches=2)
    assert torch.equal(opened.batch(1, 1, 2)[0], same.batch(1, 1, 2)[0])
    with pytest.raises(UserError, match="microbatch 2 of a source with microbatches=2"):
        opened.batch(0, 2, 1)
    (tmp_path / "p.txt").write_text("one\n")
    prompts = open_source(from_dict(SourceConfig, {"prompts": {"path": str(tmp_path / "p.txt")}}))
    assert prompts.batch(0, 0, 2) == ["one", "one"]


def test_clips_are_opened_side_by_side(folder: Path) -> None:
    assert source(folder, workers=4).clips == source(folder).clips
