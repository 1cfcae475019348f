"""How much of a sprites prompt the pixels show, judged by `streamgen.worlds.checker`.

A clip is uint8 [T, S, S, 3]. Every report of adherence goes with its nulls (see `nulls`): a figure
means something by its distance from them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from streamgen.worlds import checker, sprites

Frames = NDArray[Any] | Tensor

WINDOW_S = 2.0
SWITCH_STEP_FRAMES = 4


def adherence(clips: Sequence[Frames], captions: Sequence[sprites.Caption], fps: float = 16.0) -> dict[str, float]:
    """Share of clips right in each attribute and in 'obeys' (all but size), mean presence, and n.

    Each clip is one window of about 2 s. 'size' is over the captions whose size can be read (not
    growing or shrinking), nan without any.
    """
    return _score([checker.check(clip, fps) for clip in clips], captions)


def by_segment(
    frames: Frames, caption: sprites.Caption, fps: float = 16.0, segment_s: float = 5.0
) -> list[dict[str, float]]:
    """`adherence` of each whole segment of a stream, in order, with its 'start_s'.

    A segment is judged by as many windows of 2 s as it holds without overlap (two in 5 s), in its
    middle; what is left after the last whole segment is not judged.
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
        readings = [checker.check(frames[first : first + window], fps) for first in firsts]
        out.append({"start_s": start / fps} | _score(readings, [caption] * number))
    return out


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
    readings = [checker.check(clip, fps) for clip in clips]
    empty = {}
    for background in {c.background for c in captions}:
        side = clips[0].shape[1]
        image = sprites.background_image(background, side).round().byte().permute(1, 2, 0).numpy()
        empty[background] = checker.check(np.stack([image] * round(WINDOW_S * fps)), fps)
    return {
        "shuffled": _score(readings, _deranged(captions))["obeys"],
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
