"""`streamgen doctor`: what this machine has, what works, and what to do about what does not; with --model, what a model
needs, and where it fits; with --kernels, whether the Triton kernels are right here.

One line for each thing: ok, warn (something is slower or missing that the base does not need) or fail (nothing can be
streamed). The exit code is 0 unless a line fails.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from streamgen import __version__
from streamgen.errors import UserError
from streamgen_infer import machine

Level = Literal["ok", "warn", "fail"]
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
NEEDED = ("numpy", "safetensors", "einops", "omegaconf", "typer", "rich", "PIL")
# package -> (extra, what it is for)
EXTRAS = {
    "hydra-core": ("train", "train and distill"),
    "wandb": ("train", "logging runs to a server"),
    "peft": ("train", "adapters"),
    "diffusers": ("wan", "checking against Wan"),
    "transformers": ("wan", "Wan's text encoder"),
    "fastapi": ("serve", "the server"),
    "triton": ("cuda", "kernels on a GPU"),
    "xformers": ("cuda", "an attention backend on a GPU"),
    "torchvision": ("cuda", "JPEG on a GPU"),
}
SMALL_MB = 1000.0
PROMPT = "a red star spinning over a snow background"


@dataclass(frozen=True, slots=True)
class Check:
    """One line."""

    name: str
    level: Level
    found: str
    advice: str = ""


def run(
    as_json: bool, model: str | None = None, device: str | None = None, dtype: str = "auto", *, kernels: bool = False
) -> int:
    """The command; returns the exit code."""
    if kernels:
        checks = list(kernels_on(device))
    elif model is None:
        checks = [check for examine in EXAMINATIONS for check in examine()]
    else:
        checks = list(fit_of(model, device, dtype))
    failed = any(check.level == "fail" for check in checks)
    if as_json:
        values = {"command": "doctor", "version": __version__, "ok": not failed, "checks": [asdict(c) for c in checks]}
        print(json.dumps(values, indent=2))
    else:
        _print(checks)
    return 1 if failed else 0


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text.assemble((f"{check.level:4}", COLOURS[check.level]), f"  {check.name:{width}}  {check.found}")
        console.print(line, soft_wrap=True)
        if check.advice:
            console.print(Text(f"      {'':{width}}  -> {check.advice}", style="italic"), soft_wrap=True)


# The machine.


def system() -> Iterator[Check]:
    where = Path(__file__).resolve().parents[1]
    yield Check(
        "streamgen", "ok", f"{__version__} in {where}, Python {platform.python_version()} on {platform.platform()}"
    )
    cores = machine.usable_cores()
    limit = os.environ.get("OMP_NUM_THREADS")
    limited = f", OMP_NUM_THREADS={limit}" if limit else ""
    yield Check("cores", "ok", f"{cores} usable of {os.cpu_count()}, {machine.cpu_name()}{limited}")
    flags = machine.cpu_flags()
    if platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux" and "avx2" not in flags:
        yield Check("instructions", "warn", ", ".join(flags) or "no AVX2", "expect a tenth of the usual speed")
    else:
        fast_bf16 = "amx_bf16" in flags or "avx512_bf16" in flags or "bf16" in flags
        yield Check("instructions", "ok", f"{', '.join(flags) or 'unknown'}; bf16 in hardware: {_yes(fast_bf16)}")
    memory = machine.memory_mb()
    if memory is None:
        yield Check("memory", "ok", "not known on this system; a stream takes less than 1 GB")
    else:
        low = memory[1] < SMALL_MB
        advice = "a stream takes up to 1 GB: close other programs" if low else ""
        found = f"{memory[1] / 1000:.1f} GB free of {memory[0] / 1000:.1f}"
        yield Check("memory", "warn" if low else "ok", found, advice)
    free_mb = shutil.disk_usage(Path.cwd()).free / 1e6
    advice = "write elsewhere, or make room" if free_mb < SMALL_MB else ""
    yield Check("disk", "warn" if advice else "ok", f"{free_mb / 1000:.1f} GB free in {Path.cwd()}", advice)


# What is installed.


def packages() -> Iterator[Check]:
    problems = [problem for name in NEEDED if (problem := _import_problem(name))]
    advice = "install streamgen again: make setup, or pip install --force-reinstall streamgen"
    if problems:
        yield Check("packages", "fail", "; ".join(problems), advice)
    else:
        yield Check("packages", "ok", f"{', '.join(NEEDED)} load")
    if problem := _import_problem("torch"):
        yield Check("torch", "fail", problem, "pip install torch (CPU: see the top of constraints.txt)")
        return
    import torch

    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            yield Check(
                "GPU", "ok", f"cuda:{index} {card.name}, {card.total_memory / 1e9:.0f} GB (--device cuda:{index})"
            )
    else:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "CUDA finds no device"
        yield Check("GPU", "ok", f"none ({built}); the shipped model needs none")


def video() -> Iterator[Check]:
    advice = "pip install --upgrade av; until then write .gif, .y4m or a folder of PNGs"
    if problem := _import_problem("av"):
        yield Check("ffmpeg", "warn", problem, advice)
        return
    import av

    missing = []
    for encoder, suffix in (("libx264", ".mp4"), ("libvpx-vp9", ".webm")):
        try:
            av.Codec(encoder, "w")
        except av.error.FFmpegError:
            missing.append(f"no {encoder}, so no {suffix}")
    found = f"PyAV {av.__version__}: {'; '.join(missing) or 'libx264 and libvpx-vp9, so .mp4 and .webm'}"
    yield Check("ffmpeg", "warn" if missing else "ok", found, advice if missing else "")


def extras() -> Iterator[Check]:
    have = {name: version for name in EXTRAS if (version := _version(name))}
    for name, (extra, purpose) in EXTRAS.items():
        if name in have:
            yield Check(name, "ok", have[name])
        else:
            yield Check(name, "ok", f"not installed; only for {purpose} (pip install 'streamgen[{extra}]')")
    if "torchvision" in have and "+cpu" in (_version("torch") or ""):
        found = f"torchvision {have['torchvision']} beside a CPU torch"
        advice = "it breaks the import of diffusers and transformers classes here: pip uninstall torchvision"
        yield Check("torchvision", "warn", found, advice)


def _import_problem(module: str) -> str:
    """Why a module cannot be imported, "" if it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return f"{module} does not load: {' '.join(str(error).split())}"
    return ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


