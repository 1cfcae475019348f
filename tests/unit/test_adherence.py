"""Adherence figures over clips, streams and switches, and their nulls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from streamgen.metrics.adherence import _deranged, adherence, by_segment, nulls, switch_latency
from streamgen.worlds import sprites
from streamgen.worlds.sprites import Caption, parse


def clips_of(items: list[Caption], num_frames: int = 32) -> list[np.ndarray]:
    scenes = sprites.sample_scenes(items, torch.Generator().manual_seed(0))
    return list(sprites.to_uint8(sprites.render(scenes, num_frames)).numpy())


ITEMS = list(sprites.captions("heldout")[::35])


def test_rendered_clips_obey_and_nulls_do_not() -> None:
    clips = clips_of(ITEMS)
    scores = adherence(clips, ITEMS)
    assert scores == {
        **dict.fromkeys((*sprites.ATTRIBUTES, "obeys", "presence"), 1.0),
        "n": len(ITEMS),
    }
    assert nulls(clips, ITEMS) == {"shuffled": 0.0, "background_only": 0.0}


def test_shares_are_over_clips() -> None:
    items = [c for c in ITEMS if c.motion != "spinning"][:4]
    clips = clips_of(items)
    clips[1] = clips[1][:1].repeat(32, 0)
    scores = adherence(clips, items)
    assert scores["motion"] == scores["obeys"] == 0.75 and scores["color"] == 1.0
    assert scores["n"] == 4


def test_size_is_over_captions_that_have_one() -> None:
    growing = [c for c in sprites.captions("heldout") if c.motion == "growing"][:2]
    fixed = [c for c in sprites.captions("heldout") if c.motion == "rising"][:1]
    clips = clips_of(growing + fixed)
    other = "small" if fixed[0].size == "large" else "large"
    wrong = Caption(fixed[0].count, other, *[getattr(fixed[0], a) for a in sprites.ATTRIBUTES[2:]])
    scores = adherence(clips, [*growing, wrong])
    assert scores["size"] == 0.0 and scores["obeys"] == 1.0
    assert math.isnan(adherence(clips[:2], growing)["size"])


def test_segments_show_when_a_stream_fails() -> None:
    caption = parse("a large red square moving left over a navy background")
    stream = clips_of([caption], 16 * 17)[0]
    empty = sprites.background_image("navy", 64).round().byte().permute(1, 2, 0).numpy()
    stream[16 * 10 + 8 + 32 :] = empty  # gone in the second window of the third segment
    segments = by_segment(stream, caption)
    assert [s["start_s"] for s in segments] == [0.0, 5.0, 10.0]
    assert [s["obeys"] for s in segments] == [1.0, 1.0, 0.5]
    assert [s["n"] for s in segments] == [2, 2, 2]
    assert segments[2]["presence"] == 0.5 and segments[2]["background"] == 1.0


def test_segments_refuse_what_they_cannot_hold() -> None:
    caption = ITEMS[0]
    stream = np.zeros((64, 64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="segment_s"):
        by_segment(stream, caption, segment_s=1.0)
    with pytest.raises(ValueError, match="64 frames"):
        by_segment(stream, caption)


def test_switch_latency() -> None:
    before = parse("a large red square moving left over a navy background")
    after = parse("a large green star falling over a snow background")
    starts = [torch.zeros(1).long(), torch.tensor([40])]
    generator = torch.Generator().manual_seed(0)
    video = sprites.render_switched([[before], [after]], starts, 112, generator)
    stream = sprites.to_uint8(video)[0].numpy()
    latency = switch_latency(stream, after, 40)
    assert latency is not None and latency <= 0.75
    earlier = switch_latency(stream, after, 20)
    assert earlier is not None and earlier >= 20 / 16 - 0.5
    assert switch_latency(stream[:64], after, 40) is None
    assert switch_latency(stream, parse("a large green star rising over a snow background"), 40) is None


def test_derangement_is_fixed_and_moves_every_caption() -> None:
    twice = ITEMS + ITEMS
    out = _deranged(twice)
    assert out == _deranged(twice)
    assert sorted(c.text for c in out) == sorted(c.text for c in twice)
    assert all(a != b for a, b in zip(out, twice, strict=True))
    with pytest.raises(ValueError, match="distinct"):
        _deranged([ITEMS[0]] * 3)


def test_one_caption_per_clip() -> None:
    with pytest.raises(ValueError, match="1 clips and 2 captions"):
        adherence(clips_of(ITEMS[:1]), ITEMS[:2])
