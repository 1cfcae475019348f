"""Finding clips in folders and shards: captions, sizes, buckets, and what is wrong with the rest."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamgen.errors import UserError
from streamgen_train.config import from_dict
from streamgen_train.videos import index
from streamgen_train.videos.broken import Broken
from streamgen_train.videos.buckets import Bucket, choose_bucket
from streamgen_train.videos.config import SourceConfig, VideoConfig
from streamgen_train.videos.decode import Facts, Place
from streamgen_train.videos.index import Clip, build_index, find
from tests.tiny_videos import pack, save_folder, save_video

LENGTHS = {"b": 12, "a": 10, "c": 20}


def build(path: Path, broken: Broken | None = None, **changes: Any) -> list[Clip]:
    values: dict[str, Any] = {"path": str(path), "buckets": ((16, 32, 8),), "max_broken_share": 1.0}
    return build_index(VideoConfig(**(values | changes)), broken or Broken(1.0, 20, None))


def captions(path: Path) -> dict[str, str]:
    return {f.place.name: f.caption for f in find(path) if f.problem is None}


def problems(path: Path) -> dict[str, str]:
    return {f.place.name: f.problem for f in find(path) if f.problem is not None}


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


# Folders.


def test_a_folder_of_clips(tmp_path: Path) -> None:
    clips = build(save_folder(tmp_path / "videos", LENGTHS))
    assert [(c.name, c.caption, c.frames) for c in clips] == [
        ("a.mp4", "caption of a", 10),
        ("b.mp4", "caption of b", 12),
        ("c.mp4", "caption of c", 20),
    ]
    assert [c.frames for c in build(tmp_path / "videos", fps=8.0, buckets=((16, 32, 2),))] == [5, 6, 10]


def test_what_belongs_to_a_folder(tmp_path: Path) -> None:
    """Any depth, any suffix of a video; hidden files, links to folders and other files are passed over."""
    touch(tmp_path, "a.MP4", "deep/er/b.webm", "deep/c.mov", "note.md", ".hidden/d.mp4", "._a.mp4")
    (tmp_path / "deep" / "er" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nothing.mp4")
    assert [f.place.name for f in find(tmp_path)] == ["a.MP4", "deep/c.mov", "deep/er/b.webm", "gone.mp4"]


def test_captions_beside_clips(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}.mp4" for name in "abcdefg"))
    (tmp_path / "a.txt").write_bytes("\ufeff two\n  lines \u00e9\n".encode())
    (tmp_path / "b.json").write_text('{"caption": "from json", "id": 3}')
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "d.json").write_text('{"title": "no caption"}')
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "f.json").write_text("{")
    assert captions(tmp_path) == {"a.mp4": "two lines \u00e9", "b.mp4": "from json"}
    found = problems(tmp_path)
    assert found["c.mp4"] == "no caption: its .txt holds none" and found["d.mp4"] == "no caption: its .json holds none"
    assert found["e.mp4"].startswith("no caption: its .txt is not readable")
    assert found["f.mp4"].startswith("no caption: its .json is not readable")
    assert found["g.mp4"] == "no caption: no g.txt beside it"


def write_table(path: Path, rows: dict[str, str]) -> None:
    if path.suffix == ".jsonl":
        lines = [
            json.dumps({"file": file, "caption": caption}, ensure_ascii=False) + "\n\n"
            for file, caption in rows.items()
        ]
        path.write_text("".join(lines))
        return
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([("caption", "file", "more"), *((caption, name, 1) for name, caption in rows.items())])


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_one_table_of_captions(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "a.mp4", "deep/b.mp4", "c.mp4", "own/d.mp4")
    (tmp_path / "c.txt").write_text("not asked: the table counts alone")
    rows = {
        "a.mp4": 'a "quoted", one',
        "./deep/b.mp4": "two\u2028lines",
        "x.mp4": "x",
        "../y.mp4": "y",
        "own/d.mp4": "no",
    }
    write_table(tmp_path / name, rows)
    write_table(tmp_path / "own" / name, {"d.mp4": "its own table"})
    assert captions(tmp_path) == {
        "a.mp4": 'a "quoted", one',
        "deep/b.mp4": "two lines",
        "own/d.mp4": "its own table",
    }
    found = problems(tmp_path)
    assert found["c.mp4"] == "no caption: the table does not list it"
    assert found["x.mp4"] == f"{name} lists it, and there is no such video below {tmp_path}"
    assert set(found) == {"c.mp4", "x.mp4", "../y.mp4"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.csv", "name,caption\na.mp4,x\n", "line 2: needs `file` and `caption`"),
        ("captions.csv", "file,caption\na.mp4\n", "line 2: needs"),
        ("captions.csv", "file,caption\na.mp4,x\na.mp4,y\n", "line 3: lists a.mp4 a second time"),
        ("captions.csv", "file,caption\na.mp4," + "x" * 200_000, "after line 1: is no CSV"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": "x"}\n{"file"', "line 2: is no JSON"),
        ("captions.jsonl", "[1]\n", "line 1: needs"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": 3}\n', "line 1: needs"),
    ],
)
def test_a_wrong_table_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        find(tmp_path)


def test_two_tables(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "captions.csv", "captions.jsonl")
    with pytest.raises(UserError, match=r"both captions\.csv and captions\.jsonl; keep one"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nowhere", "does not exist; give a folder of videos or a .tar"),
        (lambda path: path, "no videos .* and no .tar with videos below it"),
        (lambda path: touch(path, "a.mp4") / "a.mp4", "neither a folder nor a .tar"),
        (lambda path: touch(path, "s.tar.gz"), r"s\.tar\.gz is compressed"),
    ],
)
def test_what_is_no_source(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(make(tmp_path))


# Shards.


@pytest.mark.parametrize("kind", [".txt", ".json"])
def test_a_shard_equals_its_folder(tmp_path: Path, kind: str) -> None:
    folder = save_folder(tmp_path / "videos", LENGTHS)
    shard = pack(folder, tmp_path / "shard.tar", kind)
    clips = build(folder)
    for source, prefix in ((shard, "shard.tar/"), (tmp_path, "")):
        found = [c for c in build(source) if "shard.tar/" in c.name]
        assert [c.name for c in found] == [f"shard.tar/{c.name}" for c in clips], prefix
        assert [(c.caption, c.facts, c.frames) for c in found] == [(c.caption, c.facts, c.frames) for c in clips]
    data = shard.read_bytes()
    for clip in build(shard):
        assert clip.place.offset is not None  # the bytes are where the index says
        there = data[clip.place.offset : clip.place.offset + clip.place.size_bytes]
        assert there == (folder / clip.name.removeprefix("shard.tar/")).read_bytes()


def test_members_of_a_shard(tmp_path: Path) -> None:
    """Names below folders, with dots, led by ./ as `tar .` writes them; hidden and other members are passed over."""
    members = {"./x/a.b.mp4": b"v", "./x/a.b.txt": b"one", "c.mp4": b"v", "._c.mp4": b"v", "c.jpg": b"v", "d.txt": b"d"}
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert captions(tmp_path) == {"s.tar/x/a.b.mp4": "one"}
    assert problems(tmp_path) == {"s.tar/c.mp4": "no caption: no c.txt or .json in the shard"}


def test_a_shard_that_was_cut_short(tmp_path: Path) -> None:
    shard = pack(save_folder(tmp_path / "videos", {"a": 10, "b": 10}), tmp_path / "s.tar")
    last = build(shard)[-1].place
    assert last.offset is not None
    os.truncate(shard, last.offset + last.size_bytes // 2)
    broken = Broken(1.0, 20, None)
    assert [c.name for c in build(shard, broken)] == ["s.tar/a.mp4"]
    assert "is no whole tar" in broken.reasons["s.tar"] and "no caption" in broken.reasons["s.tar/b.mp4"]
    (tmp_path / "t.tar").write_bytes(b"no tar" * 400)
    assert "is no whole tar" in problems(tmp_path / "t.tar")["t.tar"]


# Buckets.


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 832, 81), Bucket(480, 832, 81)),
        ((480, 832, 80), Bucket(480, 832, 17)),
        ((1080, 1920, 300), Bucket(480, 832, 81)),
        ((1920, 1080, 300), Bucket(832, 480, 81)),
        ((1000, 1000, 300), Bucket(512, 512, 81)),
        ((500, 1100, 300), Bucket(480, 832, 81)),
        ((480, 640, 90), Bucket(256, 256, 81)),  # nearer to 480x832, but too narrow
        ((200, 900, 90), "too small: 200x900 pixels, and the smallest bucket is 256x256x81"),
        ((480, 831, 80), "too short: 80 frames at the target fps, and the shortest bucket of its size is 256x256x81"),
        ((480, 900, 16), "too short: 16 frames at the target fps, and the shortest bucket of its size is 480x832x17"),
    ],
)
def test_the_bucket_nearest_in_aspect_that_is_filled(size: tuple[int, int, int], expected: Bucket | str) -> None:
    sizes = [(480, 832, 17), (480, 832, 81), (832, 480, 81), (256, 256, 81), (512, 512, 81)]
    buckets = [Bucket(*s) for s in sizes]
    chosen = choose_bucket(*size, buckets)
    assert (chosen if isinstance(chosen, str) else buckets[chosen]) == expected


# Broken ones.


def folder_with_broken(folder: Path) -> Path:
    save_folder(folder, {f"good{i}": 10 for i in range(4)})
    save_folder(folder, {"short": 5})
    save_video(folder / "mute.mp4", 10)
    save_video(folder / "small.mp4", 10, size=(8, 8))
    (folder / "small.txt").write_text("small")
    (folder / "text.mp4").write_text("this is no video")
    (folder / "text.txt").write_text("text")
    return folder


def test_broken_files_are_named_counted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, log = folder_with_broken(tmp_path / "videos"), tmp_path / "log"
    broken = Broken(0.5, 8, log)
    assert [c.name for c in build(folder, broken)] == [f"good{i}.mp4" for i in range(4)]
    assert {name: reason.split(":")[0] for name, reason in broken.reasons.items()} == {
        "mute.mp4": "no caption",
        "short.mp4": "too short",
        "small.mp4": "too small",
        "text.mp4": "cannot be decoded",
    }
    rows = [json.loads(line) for line in (log / "broken.jsonl").read_text().splitlines()]
    assert rows == [{"file": name, "reason": reason} for name, reason in broken.reasons.items()]
    assert "4 of 8 clips are broken and left out; mute.mp4: no caption" in capsys.readouterr().err
    build(folder, Broken(0.5, 8, log))
    assert len((log / "broken.jsonl").read_text().splitlines()) == 4  # each once


def test_too_many_broken_files(tmp_path: Path) -> None:
    folder = folder_with_broken(tmp_path / "videos")
    with pytest.raises(
        UserError, match=r"4 of 8 clips are broken, 50 % of the source, and max_broken_share=0\.49 .*49 %"
    ):
        build(folder, Broken(0.49, 8, None))
    build(folder, Broken(0.49, 9, None))  # too few to judge
    for path in folder.glob("good*.txt"):
        path.unlink()
    with pytest.raises(UserError, match=r"none of its 8 clips can be used; good0\.mp4: no caption"):
        build(folder, Broken(1.0, 8, None))


# The index file.


def test_an_index_file_saves_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened = save_folder(tmp_path / "videos", LENGTHS), []
    pack(folder, folder / "s.tar")
    real = index.probe

    def counted(place: Place) -> Facts:
        opened.append(place.name)
        return real(place)

    monkeypatch.setattr(index, "probe", counted)
    file = str(tmp_path / "index.jsonl")
    first = build(folder, index_file=file)
    assert len(opened) == 6
    opened.clear()
    assert build(folder, index_file=file, fps=16.0) == first and opened == []
    assert [c.frames for c in build(folder, index_file=file, fps=8.0, buckets=((16, 32, 2),))][:3] == [5, 6, 10]
    save_video(folder / "a.mp4", 14)
    (folder / "b.txt").write_text("a new caption")
    again = {c.name: c for c in build(folder, index_file=file)}
    assert opened == ["a.mp4"]
    assert (again["a.mp4"].frames, again["b.mp4"].caption) == (14, "a new caption")


@pytest.mark.parametrize("text", ["", "file,caption\n", '{"streamgen_videos": 1}\n{"name": "a"}\n'])
def test_an_index_file_that_is_something_else_is_not_written_over(tmp_path: Path, text: str) -> None:
    folder, file = save_folder(tmp_path / "videos", {"a": 10}), tmp_path / "index.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match="is no index of videos"):
        build(folder, index_file=str(file))
    assert file.read_text() == text


# Configs.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"buckets": []}, "buckets is empty"),
        ({"buckets": [[480, 832]]}, r"data\.videos\.buckets\[0\]=\[480, 832\] has 2 values, but must have 3"),
        ({"buckets": [[480, 0, 1]]}, "must be at least 1"),
        ({"buckets": [[8, 8, 1], [8, 8, 1]]}, "names a size twice"),
        ({"fps": 0}, "fps is 0.0; it must be 0.1 to 1000"),
        ({"max_broken_share": 1.5}, "it must be 0 to 1"),
        ({"broken_tries": 0}, "broken_tries is 0; it must be at least 1"),
        ({"workers": 0}, "workers is 0"),
        ({"bukets": []}, r"unknown key 'data\.videos\.bukets'; did you mean 'buckets'"),
    ],
)
def test_a_config_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(SourceConfig, {"videos": {"path": "x", "buckets": [[8, 8, 1]]} | values}, "data")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "a source is one of videos, latents and prompts; got none"),
        ({"latents": {"path": "x"}, "prompts": {"path": "y"}}, "got latents, prompts"),
        ({"prompts": {"path": "y"}, "seed": -1}, "seed of the source is -1"),
        ({"prompts": {"path": "y"}, "microbatches": 0}, "microbatches of the source is 0"),
    ],
)
def test_a_source_is_one_thing(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(SourceConfig, values)