# What works.


def number_formats() -> Iterator[Check]:
    if _import_problem("torch"):
        return
    from streamgen.pipeline import probe_dtype

    fp32_ms, bf16_ms = (_product_ms(name) for name in ("float32", "bfloat16"))
    chosen = probe_dtype("cpu")
    found = f"product of 512 x 512 x 512: fp32 {fp32_ms:.2f} ms, bf16 {bf16_ms:.2f} ms; --dtype auto takes {chosen}"
    yield Check("dtype", "ok", found)


def _product_ms(dtype: str) -> float:
    """Best of five matrix products."""
    import torch

    a = torch.ones(512, 512, dtype=getattr(torch, dtype))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 1000 * min(times[1:])


def model() -> Iterator[Check]:
    """The shipped model is there and makes a block of video."""
    if _import_problem("torch"):
        return
    from streamgen.pipeline import StreamPipeline
    from streamgen.resources import model_path

    advice = "install streamgen again, or name another model with --model"
    try:
        folder = model_path("sprites")
        pipe = StreamPipeline.from_pretrained("sprites")
        megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
        yield Check("model", "ok", f"sprites, {megabytes:.1f} MB, fingerprint {pipe.fingerprint[:12]}, in {folder}")
        stream = pipe.stream(PROMPT, max_blocks=2)
        next(stream)
        block = next(stream)
    except (UserError, OSError) as error:
        yield Check("model", "fail", " ".join(str(error).split()), advice)
        return
    media_ms = 1000 * len(block.frames) / pipe.geometry.fps
    times = media_ms / block.timing.total_ms
    found = f"{len(block.frames)} frames in {block.timing.total_ms:.0f} ms, {times:.1f}x real time"
    if times < 1:
        advice = "close other programs, set --threads, or try --dtype bf16 and fp32"
        yield Check("streaming", "warn", f"{found}: slower than it plays", advice)
    else:
        yield Check("streaming", "ok", found)


