"""Folders of video files and tar shards -> clips, without unpacking.

A video file finds its caption in NAME.txt beside it or in the `caption` of NAME.json; in a folder with captions.csv or
captions.jsonl (columns or keys `file` and `caption`) that table counts alone, for the files of that folder and below.
Hidden files and links to folders are passed over.
A tar shard is laid out as webdataset does it: members of one name, .mp4 and .txt or .json.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from streamgen.errors import UserError
from streamgen.weights import replacing
from streamgen_train.videos.broken import Broken
from streamgen_train.videos.buckets import Bucket, choose_bucket
from streamgen_train.videos.config import VideoConfig
from streamgen_train.videos.decode import BrokenClip, Facts, Place, probe

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
PACKED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")
TABLES = ("captions.csv", "captions.jsonl")
MAX_CAPTION_BYTES = 2**20
INDEX_MARK = {"streamgen_videos": 1}


@dataclass(frozen=True, slots=True)
class Clip:
    place: Place
    caption: str
    facts: Facts
    frames: int
    """At the target fps."""
    bucket: int

    @property
    def name(self) -> str:
        return self.place.name


@dataclass(frozen=True, slots=True)
class Found:
    """A video and its caption, or what is wrong with them; not opened yet."""

    place: Place
    caption: str
    problem: str | None = None


def build_index(config: VideoConfig, broken: Broken) -> list[Clip]:
    """The usable clips of a source, by name; the others go to `broken`. UserError if there are too many, or no clip."""
    found = find(Path(config.path))
    buckets = [Bucket(*size) for size in config.buckets]
    known = _read_index_file(config.index_file)
    with ThreadPoolExecutor(config.workers) as pool:
        opened = list(pool.map(lambda f: f.problem or known.get(_key(f.place)) or _try_probe(f.place), found))
    clips, reasons = [], {}
    for f, facts in zip(found, opened, strict=True):
        if isinstance(facts, str):
            reasons[f.place.name] = facts
            continue
        frames = facts.frames_at(config.fps)
        bucket = choose_bucket(facts.height, facts.width, frames, buckets)
        if isinstance(bucket, str):
            reasons[f.place.name] = bucket
        else:
            clips.append(Clip(f.place, f.caption, facts, frames, bucket))
    if config.index_file is not None:
        looked = [(f.place, facts) for f, facts in zip(found, opened, strict=True) if isinstance(facts, Facts)]
        _write_index_file(Path(config.index_file), looked)
    broken.index(reasons, len(found))
    if not clips:
        name, reason = next(iter(reasons.items()))
        raise UserError(f"{config.path}: none of its {len(found)} clips can be used; {name}: {reason}")
    return clips


def _try_probe(place: Place) -> Facts | str:
    try:
        return probe(place)
    except BrokenClip as error:
        return str(error)


# Finding.


def find(root: Path) -> list[Found]:
    """Every video below `root` (or in the one tar `root`), sorted by name."""
    if not root.exists():
        raise UserError(f"{root} does not exist; give a folder of videos or a .tar")
    if root.is_file():
        if root.suffix != ".tar":
            raise UserError(f"{root} is neither a folder nor a .tar; give the folder that the video is in")
        found = list(_in_tar(root, root.name))
    else:
        found = list(_in_folder(root, "", None))
    if not found:
        raise UserError(f"{root}: no videos ({' '.join(SUFFIXES)}) and no .tar with videos below it")
    return sorted(found, key=lambda f: f.place.name)


Table = dict[str, str]


def _in_folder(folder: Path, prefix: str, above: tuple[Table, str] | None) -> Iterator[Found]:
    """Videos of a folder and below; `above` is the table of captions that holds here and the prefix it counts from."""
    entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)
    names = {e.name for e in entries}
    tables = [name for name in TABLES if name in names]
    if len(tables) > 1:
        raise UserError(f"{folder} has both {' and '.join(TABLES)}; keep one")
    table = (_read_table(folder / tables[0]), prefix) if tables else above
    for entry in entries:
        path, name = folder / entry.name, prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _in_folder(path, f"{name}/", table)
        elif entry.name.endswith(PACKED):
            raise UserError(f"{path} is compressed and cannot be read at an offset; turn it into a plain .tar")
        elif path.suffix == ".tar":
            yield from _in_tar(path, name)
        elif path.suffix.lower() in SUFFIXES:
            place = _place(name, path)
            if table is not None:
                text, problem = table[0].get(name.removeprefix(table[1]), ""), "no caption: the table does not list it"
            else:
                text, problem = _beside({s: folder / (path.stem + s) for s in (".txt", ".json")}, names)
            yield Found(place, text, None if text else problem)
    if tables and table is not None:
        for listed in table[0]:
            below = ".." not in PurePosixPath(listed).parts and not PurePosixPath(listed).is_absolute()
            if not (below and PurePosixPath(listed).suffix.lower() in SUFFIXES and (folder / listed).is_file()):
                problem = f"{tables[0]} lists it, and there is no such video below {folder}"
                yield Found(_place(prefix + listed, folder / listed), "", problem)


def _place(name: str, path: Path) -> Place:
    """A file of its own; one that is gone (a link to nothing) has no bytes and fails when it is opened."""
    status = path.stat() if path.exists() else None
    return Place(name, path, None, status.st_size if status else 0, status.st_mtime_ns if status else 0)


def _beside(paths: dict[str, Path], names: set[str]) -> tuple[str, str]:
    """Caption from the first of NAME.txt and NAME.json that is there, or why there is none."""
    for suffix, path in paths.items():
        if path.name in names:
            try:
                with open(path, "rb") as file:
                    return _caption(suffix, file.read(MAX_CAPTION_BYTES + 1))
            except OSError as error:
                return "", f"no caption: {path.name}: {error.strerror}"
    return "", f"no caption: no {paths['.txt'].name} beside it"


def _caption(suffix: str, data: bytes) -> tuple[str, str]:
    """(caption, "") from the bytes of a .txt or .json, or ("", what is wrong)."""
    if len(data) > MAX_CAPTION_BYTES:
        return "", f"no caption: its {suffix} is larger than {MAX_CAPTION_BYTES} bytes"
    try:
        text = data.decode("utf-8-sig")
        if suffix == ".json":
            values = json.loads(text)
            text = values.get("caption", "") if isinstance(values, dict) else ""
    except ValueError as error:
        return "", f"no caption: its {suffix} is not readable ({error})"
    words = text.split() if isinstance(text, str) else []
    return " ".join(words), f"no caption: its {suffix} holds none"


def _read_table(path: Path) -> Table:
    """captions.csv or captions.jsonl as {file: caption}."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable text: {error}") from error
    table: Table = {}
    for number, row in _rows(path, text):
        file, caption = row.get("file"), row.get("caption")
        if not isinstance(file, str) or not file or not isinstance(caption, str):
            raise UserError(f"{path}, line {number}: needs `file` and `caption`, as clip.mp4 and its text")
        name = PurePosixPath(file).as_posix()
        if name in table:
            raise UserError(f"{path}, line {number}: lists {name} a second time")
        table[name] = " ".join(caption.split())
    return table


