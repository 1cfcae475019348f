"""Adherence in one call, judged while the streams run; and what the codec alone loses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamgen.metrics import quick
from streamgen.metrics.adherence import SegmentJudge, by_segment, by_word, merged, over_time
from streamgen.metrics.quick import quick_adherence
from streamgen.metrics.reconstruction import psnr_db, reconstruct
from streamgen.pipeline import StreamPipeline
from streamgen.worlds import sprites
from tests.tiny_model import save_tiny_model

BLOCK = 12
ITEMS = list(sprites.captions("heldout")[::90])


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StreamPipeline:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", height=64, width=64)
    return StreamPipeline.from_pretrained(folder, dtype="fp32")


def fading(after_s: float) -> Callable[..., None]:
    """A model that obeys until `after_s`, then shows the background alone."""

    def generate(pipe: Any, prompts: Any, seeds: Any, blocks: int, *, on_block: Any, **rest: Any) -> None:
        items = [sprites.parse(prompt) for prompt in prompts]
        video = sprites.to_uint8(
            sprites.render(sprites.sample_scenes(items, torch.Generator().manual_seed(0)), BLOCK * blocks)
        )
        for row, item in enumerate(items):
            empty = sprites.background_image(item.background, 64).round().byte().permute(1, 2, 0)
            video[row, round(16 * after_s) :] = empty
        for block in range(blocks):
            on_block(block, video[:, BLOCK * block : BLOCK * (block + 1)])

    return generate


def test_streams_that_fade_drift(pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "generate", fading(10))
    found = quick_adherence(pipe, ITEMS, range(len(ITEMS)), seconds=15)
    assert [one["start_s"] for one in found["by_segment"]] == [0, 5, 10]
    assert [one["obeys"] for one in found["by_segment"]] == [1, 1, 0]
    assert found["first"]["obeys"] == 1 and found["last"]["obeys"] == 0 and found["last"]["background"] == 1
    assert found["drift"]["ratio"] == 0 and found["n"] == found["first"]["n"] == len(ITEMS)
    ends = quick_adherence(pipe, ITEMS, range(len(ITEMS)), seconds=15, segments=False)
    assert ends["by_segment"] == [found["first"], found["last"]] and ends["drift"] == found["drift"]


def test_one_segment_has_no_drift(pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "generate", fading(10))
    for seconds in (2.25, 5):
        found = quick_adherence(pipe, ITEMS[:2], [0, 1], seconds=seconds)
        assert found["first"]["obeys"] == 1 and found["drift"] is None and len(found["by_segment"]) == 1
    with pytest.raises(ValueError, match="seconds is 1"):
        quick_adherence(pipe, ITEMS, range(len(ITEMS)), seconds=1)


def test_the_model_itself_is_asked_and_is_deterministic(pipe: StreamPipeline) -> None:
    first, again = (
        quick_adherence(pipe, ITEMS[:2], [3, 4], seconds=3, steps=4, cache="window")["first"] for _ in range(2)
    )
    shares = [first[name] for name in ("obeys", "presence")]
    assert first["obeys"] == again["obeys"] and first["n"] == 2 and all(0 <= share <= 1 for share in shares)


def test_the_judge_reads_what_by_segment_reads_however_frames_arrive() -> None:
    scenes = sprites.sample_scenes(ITEMS[:2], torch.Generator().manual_seed(1))
    video = sprites.to_uint8(sprites.render(scenes, 170)).numpy()
    video[1, 100:] = video[1, 100]  # the second stream stands still
    expected = [by_segment(clip, caption) for clip, caption in zip(video, ITEMS[:2], strict=True)]
    for size in (7, 100, 170):
        judge = SegmentJudge(ITEMS[:2], 16.0)
        for start in range(0, 170, size):
            judge.add(video[:, start : start + size])
        assert list(judge.rows) == [0.0, 5.0]
        for number, rows in enumerate(judge.rows.values()):
            assert [row["obeys"] for row in rows] == [one[number]["obeys"] for one in expected]


def test_streams_count_once_and_unread_sizes_nowhere() -> None:
    row = dict.fromkeys((*sprites.ATTRIBUTES, "obeys", "presence"), 1.0)
    found = merged([row, {**row, "size": math.nan, "obeys": 0.0}])
    assert (found["size"], found["obeys"], found["n"]) == (1.0, 0.5, 2)
    assert found["intervals"]["size"] == pytest.approx((0.2065, 1), abs=1e-3)  # one stream
    assert found["intervals"]["obeys"] == pytest.approx((0.0945, 0.9055), abs=1e-3)  # two
    assert over_time({0.0: [row]})["drift"] is None


def test_words_are_counted_where_they_are_asked_for() -> None:
    captions = [
        sprites.parse("a large red star rising over a snow background"),
        sprites.parse("a large red ring falling over a snow background"),
        sprites.parse("two small blue rings growing over a black background"),
    ]
    row = dict.fromkeys((*sprites.ATTRIBUTES, "obeys", "presence"), 1.0)
    found = by_word([row, {**row, "shape": 0.0, "obeys": 0.0}, {**row, "size": math.nan, "shape": 0.5}], captions)
    assert {word: (one["right"], one["n"]) for word, one in found["shape"].items()} == {
        "star": (1, 1),
        "ring": (0.25, 2),
    }
    assert list(found["size"]) == ["large"] and found["size"]["large"]["n"] == 2
    assert found["color"]["red"] | {"intervals": None} == {"right": 1, "obeys": 0.5, "n": 2, "intervals": None}
    assert list(found["motion"]) == ["rising", "falling", "growing"]


def test_reconstruction(pipe: StreamPipeline) -> None:
    assert psnr_db(4.0) == 0 and psnr_db(4e-3) == pytest.approx(30) and psnr_db(0) == math.inf

    class Halves:
        def encode(self, video: Tensor) -> Tensor:
            return video / 2

        def decode(self, latents: Tensor) -> Tensor:
            return latents

    video = torch.full((1, 4, 3, 16, 16), 0.5)
    out, error = reconstruct(Halves(), video)  # type: ignore[arg-type]
    assert error == pytest.approx(0.0625) and torch.equal(out, video / 2)
    out, error = reconstruct(pipe.codec, torch.rand(1, 12, 3, 64, 64) * 2 - 1)
    assert out.shape == (1, 12, 3, 64, 64) and error > 0


def test_models_of_a_run_in_training_can_be_judged(tmp_path: Path) -> None:
    """A pipeline without a folder, over modules that want gradients."""
    pipe = StreamPipeline.from_pretrained(save_tiny_model(tmp_path / "m", height=64, width=64), dtype="fp32")
    pipe.folder = None
    pipe.transformer.requires_grad_(True)
    assert quick_adherence(pipe, ITEMS[:1], [0], seconds=2)["n"] == 1
