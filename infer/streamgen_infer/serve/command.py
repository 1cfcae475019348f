"""`streamgen serve`: the frame server as a process: its socket, its log, its signals."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import signal
import socket
import sys
import tempfile
import threading
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from streamgen.errors import UserError
from streamgen_infer.errors import Failure
from streamgen_infer.interrupts import INTERRUPTED
from streamgen_infer.serve.options import REPLICAS, Options, check

WS_MAX_BYTES = 256 * 1024
BACKLOG = 128


def run(options: Options) -> int:
    """The command; returns the exit code: 0 after SIGTERM, 130 after Ctrl-C."""
    tokens = check(options)
    try:
        import uvicorn

        from streamgen_infer.serve.limits import ServeSettings
        from streamgen_infer.serve.routes import build_app
        from streamgen_infer.server import FrameServer
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}, which is not installed: pip install 'streamgen[serve]'") from None
    from streamgen import resources

    resources.model_path(options.model)  # a wrong name is said now, not after the socket is open
    _log_to_stderr(options.log_json)
    listening = _listen(options.host, options.port)
    with tempfile.TemporaryDirectory(prefix="streamgen-") as work_dir:
        settings = ServeSettings(
            host=options.host,
            tokens=tokens,
            origins=options.origins,
            web=resources.web_dir(),
            save_dir=options.save_dir,
            work_dir=Path(work_dir),
            model=options.model,
            waiting=options.max_waiting,
            idle_s=options.idle_s,
            session_s=options.session_s,
            resume_s=options.resume_s,
            save_every_s=options.save_every_s,
        )
        server = FrameServer(lambda: _engine(options), settings)
        config = uvicorn.Config(
            build_app(server),
            ws="websockets-sansio",
            ws_max_size=WS_MAX_BYTES,
            ws_ping_interval=20,
            ws_per_message_deflate=False,  # pictures are packed already, and a packed message may be a bomb
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        port = listening.getsockname()[1]
        name = f"[{options.host}]" if ":" in options.host else options.host
        print(f"streamgen: serving {options.model} on http://{name}:{port}", flush=True)
        if options.engine == "ray":
            signal.signal(signal.SIGHUP, lambda number, frame: _renew(server))
        return asyncio.run(_serve(uvicorn.Server(config), server, listening))


async def _serve(web: Any, server: Any, listening: socket.socket) -> int:
    """Until a signal: the first drains, the second ends at once."""
    loop, seen = asyncio.get_running_loop(), list[int]()

    async def drain() -> None:
        await server.drain()
        web.should_exit = True

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            web.force_exit = True
            web.should_exit = True
        else:
            loop.call_soon_threadsafe(lambda: setattr(web, "draining", loop.create_task(drain())))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    web.capture_signals = nullcontext  # its own handlers close the sockets before a client is told anything
    await web.serve(sockets=[listening])
    if server.failure is not None:
        raise Failure(server.failure)
    return INTERRUPTED if signal.SIGINT in seen else 0


def _renew(server: Any) -> None:
    """Fresh replicas, one after the other; viewers notice nothing."""
    if server.ready is None:
        threading.Thread(target=server.engine.renew, name="streamgen-renew", daemon=True).start()


def _engine(options: Options) -> Any:
    """What makes the frames; on a worker thread, while /healthz answers already."""
    if options.engine == "ray":
        from streamgen_infer.serve.ray_engine import ray_engine, share_of_memory

        replicas = options.replicas or REPLICAS
        make_runtime = functools.partial(build_runtime, options, share_of_memory(replicas))
        gpus = int(options.device == "cuda")
        return ray_engine(make_runtime, replicas, cpus=options.threads or 1, gpus=gpus)
    return build_runtime(options)


def build_runtime(options: Options, memory_bytes: int | None = None) -> Any:
    """The model and its runtime, in this process. memory_bytes: for streams; half of what is free by default."""
    from streamgen.pipeline import StreamPipeline
    from streamgen_infer.free_memory import keep_loaded
    from streamgen_infer.runtime import Runtime

    pipe = StreamPipeline.from_pretrained(
        options.model,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        weights_dtype=options.weights_dtype,
    )
    keep_loaded()
    return Runtime(pipe, max_streams=options.max_streams, admission=options.admission, memory_bytes=memory_bytes)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port"
        ) from error


class _Lines(logging.Formatter):
    """time level message key=value; or one JSON object per line."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        for name in ("session", "block"):
            if hasattr(record, name):
                values[name] = getattr(record, name)
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self.as_json:
            return json.dumps(values | ({"trace": trace} if trace else {}))
        pairs = [f"{name}={values[name]}" for name in ("session", "block") if name in values]
        line = " ".join([values["time"], values["level"], values["message"], *pairs])
        return f"{line}\n{trace}" if trace else line


def _log_to_stderr(as_json: bool) -> None:
    logging.captureWarnings(True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(as_json))
    for name, level in (("streamgen", logging.INFO), ("uvicorn", logging.WARNING), ("py.warnings", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