def _rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in reader:
                yield reader.line_num, dict(row)
        except csv.Error as error:
            raise UserError(f"{path}, after line {reader.line_num}: is no CSV ({error})") from error
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at marks inside a caption
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: is no JSON ({error})") from error
        yield number, values if isinstance(values, dict) else {}


def _in_tar(path: Path, prefix: str) -> Iterator[Found]:
    """Videos of a shard, from its headers."""
    videos: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, tuple[str, str]] = {}
    problem, shard = None, _place(prefix, path)
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    stem, suffix = os.path.splitext(member.name)
                    if not member.isreg() or PurePosixPath(stem).name.startswith("."):
                        continue
                    if suffix.lower() in SUFFIXES:
                        videos[stem] = member
                    elif suffix in (".txt", ".json") and not (suffix == ".json" and captions.get(stem, ("",))[0]):
                        data = tar.extractfile(member)
                        assert data is not None  # a regular file
                        captions[stem] = _caption(suffix, data.read(MAX_CAPTION_BYTES + 1))
        except tarfile.TarError as error:
            problem = f"is no whole tar ({error}); clips after that place are lost"
    for stem, member in videos.items():
        name = f"{prefix}/{PurePosixPath(member.name).as_posix()}"
        place = Place(name, path, member.offset_data, member.size, shard.changed_ns)
        text, missing = captions.get(stem, ("", f"no caption: no {stem}.txt or .json in the shard"))
        yield Found(place, text, None if text else missing)
    if problem is not None:
        yield Found(shard, "", problem)


# What was found by opening clips, kept for the next start.

Key = tuple[str, int | None, int, int]
KEY_NAMES = ("name", "offset", "size_bytes", "changed_ns")


def _key(place: Place) -> Key:
    return place.name, place.offset, place.size_bytes, place.changed_ns


def _read_index_file(name: str | None) -> dict[Key, Facts]:
    path = Path(name) if name is not None else None
    if path is None or not path.exists():
        return {}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if rows[0] != INDEX_MARK:
            raise ValueError("its first line is another")
        return {tuple(row[name] for name in KEY_NAMES): Facts(**row["facts"]) for row in rows[1:]}
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{path} is no index of videos ({error}); remove it, or name another index_file") from error


def _write_index_file(path: Path, looked: list[tuple[Place, Facts]]) -> None:
    lines = [json.dumps(INDEX_MARK)]
    for place, facts in looked:
        lines.append(json.dumps({**dict(zip(KEY_NAMES, _key(place), strict=True)), "facts": asdict(facts)}))
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
