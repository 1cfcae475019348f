"""The options of `streamgen serve`, and all that can be refused before the model is loaded. No torch, no web here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from streamgen.errors import UserError
from streamgen_infer.serve.limits import Tokens, check_bind, read_tokens
from streamgen_infer.stream_options import DTYPES, WEIGHTS_DTYPES, check_choices, check_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command's arguments, as typed."""

    host: str = "127.0.0.1"
    port: int = 8765
    token: str | None = None
    token_file: Path | None = None
    origins: tuple[str, ...] = ()
    max_streams: int = 8
    admission: bool = True
    engine: str = "local"
    replicas: int | None = None
    max_sessions: int = 10
    max_waiting: int = 32
    model: str = "sprites"
    device: str = "cpu"
    dtype: str = "auto"
    weights_dtype: str | None = None
    threads: int | None = None
    save_dir: Path | None = None
    save_every_s: float = 5.0
    idle_s: float = 60.0
    session_s: float = 21600.0
    resume_s: float = 30.0
    log_json: bool = False


ENGINES = ("local", "ray")
REPLICAS = 2
"""Of `--engine ray`, when nothing is said."""


def check(options: Options) -> Tokens:
    """UserError for everything that can be refused without the model."""
    for name, value, low, high in (
        ("--port", options.port, 0, 65535),
        ("--max-streams", options.max_streams, 1, 4096),
        ("--max-waiting", options.max_waiting, 0, 4096),
        ("--max-sessions", options.max_sessions, 1, 4096),
        ("--threads", options.threads, 1, 1024),
        ("--replicas", options.replicas, 1, 256),
        ("--save-every", options.save_every_s, 0.25, 3600),
        ("--idle", options.idle_s, 1, 1e6),
        ("--max-session", options.session_s, 1, 1e7),
        ("--resume-within", options.resume_s, 0, 1e6),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}; it must be {low} to {high}")
    check_choices(("--dtype", options.dtype, DTYPES), ("--weights-dtype", options.weights_dtype, WEIGHTS_DTYPES))
    check_device(options.device)
    _check_engine(options)
    for origin in options.origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path:
            raise UserError(f"--origin {origin!r}: must be a site's address without a path, as https://example.org")
    tokens = read_tokens(options.token, options.token_file, options.max_sessions)
    check_bind(options.host, tokens)
    if options.save_dir is not None and options.save_dir.exists() and not options.save_dir.is_dir():
        raise UserError(f"--save-dir {options.save_dir} is a file; give a folder")
    return tokens


def _check_engine(options: Options) -> None:
    if options.engine not in ENGINES:
        raise UserError(f"--engine {options.engine!r} does not exist; there are: {', '.join(ENGINES)}")
    if options.engine == "ray":
        from streamgen_infer.serve.ray_engine import check_ray

        check_ray()
        if ":" in options.device:
            raise UserError(f"--device {options.device}: with --engine ray say cuda; Ray gives each replica a GPU")
    elif options.replicas is not None:
        raise UserError(f"--replicas {options.replicas} has no effect with --engine {options.engine}: add --engine ray")
