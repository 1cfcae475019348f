"""`streamgen serve --engine ray`: replicas as Ray actors, on this machine or on a cluster's.

Actors and not Ray Serve: Serve routes requests, and a stream is not one; it stays where its state is until we move it.
RAY_ADDRESS names a cluster to join; without it Ray is started here and ended with the server.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from streamgen.errors import UserError
from streamgen_infer.machine import memory_mb
from streamgen_infer.serve.fleet import Fleet
from streamgen_infer.serve.moving_stream import Dead
from streamgen_infer.serve.replica import Replica

if TYPE_CHECKING:
    from streamgen_infer.runtime import Runtime

THREADS = 16
"""Commands that a replica carries out at once."""


def check_ray() -> None:
    """UserError if Ray is not there; Ray is not loaded by it."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs ray, which is not installed: pip install 'streamgen[ray]'")


def share_of_memory(replicas: int) -> int | None:
    """Bytes for the streams of one of several replicas on this machine; None: it may have a machine of its own."""
    known = memory_mb()
    if known is None or "RAY_ADDRESS" in os.environ:
        return None
    return int(known[1] * 1e6 / 2 / replicas)


def ray_engine(
    make_runtime: Callable[[], Runtime],
    replicas: int,
    *,
    cpus: int = 1,
    gpus: int = 0,
    state_every_s: float | None = None,
) -> Fleet:
    """A `Fleet` of actors, each with the runtime that `make_runtime` builds in its process.

    cpus, gpus: of each replica; Ray sets CUDA_VISIBLE_DEVICES by it. UserError if the cluster has not that many.
    """
    check_ray()
    # Ray would write a token into the home folder, and report its use over the network.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's monitor ends replicas when others fill the machine's memory; what streams take is admitted by the runtime.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        here = "RAY_ADDRESS" not in os.environ
        cores = max(os.cpu_count() or 1, (replicas + 1) * cpus)  # one more while a replica is replaced
        more: dict[str, Any] = {"num_cpus": cores, "include_dashboard": False} if here else {}
        ray.init(logging_level=logging.WARNING, **more)
    resources = ray.cluster_resources()
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        if each * replicas > resources.get(name, 0):
            if ours:
                ray.shutdown()
            raise UserError(
                f"{replicas} replicas of {each} {name} need {each * replicas}, Ray has {resources.get(name, 0):g}: "
                f"take fewer --replicas, or join a larger cluster by RAY_ADDRESS"
            )
    saving = {} if state_every_s is None else {"state_every_s": state_every_s}
    actor = ray.remote(
        num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_concurrency=THREADS, concurrency_groups={"take": 1}
    )(Replica)
    spawn = functools.partial(_Actor, lambda: actor.remote(make_runtime, **saving))
    return Fleet(spawn, replicas, on_close=ray.shutdown if ours else lambda: None)


def _ray() -> Any:
    """Untyped, because its types differ from version to version."""
    return importlib.import_module("ray")


class _Actor:
    """A `moving_stream.Handle` on a Ray actor."""

    def __init__(self, make: Callable[[], Any], name: str) -> None:
        self.name, self._actor = name, make()

    def call(self, method: str, *arguments: Any, timeout_s: float, **named: Any) -> Any:
        ray = _ray()
        try:
            return ray.get(self._remote(method, *arguments, **named), timeout=timeout_s)
        except ray.exceptions.RayActorError as error:
            raise Dead(f"replica {self.name} has died: {str(error).splitlines()[0]}") from error
        except ray.exceptions.GetTimeoutError as error:
            raise Dead(f"replica {self.name} has not answered for {timeout_s:g} s") from error

    def send(self, method: str, *arguments: Any) -> None:
        self._remote(method, *arguments)

    def kill(self) -> None:
        _ray().kill(self._actor)

    def _remote(self, method: str, *arguments: Any, **named: Any) -> Any:
        remote = getattr(self._actor, method)
        if method == "take":  # never behind a queue of commands
            remote = remote.options(concurrency_group="take")
        return remote.remote(*arguments, **named)
