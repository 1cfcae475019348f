"""Measurements -> the fields of the JSON file. Shares go with their 95 % intervals, in 'intervals' beside them."""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from streamgen.metrics import adherence, motion, reconstruction, stream
from streamgen.metrics.intervals import mean_and_error, median_with_interval, wilson
from streamgen.worlds.sprites import ATTRIBUTES
from streamgen_infer.evaluation.measure import Evaluation, Measured, Rendered, Speed, Switched

SOON_S = 1.0
"""A switch is 'within_1s' if its stream obeys from so long after it on."""


def report(evaluation: Evaluation) -> dict[str, Any]:
    """All that was measured. The fields of the first number of steps are the report's own; with several,
    'by_steps' has them all."""
    by_steps = [
        _figures(evaluation, steps)
        for steps in evaluation.steps
        if any(one.steps == steps and one.captions for one in evaluation.measured)
    ]
    options = evaluation.options
    return {
        **by_steps[0],
        **({"by_steps": by_steps} if len(evaluation.steps) > 1 else {}),
        "held_out": True,
        "captions": _captions_mark(evaluation),
        "seeds": list(options.seeds),
        "batch": options.batch,
        "seconds": options.seconds,
        "long_n": options.long_n if options.seconds > adherence.SEGMENT_S else 0,
        "codec": codec_figures(evaluation.rendered),
    }


def _captions_mark(evaluation: Evaluation) -> str:
    """Which captions were asked for: equal marks, equal captions."""
    options = evaluation.options
    asked = "\n".join(caption.text for caption in evaluation.heldout) + f"\n{options.n} {options.seeds}"
    return f"{zlib.crc32(asked.encode()):08x}"


def _figures(evaluation: Evaluation, steps: int) -> dict[str, Any]:
    """What one number of steps gave, all seeds together and each by itself."""
    measured = [one for one in evaluation.measured if one.steps == steps and one.captions]
    fps, side = evaluation.geometry.fps, evaluation.geometry.height
    rows = [row for one in measured for row in one.rows]
    captions = [caption for one in measured for caption in one.captions]
    first = adherence.merged(rows)
    over_time = adherence.over_time(_long_rows(measured) or {0.0: rows})
    switches = [
        switch_figures([s for one in measured for s in one.switched.get(name, [])], name)
        for name in evaluation.options.transitions
    ]
    return {
        "steps": steps,
        "trained": steps in evaluation.pipe.scheduler.trained_steps,
        **_speed_fields(evaluation.speed[steps]),
        "n": len(rows),
        "adherence": {name: first[name] for name in (*ATTRIBUTES, "obeys")},
        "presence": first["presence"],
        "intervals": first["intervals"],
        "by_word": adherence.by_word(rows, captions),
        **over_time,
        "switch": switches[0],
        "switches": switches,
        "nulls": _nulls(measured, side, fps),
        "motion": motion_figures(measured, evaluation.rendered),
        "stream": stream_figures(measured, evaluation.rendered),
        **over_seeds(measured),
    }


def _long_rows(measured: Sequence[Measured]) -> dict[float, list[adherence.Row]]:
    """start_s -> rows of the long streams of all seeds; segments that all of them reached."""
    judged = [one.long.rows for one in measured if one.long is not None]
    starts = set.intersection(*(set(rows) for rows in judged)) if judged else set()
    return {start_s: [row for rows in judged for row in rows[start_s]] for start_s in starts}


def _speed_fields(speed: Speed) -> dict[str, Any]:
    return {"frames": speed.frames, "fps": speed.frames / speed.seconds, **speed.alone}


def switch_figures(switched: Sequence[Switched], transition: str) -> dict[str, Any]:
    """'obeys' in the last 2 s; 'reached' streams that obey at some time, and the median latency of these;
    'median_latency_all_s' over all streams (none if half of them never obey), and the share 'within_1s'."""
    n = len(switched)
    reached = [one.latency_s for one in switched if one.latency_s is not None]
    middle, low, high = median_with_interval([math.inf if one.latency_s is None else one.latency_s for one in switched])
    obeys = statistics.fmean(one.row["obeys"] for one in switched) if n else math.nan
    soon = sum(latency <= SOON_S for latency in reached) / n if n else math.nan
    return {
        "obeys": obeys,
        "median_latency_s": statistics.median(reached) if reached else None,
        "median_latency_all_s": middle,
        "within_1s": soon,
        "reached": len(reached),
        "n": n,
        "transition": transition,
        "intervals": {
            "obeys": wilson(obeys, n),
            "median_latency_all_s": (low, high),
            "within_1s": wilson(soon, n),
        },
    }


