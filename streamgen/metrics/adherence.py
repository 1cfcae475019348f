"""How much of a sprites prompt the pixels show, judged by `streamgen.worlds.checker`.

A clip is uint8 [T, S, S, 3]. Every report of adherence goes with its nulls (see `nulls`): a figure
means something by its distance from them. A *row* is what one stream scored: a share per attribute,
'obeys' and 'presence'.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from streamgen.metrics.intervals import drift, wilson
from streamgen.worlds import checker, sprites
from streamgen.worlds.grammar import AXES

Frames = NDArray[Any] | Tensor
Row = dict[str, float]

WINDOW_S = 2.0
SEGMENT_S = 5.0
SWITCH_STEP_FRAMES = 4
SHARES = (*sprites.ATTRIBUTES, "obeys", "presence")


def adherence(clips: Sequence[Frames], captions: Sequence[sprites.Caption], fps: float = 16.0) -> dict[str, float]:
    """Share of clips right in each attribute and in 'obeys' (all but size), mean presence, and n.

    Each clip is one window of about 2 s. 'size' is over the captions whose size can be read (not
    growing or shrinking), nan without any.
    """
    return _score([checker.check(clip, fps) for clip in clips], captions)


def segment_readings(
    frames: Frames, fps: float = 16.0, segment_s: float = SEGMENT_S
) -> list[tuple[float, list[checker.Reading]]]:
    """What the checker reads in each whole segment of a stream: (start_s, one reading per window), in order.

    A segment holds as many windows of 2 s as fit without overlap (two in 5 s), in its middle; what
    is left after the last whole segment is not read.
    """
    window = round(WINDOW_S * fps)
    segment = round(segment_s * fps)
    if segment < window:
        raise ValueError(f"segment_s is {segment_s}; at least {WINDOW_S} (one window) is needed")
    if len(frames) < segment:
        raise ValueError(f"{len(frames)} frames are shorter than one segment of {segment}")
    number = segment // window
    margin = (segment - number * window) // 2
    out = []
    for start in range(0, len(frames) - segment + 1, segment):
        firsts = [start + margin + k * window for k in range(number)]
        out.append((start / fps, [checker.check(frames[first : first + window], fps) for first in firsts]))
    return out


def row_of(readings: Sequence[checker.Reading], caption: sprites.Caption) -> Row:
    """What one stream scored in these windows."""
    return _score(readings, [caption] * len(readings))


def by_segment(frames: Frames, caption: sprites.Caption, fps: float = 16.0, segment_s: float = SEGMENT_S) -> list[Row]:
    """`adherence` of each whole segment of a stream (`segment_readings`), in order, with its 'start_s'."""
    return [
        {"start_s": start_s} | row_of(readings, caption)
        for start_s, readings in segment_readings(frames, fps, segment_s)
    ]


def merged(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean over streams of their rows, n, and 'intervals': 95 % of each share [low, high] (`wilson`).

    A stream counts once, however many of its windows were read; sizes that cannot be read count nowhere.
    """
    out: dict[str, Any] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for name in SHARES:
        known = [row[name] for row in rows if not math.isnan(row[name])]
        out[name] = statistics.fmean(known) if known else math.nan
        intervals[name] = wilson(out[name], len(known))
    return {**out, "n": len(rows), "intervals": intervals}


