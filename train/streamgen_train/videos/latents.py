"""Latents on disk: their form, and batches of them. cache.py writes them.

A folder of latents holds latents.json (of what, by which codec, in which form) and shard_NNNNN.safetensors: one tensor
[F, C, H, W] for each window of a clip, and in the metadata a row for each (file, first frame, caption, bucket) and the
clips that were left out.
Letters: B batch, F latent frames, C channels, H W latent grid.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamgen.errors import UserError
from streamgen.weights import build_config, fingerprint, read_json
from streamgen_train.videos.buckets import Bucket
from streamgen_train.videos.config import LatentConfig
from streamgen_train.videos.order import Order

HEADER_FILE = "latents.json"
MARK = "streamgen_latents"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What all shards of a folder have in common; a start that continues another must have the same."""

    format: int = FORMAT
    codec: str
    """Fingerprint of the codec's folder."""
    dtype: str
    fps: float
    buckets: list[list[int]]
    windows: int
    shard_clips: int
    clips: str = ""
    """Fingerprint of names, sizes and captions of the clips."""
    jobs: int = 0
    """Windows in all, broken ones included."""
    source: str = ""
    """Where the clips were; told, not compared."""

    @property
    def shards(self) -> int:
        return -(-self.jobs // self.shard_clips)


@dataclass(frozen=True, slots=True)
class Row:
    """One window of latents."""

    key: str
    """Name of its tensor."""
    file: str
    first_frame: int
    """At the fps of the header."""
    caption: str
    bucket: int


class LatentSource:
    """Cached latents, each window once per epoch, in the same kind of order as a VideoSource."""

    def __init__(self, config: LatentConfig, seed: int, microbatches: int) -> None:
        self.folder = Path(config.path)
        self.header = read_header(self.folder)
        names = [shard_file(self.folder, number) for number in range(self.header.shards)]
        missing = [path for path in names if not path.is_file()]
        if missing:
            raise UserError(
                f"{self.folder} is not complete: {len(missing)} of {len(names)} shards are missing; "
                f"run the same `streamgen latents ... {self.folder}` again, it goes on where it ended"
            )
        rows = [(path, row) for path in names for row in read_rows(path)[0]]
        if not rows:
            raise UserError(f"{self.folder} holds no latents; every clip was broken")
        filled = sorted({row.bucket for _, row in rows})
        self.buckets = [Bucket(*self.header.buckets[number]) for number in filled]
        """Sizes of the videos that the latents were made from."""
        self._rows = [[(path, row) for path, row in rows if row.bucket == number] for number in filled]
        self._order = Order(tuple(map(len, self._rows)), seed, microbatches)

    def describe(self) -> str:
        """One line: how many windows of which size."""
        rows = zip(self._rows, self.buckets, strict=True)
        return f"{sum(map(len, self._rows))} latents ({', '.join(f'{len(row)} of {bucket}' for row, bucket in rows)})"

    def check_codec(self, folder: str | Path) -> None:
        """UserError if the codec in `folder` is not the one that made these latents."""
        found = fingerprint(codec_folder(folder))
        if found != self.header.codec:
            raise UserError(
                f"{self.folder} was made by another codec ({self.header.codec[:12]}) than {folder} ({found[:12]}): "
                "name that codec, or cache the latents again"
            )

    def planned(self, step: int, microbatch: int, count: int) -> list[Row]:
        """The windows of a batch; reads nothing."""
        return [row for _, row in self._picks(step, microbatch, count)]

    def batch(self, step: int, microbatch: int, count: int) -> tuple[Tensor, list[str]]:
        """(latents [B, F, C, H, W] float32, captions [B]); all of one bucket."""
        picks = self._picks(step, microbatch, count)
        latents = torch.stack([read_latent(path, row.key) for path, row in picks])
        return latents.float(), [row.caption for _, row in picks]

    def _picks(self, step: int, microbatch: int, count: int) -> list[tuple[Path, Row]]:
        slots = self._order.slots(step, microbatch, count)
        return [self._rows[slot.bucket][self._order.item(slot.bucket, slot.position)] for slot in slots]


def codec_folder(folder: str | Path) -> Path:
    """The codec's own folder, given that or a model folder (as `load_codec` takes it)."""
    path = Path(folder)
    return path / "codec" if (path / "codec").is_dir() else path


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:05d}.safetensors"


def read_header(folder: Path) -> Header:
    path = folder / HEADER_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no folder of latents: it has no {HEADER_FILE}; make one with `streamgen latents`")
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise UserError(f"{path} is of format {values.get('format')!r}, and this version reads {FORMAT}")
    return build_config(Header, values, str(path))


def shard_metadata(rows: list[Row], broken: dict[str, str]) -> dict[str, str]:
    """What `read_rows` reads."""
    return {MARK: json.dumps({"rows": [asdict(row) for row in rows], "broken": broken})}


def read_rows(path: Path) -> tuple[list[Row], dict[str, str]]:
    """(windows in a shard, clips left out of it and why)."""
    try:
        with safe_open(path, "pt") as file:
            values: dict[str, Any] = json.loads((file.metadata() or {})[MARK])
            return [Row(**row) for row in values["rows"]], values["broken"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole shard of latents ({error}); remove it and cache it again") from error


def read_latent(path: Path, key: str) -> Tensor:
    """One window [F, C, H, W] in the stored number format."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and cache it again") from error
