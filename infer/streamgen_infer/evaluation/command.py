"""`streamgen eval sprites`: does the video show what its prompt says? Held-out captions, judged from the pixels."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import Any

import torch

from streamgen import __version__
from streamgen.errors import UserError
from streamgen.pipeline import StreamPipeline
from streamgen.rollout import Cancelled
from streamgen_infer.evaluation.measure import Evaluation
from streamgen_infer.evaluation.options import Options
from streamgen_infer.evaluation.pictures import draw, marked_sheet, png, write_whole
from streamgen_infer.evaluation.report import plain, report
from streamgen_infer.evaluation.show import show
from streamgen_infer.interrupts import INTERRUPTED, Interrupts
from streamgen_infer.report import write_report


def run(options: Options, interrupts: Interrupts) -> int:
    """The command, its options checked (`options.check`); returns the exit code."""
    started_s = time.perf_counter()
    pipe = StreamPipeline.from_pretrained(
        options.model,
        device=options.device,
        dtype=options.dtype,
        weights_dtype=options.weights_dtype,
        threads=options.threads,
    )
    loaded_s = time.perf_counter() - started_s
    if pipe.geometry.height != pipe.geometry.width:
        raise UserError(
            f"the sprites world is square, {options.model} makes {pipe.geometry.width}x{pipe.geometry.height}"
        )
    with interrupts.deferred() as stop:
        evaluation = Evaluation(pipe, options, stop)
        try:
            evaluation.run()
        except Cancelled:
            print("streamgen: interrupted; these figures are of what was made so far", file=sys.stderr)
        if not any(one.captions for one in evaluation.measured):
            return INTERRUPTED
        values = plain(_values(evaluation, loaded_s, interrupted=stop.requested))
        show(values)
        _write(evaluation, values)
    return INTERRUPTED if stop.requested else 0


def _values(evaluation: Evaluation, loaded_s: float, *, interrupted: bool) -> dict[str, Any]:
    options, pipe = evaluation.options, evaluation.pipe
    return {
        "command": "eval",
        "suite": "sprites",
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "interrupted": interrupted,
        "load_s": round(loaded_s, 4),
        **report(evaluation),
        "model": options.model,
        "schedule": "serial",
        "cache": options.cache,
        "cache_dtype": options.cache_dtype or pipe.dtype_name,
        "weights_dtype": pipe.weights_dtype or pipe.dtype_name,
        "device": str(pipe.device),
        "dtype": pipe.dtype_name,
        "threads": torch.get_num_threads(),
        "seed": options.seeds[0],
    }


def _write(evaluation: Evaluation, values: dict[str, Any]) -> None:
    options = evaluation.options
    if options.json is not None:
        write_report(options.json, values)
    if options.sheet is not None:
        clips, captions = zip(*evaluation.sheet, strict=True)
        write_whole(options.sheet, png(marked_sheet(clips, captions, evaluation.geometry.fps)))
    if options.pictures is not None:
        written = draw(evaluation, values, options.pictures)
        print("pictures: " + ", ".join(str(path) for path in written))