def by_word(
    rows: Sequence[Mapping[str, float]], captions: Sequence[sprites.Caption]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Attribute -> word -> how the captions with this word did: is the attribute right, does all obey.

    {'motion': {'rising': {'right', 'obeys', 'n', 'intervals': {'right', 'obeys'}}, ...}, ...}, in the order of the
    grammar. Of 'size', captions whose size cannot be read are left out.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for attribute, words in zip(sprites.ATTRIBUTES, AXES, strict=True):
        out[attribute] = {}
        for word in words:
            having = [r for r, c in zip(rows, captions, strict=True) if getattr(c, attribute) == word]
            having = [row for row in having if not math.isnan(row[attribute])]
            if having:
                right, obeys = (statistics.fmean(row[name] for row in having) for name in (attribute, "obeys"))
                n = len(having)
                intervals = {"right": wilson(right, n), "obeys": wilson(obeys, n)}
                out[attribute][word] = {"right": right, "obeys": obeys, "n": n, "intervals": intervals}
    return out


class SegmentJudge:
    """Judges streams segment by segment while they run; frames are dropped when they have been read.

    captions: one per stream. only: numbers of the segments to read (all by default).
    """

    def __init__(
        self,
        captions: Sequence[sprites.Caption],
        fps: float,
        segment_s: float = SEGMENT_S,
        only: Container[int] | None = None,
    ) -> None:
        self._captions, self._fps, self._segment_s, self._only = captions, fps, segment_s, only
        self._frames = round(segment_s * fps)
        self._waiting: list[NDArray[Any]] = []
        self._number = 0
        self.rows: dict[float, list[Row]] = {}
        """start_s -> a row per stream, for the segments read so far."""

    def add(self, frames: NDArray[Any]) -> None:
        """The next frames of all streams, uint8 [B, n, S, S, 3]."""
        self._waiting.append(frames)
        while sum(part.shape[1] for part in self._waiting) >= self._frames:
            video = np.concatenate(self._waiting, 1)
            self._waiting = [video[:, self._frames :]]
            if self._only is None or self._number in self._only:
                self.rows[self._number * self._segment_s] = [
                    by_segment(one[: self._frames], caption, self._fps, self._segment_s)[0]
                    for one, caption in zip(video, self._captions, strict=True)
                ]
            self._number += 1


def over_time(rows: Mapping[float, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """'by_segment' (`merged` and 'start_s', in order) and 'drift' of streams judged segment by segment.

    'drift' is of 'obeys', the last segment against the first (`intervals.drift`); None with a single one.
    """
    starts = sorted(rows)
    by = [{"start_s": start_s, **merged(rows[start_s])} for start_s in starts]
    first, last = rows[starts[0]], rows[starts[-1]]
    change = None
    if len(starts) > 1:
        change = {
            **drift([row["obeys"] for row in first], [row["obeys"] for row in last]),
            "first_start_s": starts[0],
            "last_start_s": starts[-1],
            "n": len(first),
        }
    return {"by_segment": by, "drift": change}


def switch_latency(
    frames: Frames, caption_after: sprites.Caption, switch_frame: int, fps: float = 16.0
) -> float | None:
    """Seconds from a switch to the start of the first 2 s that obey the new caption, if any do.

    Windows are stepped by SWITCH_STEP_FRAMES, so 0 means that the stream obeys from the switch on.
    """
    window = round(WINDOW_S * fps)
    for first in range(switch_frame, len(frames) - window + 1, SWITCH_STEP_FRAMES):
        reading = checker.check(frames[first : first + window], fps)
        if checker.obeys(reading, caption_after)["obeys"]:
            return (first - switch_frame) / fps
    return None


def nulls(clips: Sequence[Frames], captions: Sequence[sprites.Caption], fps: float = 16.0) -> dict[str, float]:
    """'obeys' that is worth nothing: 'shuffled', the clips against each other's captions, and
    'background_only', noise-free video of the captions' backgrounds."""
    return nulls_of([[checker.check(clip, fps)] for clip in clips], captions, clips[0].shape[1], fps)


def nulls_of(
    readings: Sequence[Sequence[checker.Reading]], captions: Sequence[sprites.Caption], side: int, fps: float = 16.0
) -> dict[str, float]:
    """`nulls` of clips that have been read already (one or more windows each), of `side` pixels."""
    empty = {}
    for background in {c.background for c in captions}:
        image = sprites.background_image(background, side).round().byte().permute(1, 2, 0).numpy()
        empty[background] = checker.check(np.stack([image] * round(WINDOW_S * fps)), fps)
    shuffled = [row_of(one, other)["obeys"] for one, other in zip(readings, _deranged(captions), strict=True)]
    return {
        "shuffled": statistics.fmean(shuffled),
        "background_only": _score([empty[c.background] for c in captions], captions)["obeys"],
    }


def _deranged(captions: Sequence[sprites.Caption]) -> list[sprites.Caption]:
    """The captions in another order, always the same, with a different caption in every place."""
    order = list(range(len(captions)))
    random.Random(0).shuffle(order)
    for shift in range(1, len(captions)):
        out = list(captions)
        for source, target in zip(order, order[shift:] + order[:shift], strict=True):
            out[target] = captions[source]
        if all(a != b for a, b in zip(out, captions, strict=True)):
            return out
    raise ValueError(f"{len(captions)} captions cannot be shuffled so that all change; give distinct ones")


def _score(readings: Sequence[checker.Reading], captions: Sequence[sprites.Caption]) -> dict[str, float]:
    if len(readings) != len(captions) or not readings:
        raise ValueError(f"{len(readings)} clips and {len(captions)} captions; give one caption per clip")
    verdicts = [checker.obeys(r, c) for r, c in zip(readings, captions, strict=True)]
    out = {a: float(np.mean([v[a] for v in verdicts])) for a in (*sprites.ATTRIBUTES, "obeys")}
    sized = [v["size"] for v, c in zip(verdicts, captions, strict=True) if c.motion not in checker.SIZELESS_MOTIONS]
    out["size"] = float(np.mean(sized)) if sized else math.nan
    out["presence"] = float(np.mean([r.presence for r in readings]))
    out["n"] = len(readings)
    return out