# What a model needs.


def fit_of(model: str, device: str | None, dtype: str) -> Iterator[Check]:
    """What a model that is not loaded needs, and how it fits each device (or the one that is named)."""
    from streamgen.pipeline import DTYPES
    from streamgen.quantised_linear import bytes_saved
    from streamgen_infer.models import fit
    from streamgen_infer.models.fit_sizes import read_sizes

    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {dtype!r} does not exist; there are: auto, {', '.join(DTYPES)}")
    found = fit.places(device)
    if not found:
        raise UserError(f"--device {device!r} is not here; there are: {', '.join(p.name for p in fit.places())}")
    sizes = read_sizes(model)
    g, s = sizes.geometry, sizes.scheduler
    shape = f"{g.width}x{g.height}, blocks of {g.block_frames} latent frames, window {s.window_frames}"
    yield Check("model", "ok", f"{model}: {sizes.parameters / 1e6:,.1f} M parameters, {shape}, sink {s.sink_frames}")
    for note in sizes.notes:
        yield Check("assumed", "ok", note)
    for name in DTYPES if dtype == "auto" else (dtype,):
        needs = fit.demand(sizes, name)
        for what, value in fit.rows(needs):
            yield Check(f"{name} {what}", "ok", fit.gigabytes(value))
        yield Check(f"{name} one stream", "ok", fit.gigabytes(needs.peak(1)))
        small = needs.peak(1) - bytes_saved(sizes.transformer, DTYPES[name].itemsize)
        how = f"{fit.gigabytes(small)} once it is loaded: weights become bytes one layer after the other"
        yield Check(f"{name} with --weights-dtype int8 or fp8", "ok", how)
    for place in found:
        choice = fit.choose(sizes, place, dtype)
        if choice is None:
            yield Check(place.name, "fail" if len(found) == 1 else "warn", *fit.shortage(sizes, place, dtype))
            continue
        many = f"{choice.streams} stream{'s' if choice.streams > 1 else ''}"
        where = f"{many} in {choice.dtype}, {fit.gigabytes(place.usable)} can be used"
        if choice.text:
            yield Check(place.name, "ok", where)
        else:
            advice = "encode prompts elsewhere: what was encoded once is kept on disk"
            yield Check(place.name, "warn", f"{where}; the text encoder does not fit beside them", advice)


# The kernels.


def kernels_on(device: str | None) -> Iterator[Check]:
    """Every kernel and attention backend against its reference on a device, and which of them run."""
    import torch

    from streamgen.attention import BACKENDS
    from streamgen.kernel_choice import ops_for
    from streamgen_infer.kernels_check import Row, check_kernels, usable_device

    place = usable_device(device)
    how = "compiled" if place.type == "cuda" else "by Triton's interpreter, which says nothing about speed"
    yield Check("triton", "ok", f"{_version('triton')} on {place}, {how}")
    rows: dict[str, list[Row]] = {}
    for row in check_kernels(place):
        rows.setdefault(row.name, []).append(row)
    for name, tried in rows.items():
        right = all(row.ok for row in tried)
        advice = "" if right else "do not choose it on this device, and report it"
        yield Check(name, "ok" if right else "fail", "; ".join(f"{row.dtype} {row.found}" for row in tried), advice)
    chosen = (
        "the fastest right one for a model's shapes" if place.type == "cuda" else f"auto, {BACKENDS['auto'].limits}"
    )
    absent = {name: backend.problem(place, torch.bfloat16) for name, backend in BACKENDS.items()}
    for name, problem in absent.items():
        if problem:
            yield Check(f"attention {name}", "ok", f"not here: {problem}")
    modules = sorted(set(ops_for("auto", place).active().values()))
    yield Check("runs", "ok", f"operations: {', '.join(modules)}; attention: {chosen}")


EXAMINATIONS: tuple[Callable[[], Iterator[Check]], ...] = (system, packages, video, number_formats, model, extras)