def _nulls(measured: Sequence[Measured], side: int, fps: float) -> dict[str, Any] | None:
    """Over seeds, each against its own captions; None without two clips."""
    found = [(adherence.nulls_of(m.readings, m.captions, side, fps), len(m.rows)) for m in measured if len(m.rows) > 1]
    if not found:
        return None
    n = sum(count for _, count in found)
    shares = {name: sum(null[name] * count for null, count in found) / n for name in found[0][0]}
    return {**shares, "intervals": {name: wilson(share, n) for name, share in shares.items()}}


def motion_figures(measured: Sequence[Measured], rendered: Sequence[Rendered]) -> dict[str, Any]:
    """Of the clips, and in 'reference' of rendered video of the same captions."""
    reference = motion.motion_report([m for one in rendered for m in one.real.motions])
    return {**motion.motion_report([m for one in measured for m in one.motions]), "reference": reference}


def stream_figures(measured: Sequence[Measured], rendered: Sequence[Rendered]) -> dict[str, Any] | None:
    """STREAM of the clips against rendered video; 'ceiling' is what other rendered video of the captions scores."""
    real, again, made = (
        [features for one in group for features in one]
        for group in (
            [one.real.features for one in rendered],
            [one.again for one in rendered],
            [one.features for one in measured],
        )
    )
    if min(len(real), len(made)) < 2:
        return None
    scores = stream.stream_scores(torch.stack(real), torch.stack(made))
    ceiling = stream.stream_scores(torch.stack(real), torch.stack(again))
    return {**scores, "n": len(made), "features": stream.DEFAULT_FEATURES, "ceiling": ceiling}


def codec_figures(rendered: Sequence[Rendered]) -> dict[str, Any]:
    """PSNR of held-out video that was encoded and decoded in fp32, and its adherence: what the codec allows."""
    rows = [row for one in rendered for row in one.decoded.rows]
    found = adherence.merged(rows)
    errors = [error for one in rendered for error in one.squared_errors]
    return {
        "psnr_db": reconstruction.psnr_db(statistics.fmean(errors)),
        "adherence": {name: found[name] for name in (*ATTRIBUTES, "obeys")},
        "presence": found["presence"],
        "intervals": found["intervals"],
        "n": found["n"],
    }


def over_seeds(measured: Sequence[Measured]) -> dict[str, Any]:
    """'per_seed' values and 'over_seeds', their mean and standard error; nothing of a single seed."""
    if len(measured) < 2:
        return {}
    per_seed: list[dict[str, Any]] = []
    for one in measured:
        first = adherence.merged(one.rows)
        row: dict[str, Any] = {name: first[name] for name in adherence.SHARES}
        if one.long is not None and len(one.long.rows) > 1:
            long = adherence.over_time(one.long.rows)
            row |= {"obeys_at_end": long["by_segment"][-1]["obeys"], "drift": long["drift"]["ratio"]}
        for name, switched in one.switched.items():
            row[f"switch_{name}"] = statistics.fmean(s.row["obeys"] for s in switched)
        per_seed.append({"seed": one.seed, "n": first["n"], **row})
    names = [name for name in per_seed[0] if name not in ("seed", "n")]
    return {"per_seed": per_seed, "over_seeds": {name: _mean_and_error(per_seed, name) for name in names}}


def _mean_and_error(per_seed: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    known = [value for row in per_seed if not math.isnan(value := row.get(name, math.nan))]
    mean, error = mean_and_error(known) if known else (math.nan, math.nan)
    return {"mean": mean, "error": error}


def plain(value: Any) -> Any:
    """For JSON, which has no nan and no inf: None; tuples as lists."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
