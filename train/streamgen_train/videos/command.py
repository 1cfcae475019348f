"""`streamgen latents SRC DST --codec DIR ...`: encode videos once, for training that reads latents."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from streamgen.codec import load_codec
from streamgen.errors import UserError
from streamgen.weights import fingerprint
from streamgen_train.config import from_dict
from streamgen_train.videos.cache import cache_latents
from streamgen_train.videos.config import CacheConfig, VideoConfig
from streamgen_train.videos.latents import codec_folder

VIDEO_KEYS = tuple(field.name for field in dataclasses.fields(VideoConfig))


def run(argv: list[str]) -> int:
    """`argv`: SRC, DST, and the options as a JSON object: keys of CacheConfig and of its `videos`, but `buckets` as
    HEIGHTxWIDTHxFRAMES. Returns the exit code.
    """
    source, target, options = argv
    values = json.loads(options)
    videos = {name: values.pop(name) for name in list(values) if name in VIDEO_KEYS}
    videos |= {"path": source, "buckets": [_bucket(text) for text in videos["buckets"]]}
    config, folder = from_dict(CacheConfig, {"videos": videos, **values}), Path(target)
    codec = load_codec(config.codec)
    try:
        codec.to(config.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {config.device!r} is not available here: {str(error).splitlines()[0]}") from error
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(folder.name, total=None)
        summary = cache_latents(
            config,
            codec,
            fingerprint(codec_folder(config.codec)),
            folder,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    left_out = f", {summary.broken} clips left out (broken.jsonl)" if summary.broken else ""
    print(f"{folder}: {summary.latents} latents in {summary.shards} shards, {summary.made_now} made now{left_out}")
    return 0


def _bucket(text: str) -> list[int]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isascii() and size.isdigit() for size in sizes):
        raise UserError(f"--bucket {text!r} is not HEIGHTxWIDTHxFRAMES, as 480x832x81")
    return [int(size) for size in sizes]
