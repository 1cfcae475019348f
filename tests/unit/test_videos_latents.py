"""Latents on disk: equal to fresh ones, whole after any interruption, of one codec; the command that makes them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamgen.codec import SpritesCodec, load_codec
from streamgen.errors import UserError
from streamgen.weights import fingerprint
from streamgen_infer.cli import main
from streamgen_train.checkpoint import run_lock
from streamgen_train.config import from_dict
from streamgen_train.videos import cache
from streamgen_train.videos.cache import STORED, Summary, cache_latents
from streamgen_train.videos.config import CacheConfig, LatentConfig, SourceConfig
from streamgen_train.videos.latents import LatentSource, read_latent, read_rows, shard_file
from streamgen_train.videos.source import VideoSource, open_source
from tests.command_line import one_line
from tests.tiny_sprites import save_codec
from tests.tiny_videos import damage, pack, save_folder

LENGTHS = {name: 8 + 3 * i for i, name in enumerate("abcdefg")}


@pytest.fixture(scope="module")
def codec_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_codec(tmp_path_factory.mktemp("codecs") / "one")


@pytest.fixture(scope="module")
def codec(codec_dir: Path) -> SpritesCodec:
    return load_codec(codec_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("videos")
    save_folder(made / "wide", LENGTHS)
    save_folder(made / "tall", {"x": 8, "y": 9}, size=(32, 16))
    return made


def config(path: Path, **changes: Any) -> CacheConfig:
    videos: dict[str, Any] = {"path": str(path), "buckets": [[16, 32, 8], [32, 16, 4]]}
    videos |= {name: changes.pop(name) for name in list(changes) if name in ("buckets", "fps", "max_broken_share")}
    return from_dict(CacheConfig, {"videos": videos, "codec": "given", "shard_clips": 3} | changes)


def source(path: Path, seed: int = 0, microbatches: int = 1) -> LatentSource:
    return LatentSource(LatentConfig(path=str(path)), seed, microbatches)


def files(path: Path) -> dict[str, bytes]:
    """What a folder of latents holds, but the lock."""
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != ".lock"}


class Interrupted(Exception):
    pass


class Failing:
    """A codec that ends its process, or its call, instead of encoding the window of this number."""

    def __init__(self, codec: SpritesCodec, at: int, end: Callable[[], None]) -> None:
        self.codec, self.left, self.end = codec, at, end

    def encode(self, video: Tensor) -> Tensor:
        if self.left == 0:
            self.end()
        self.left -= 1
        return self.codec.encode(video)


def interrupt() -> None:
    raise Interrupted


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_a_child(call: Callable[[], object]) -> None:
    """Run `call` in a fork of this process, which it must kill."""
    child = os.fork()
    if child == 0:
        try:
            call()
        finally:
            os._exit(7)  # not killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


# What is kept.


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_cached_latents_equal_fresh_ones(folder: Path, codec: SpritesCodec, tmp_path: Path, dtype: str) -> None:
    asked = config(folder, dtype=dtype)
    assert cache_latents(asked, codec, "print", tmp_path / "to") == Summary(9, 3, 3, 0)
    clips = VideoSource(asked.videos, 0, 1)
    fresh = {}
    for clip in clips.clips:
        latents = codec.encode(clips.read(clip, 0)[None])[0]
        fresh[clip.name] = (latents.to(STORED[dtype]).float(), clip.caption)
    cached, seen = source(tmp_path / "to"), []
    for step in range(9):
        latents, captions = cached.batch(step, 0, 2)
        rows = cached.planned(step, 0, 2)
        assert latents.dtype == torch.float32 and len(latents) == 2
        for one, caption, row in zip(latents, captions, rows, strict=True):
            assert torch.equal(one, fresh[row.file][0]) and caption == row.caption == fresh[row.file][1]
            assert (row.first_frame, tuple(one.shape)) == (0, (1, 4, 4, 2) if row.bucket else (2, 4, 2, 4))
            seen.append(row.file)
    assert sorted(seen) == sorted(2 * list(fresh))  # nine steps of two are two epochs
    assert cached.describe() == "9 latents (7 of 16x32x8, 2 of 32x16x4)"
    shard = tmp_path / "to" / "shard_00000.safetensors"
    assert read_latent(shard, read_rows(shard)[0][0].key).dtype == STORED[dtype]


@pytest.mark.parametrize(("windows", "starts"), [(1, [0]), (2, [0, 8]), (0, [0, 8, 16])])
def test_windows_follow_one_another(codec: SpritesCodec, tmp_path: Path, windows: int, starts: list[int]) -> None:
    clips = save_folder(tmp_path / "videos", {"long": 26, "short": 8})
    made = cache_latents(config(clips, windows=windows), codec, "print", tmp_path / "to")
    shards = [shard_file(tmp_path / "to", number) for number in range(made.shards)]
    found = [(shard, row) for shard in shards for row in read_rows(shard)[0]]
    assert [row.first_frame for _, row in found if row.file == "long.mp4"] == starts
    assert [row.first_frame for _, row in found if row.file == "short.mp4"] == [0]
    opened = VideoSource(config(clips).videos, 0, 1)
    shard, last = next(pick for pick in found if pick[1].file == "long.mp4" and pick[1].first_frame == starts[-1])
    fresh = codec.encode(opened.read(opened.clips[0], starts[-1])[None])[0]
    assert torch.equal(read_latent(shard, last.key), fresh.half())


def test_the_order_is_that_of_the_videos(folder: Path, codec: SpritesCodec, tmp_path: Path) -> None:
    asked = config(folder)
    cache_latents(asked, codec, "print", tmp_path / "to")
    videos, latents = VideoSource(asked.videos, 5, 2), source(tmp_path / "to", 5, 2)
    for step in range(12):
        for micro in range(2):
            planned = [clip.name for clip in videos.planned(step, micro, 2)]
            assert [row.file for row in latents.planned(step, micro, 2)] == planned
    opened = open_source(from_dict(SourceConfig, {"latents": {"path": str(tmp_path / "to")}, "seed": 5}))
    assert torch.equal(opened.batch(3, 0, 2)[0], source(tmp_path / "to", 5).batch(3, 0, 2)[0])


def test_a_shard_of_videos_gives_the_latents_of_its_folder(codec: SpritesCodec, tmp_path: Path) -> None:
    clips = save_folder(tmp_path / "videos", {"a": 8, "b": 9})
    tar = pack(clips, tmp_path / "s.tar")
    for number, path in enumerate((clips, tar)):
        cache_latents(config(path), codec, "print", tmp_path / str(number))
    (one, _), (other, _) = (source(tmp_path / str(number)).batch(0, 0, 2) for number in range(2))
    assert torch.equal(one, other)


def test_the_header(folder: Path, codec: SpritesCodec, tmp_path: Path) -> None:
    cache_latents(config(folder, fps=8.0, buckets=[[16, 32, 4]]), codec, "print", tmp_path / "to")
    header = json.loads((tmp_path / "to" / "latents.json").read_text())
    assert header["codec"] == "print" and header["source"] == str(folder) and header["dtype"] == "fp16"
    assert (header["fps"], header["buckets"], header["jobs"]) == (8.0, [[16, 32, 4]], 7)


# Interruptions.


@pytest.mark.parametrize("at", [0, 2, 3, 8])
def test_going_on_makes_what_one_start_makes(folder: Path, codec: SpritesCodec, tmp_path: Path, at: int) -> None:
    asked = config(folder)
    cache_latents(asked, codec, "print", tmp_path / "whole")
    with pytest.raises(Interrupted):
        cache_latents(asked, Failing(codec, at, interrupt), "print", tmp_path / "parts")
    done = [name for name in files(tmp_path / "parts") if name.startswith("shard")]
    assert len(done) == at // 3
    progress = []
    made = cache_latents(asked, codec, "print", tmp_path / "parts", lambda *numbers: progress.append(numbers))
    assert made == Summary(9, 3, 3 - at // 3, 0)
    assert progress[-1] == (9, 9) and len(progress) == at // 3 + 3 * made.made_now
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    untouched = Failing(codec, 0, interrupt)
    assert cache_latents(asked, untouched, "print", tmp_path / "parts") == Summary(9, 3, 0, 0)


def test_a_kill_leaves_no_half_shard(
    folder: Path, codec: SpritesCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, to = config(folder), tmp_path / "to"
    killed_in_a_child(lambda: cache_latents(asked, Failing(codec, 4, kill), "print", to))
    assert set(files(to)) == {"latents.json", "shard_00000.safetensors"}
    real = cache.save_file

    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        real(tensors, path, metadata)
        os.truncate(path, path.stat().st_size // 2)
        kill()

    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_file", half)
        killed_in_a_child(lambda: cache_latents(asked, codec, "print", to))
    left = set(files(to)) - {"latents.json", "shard_00000.safetensors"}
    assert len(left) == 1 and all(name.startswith(".") and name.endswith(".tmp") for name in left)
    with pytest.raises(UserError, match=r"is not complete: 2 of 3 shards are missing; run the same `streamgen latents"):
        source(to)
    cache_latents(asked, codec, "print", to)
    cache_latents(asked, codec, "print", tmp_path / "whole")
    assert files(to) == files(tmp_path / "whole")


# Refusals.


def test_codecs_and_settings_are_not_mixed(folder: Path, codec: SpritesCodec, tmp_path: Path) -> None:
    to = tmp_path / "to"
    with pytest.raises(Interrupted):
        cache_latents(config(folder), Failing(codec, 4, interrupt), "one", to)
    before = files(to)
    cases: list[tuple[CacheConfig, str, str]] = [
        (config(folder), "two", r"latents of another codec than what is asked for \(one, now two\)"),
        (config(folder, dtype="bf16"), "one", r"another dtype than .*\(fp16, now bf16\)"),
        (config(folder, fps=8.0), "one", "another fps"),
        (config(folder, buckets=[[16, 32, 4]]), "one", "another buckets"),
        (config(folder, windows=2), "one", "another windows"),
        (config(folder, shard_clips=4), "one", "another shard_clips"),
        (config(folder / "wide"), "one", "clips other than what is asked for"),
    ]
    for asked, name, message in cases:
        with pytest.raises(UserError, match=message):
            cache_latents(asked, codec, name, to)
    assert files(to) == before


def test_a_folder_of_something_else(folder: Path, codec: SpritesCodec, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"mine holds something else \(thesis\.txt\); name a new folder"):
        cache_latents(config(folder), codec, "print", tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file; name a folder"):
        cache_latents(config(folder), codec, "print", tmp_path / "mine" / "thesis.txt")
    with run_lock(tmp_path / "held"), pytest.raises(UserError, match="another process is writing to"):
        cache_latents(config(folder), codec, "print", tmp_path / "held")


def test_what_is_no_folder_of_latents(folder: Path, codec: SpritesCodec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no folder of latents: it has no latents\.json"):
        source(tmp_path)
    cache_latents(config(folder), codec, "print", tmp_path / "to")
    shard = tmp_path / "to" / "shard_00001.safetensors"
    os.truncate(shard, 40)
    for call in (
        lambda: source(tmp_path / "to"),
        lambda: cache_latents(config(folder), codec, "print", tmp_path / "to"),
    ):
        with pytest.raises(UserError, match=r"shard_00001\.safetensors is no whole shard of latents .*; remove it"):
            call()
    header = tmp_path / "to" / "latents.json"
    header.write_text(header.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(UserError, match="is of format 99, and this version reads 1"):
        source(tmp_path / "to")


def test_the_codec_of_a_training_is_compared(
    folder: Path, codec: SpritesCodec, codec_dir: Path, tmp_path: Path
) -> None:
    cache_latents(config(folder), codec, fingerprint(codec_dir), tmp_path / "to")
    shutil.copytree(codec_dir, tmp_path / "model" / "codec")
    source(tmp_path / "to").check_codec(codec_dir)
    source(tmp_path / "to").check_codec(tmp_path / "model")
    other = save_codec(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was made by another codec"):
        source(tmp_path / "to").check_codec(other)


def test_a_codec_that_does_not_take_the_size(folder: Path, codec: SpritesCodec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not take \(16, 32, 7\) .*multiples of 4 RGB frames"):
        cache_latents(config(folder, buckets=[[16, 32, 7]]), codec, "print", tmp_path / "to")


class Loud:
    def encode(self, video: Tensor) -> Tensor:
        return torch.full((1, 2, 4, 2, 4), 1e6)


def test_latents_too_large_for_their_number_format(folder: Path, tmp_path: Path) -> None:
    asked = config(folder / "wide")
    with pytest.raises(UserError, match=r"a\.mp4: its latents are not finite in fp16; bf16 holds larger numbers"):
        cache_latents(asked, Loud(), "print", tmp_path / "to")
    assert cache_latents(config(folder / "wide", dtype="bf16"), Loud(), "print", tmp_path / "bf16").latents == 7


# Broken clips.


def test_broken_clips_are_left_out(codec: SpritesCodec, tmp_path: Path) -> None:
    clips = save_folder(tmp_path / "videos", dict.fromkeys("abcdefg", 20))
    damage(clips / "b.mp4")
    damage(clips / "e.mp4")
    (clips / "g.txt").unlink()
    asked = config(clips, buckets=[[16, 32, 20]])
    assert cache_latents(asked, codec, "print", tmp_path / "whole") == Summary(4, 2, 2, 3)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "broken.jsonl").read_text().splitlines()]
    assert {row["file"] for row in rows} == {"b.mp4", "e.mp4", "g.mp4"}
    cached = source(tmp_path / "whole")
    assert sorted(row.file[0] for step in range(2) for row in cached.planned(step, 0, 2)) == ["a", "c", "d", "f"]
    with pytest.raises(Interrupted):
        cache_latents(asked, Failing(codec, 2, interrupt), "print", tmp_path / "parts")
    assert cache_latents(asked, codec, "print", tmp_path / "parts") == Summary(4, 2, 1, 3)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_too_many_broken_clips(codec: SpritesCodec, tmp_path: Path) -> None:
    """Judged after 20 clips, and again when it goes on."""
    clips = save_folder(tmp_path / "videos", {f"{i:02d}": 20 for i in range(21)})
    for name in ("01", "02"):
        damage(clips / f"{name}.mp4")
    asked = config(clips, buckets=[[16, 32, 20]])
    for _ in range(2):
        with pytest.raises(UserError, match=r"2 of 20 clips decoded so far are broken, 10 % of the source"):
            cache_latents(asked, codec, "print", tmp_path / "to")
    again = cache_latents(config(clips, buckets=[[16, 32, 20]], max_broken_share=0.2), codec, "print", tmp_path / "to")
    assert again == Summary(19, 7, 1, 2)


def test_nothing_can_be_decoded(codec: SpritesCodec, tmp_path: Path) -> None:
    clips = save_folder(tmp_path / "videos", {"a": 20})
    damage(clips / "a.mp4")
    with pytest.raises(UserError, match="no clip could be decoded"):
        cache_latents(config(clips, buckets=[[16, 32, 20]]), codec, "print", tmp_path / "to")
    with pytest.raises(UserError, match="holds no latents; every clip was broken"):
        source(tmp_path / "to")


# The command.


def command(folder: Path, to: Path, codec_dir: Path, *more: str) -> list[str]:
    return ["latents", str(folder), str(to), "--codec", str(codec_dir), *more]


def test_the_command(
    folder: Path, codec: SpritesCodec, codec_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--bucket", "16x32x8", "--bucket", "32x16x4", "--shard-clips", "3"]
    assert main(command(folder, tmp_path / "to", codec_dir, *sizes)) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'to'}: 9 latents in 3 shards, 3 made now\n" and said.err == ""
    cache_latents(config(folder), codec, fingerprint(codec_dir), tmp_path / "same")
    assert files(tmp_path / "to") == files(tmp_path / "same")
    assert main(command(folder, tmp_path / "to", codec_dir, *sizes)) == 0
    assert "3 shards, 0 made now" in capsys.readouterr().out
    one = ["--height", "16", "--width", "32", "--frames", "4", "--fps", "8", "--dtype", "bf16", "--windows", "0"]
    assert main(command(folder / "wide", tmp_path / "one", codec_dir, *one)) == 0
    assert source(tmp_path / "one").header.dtype == "bf16"
    other = save_codec(tmp_path / "other", seed=1)
    assert main(command(folder, tmp_path / "to", other, *sizes)) == 2
    assert "latents of another codec" in one_line(capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bucket", "16x32"], "--bucket '16x32' is not HEIGHTxWIDTHxFRAMES"),
        (["--height", "0"], "must be at least 1"),
        (["--dtype", "fp32"], "dtype='fp32' is not allowed"),
        (["--windows", "-1"], "windows is -1"),
        (["--shard-clips", "0"], "shard_clips is 0"),
        (["--fps", "0"], "fps is 0.0"),
        (["--device", "cuda:77"], "device 'cuda:77' is not available here"),
        (["--device", "toaster"], "device 'toaster' is not available here"),
        (["--codec", "nowhere"], "nowhere/config.json is missing"),
        ([], "none of its 9 clips can be used"),
        (["--bogus"], "No such option"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path, codec_dir: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, tmp_path / "to", codec_dir, "--max-broken-share", "1", *more)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_source_that_is_not_there(codec_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path / "nowhere", tmp_path / "to", codec_dir)) == 2
    assert "nowhere does not exist; give a folder of videos or a .tar" in one_line(capsys)
