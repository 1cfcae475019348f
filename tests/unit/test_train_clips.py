"""Training clips: their three kinds, captions that say what is on the screen, and a split that is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamgen.geometry import VideoGeometry
from streamgen.worlds import painting, sprites
from streamgen.worlds.sprites import Caption
from streamgen_train.clips import Clips, Kind, make_clips
from streamgen_train.data import pick_captions

GEOMETRY = VideoGeometry(height=64, width=64, latent_channels=4)
SMALL = VideoGeometry(height=16, width=16, latent_channels=4, block_frames=1)
KINDS: tuple[Kind, ...] = ("single", "story", "gap")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks_of(clips: Clips, geometry: VideoGeometry) -> list[Tensor]:
    """The frames of each block, [B, T, 3, h, w]; the lead frames of a gap are left out."""
    per_block = geometry.block_pixel_frames(0)
    first, later = clips.video[:, :per_block], clips.video[:, per_block + clips.lead_frames :]
    return [first, *later.split(per_block, 1)] if later.shape[1] else [first]


def background_shown(frames: Tensor) -> str:
    """Of one block [T, 3, h, w]: the background that most pixels equal."""
    equal = {
        name: float((levels(frames) - sprites.background_image(name, frames.shape[-1])).abs().amax(1).lt(0.1).sum())
        for name in sprites.BACKGROUNDS
    }
    return max(equal, key=lambda name: equal[name])


def color_shown(frames: Tensor, background: str) -> str:
    """Of one block: the fill, in any shade, of most pixels that are not background."""
    shown = levels(frames)
    other = (shown - sprites.background_image(background, frames.shape[-1])).abs().amax(1) > 40
    pixels = shown.movedim(1, -1)[other]
    votes = {}
    for name, value in sprites.COLORS.items():
        fill = torch.tensor(value, dtype=torch.float32)
        shade = (pixels @ fill / (fill @ fill)).clamp(1 - painting.RIM_DARKENING, 1)
        votes[name] = int(((pixels - shade[:, None] * fill).abs().amax(1) < 2).sum())
    return max(votes, key=lambda name: votes[name])


def levels(video: Tensor) -> Tensor:
    return (video + 1) * 127.5


@pytest.mark.parametrize("kind", KINDS)
def test_captions_say_what_each_block_shows(kind: Kind) -> None:
    clips = make_clips(kind, 8, 4, GEOMETRY, rng(), switch_share=0.8)
    blocks = blocks_of(clips, GEOMETRY)
    assert len(blocks) == (1 if kind == "single" else 4)
    for row, captions in enumerate(clips.captions):
        assert len(captions) == len(blocks)
        for caption, frames in zip(captions, blocks, strict=True):
            assert background_shown(frames[row]) == caption.background, (kind, row, caption)
            assert color_shown(frames[row], caption.background) == caption.color, (kind, row, caption)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_lead(kind: Kind) -> None:
    clips = make_clips(kind, 3, 4, GEOMETRY, rng(), switch_share=0.5)
    lead = 4 if kind == "gap" else 0
    frames = 12 if kind == "single" else 48 + lead
    assert clips.video.shape == (3, frames, 3, 64, 64)
    assert (clips.lead_frames, clips.kind) == (lead, kind)
    assert float(clips.video.min()) >= -1 and float(clips.video.max()) <= 1


def changes(captions: list[Caption]) -> list[int]:
    return [i for i in range(1, len(captions)) if captions[i] != captions[i - 1]]


def test_stories_change_their_prompt_once_at_any_later_block() -> None:
    switched = make_clips("story", 60, 4, SMALL, rng(), switch_share=1.0)
    assert {tuple(changes(row)) for row in switched.captions} == {(1,), (2,), (3,)}
    steady = make_clips("story", 60, 4, SMALL, rng(), switch_share=0.0)
    assert all(changes(row) == [] for row in steady.captions)
    some = make_clips("story", 400, 4, SMALL, rng(), switch_share=0.25)
    assert sum(bool(changes(row)) for row in some.captions) / 400 == pytest.approx(0.25, abs=0.06)


def test_half_of_the_gaps_come_back_to_another_scene() -> None:
    clips = make_clips("gap", 400, 4, SMALL, rng(), switch_share=0.0)
    assert all(set(changes(row)) <= {1} for row in clips.captions)
    assert sum(bool(changes(row)) for row in clips.captions) / 400 == pytest.approx(0.5, abs=0.07)
    switched = make_clips("gap", 60, 4, SMALL, rng(), switch_share=1.0)
    assert {block for row in switched.captions for block in changes(row)} == {1, 2, 3}
    # The sink is its own piece of video: what follows it goes on from somewhere else.
    blocks = blocks_of(clips, SMALL)
    jump = (blocks[1][:, 0] - blocks[0][:, -1]).abs().mean((1, 2, 3))
    stayed = torch.tensor([not changes(row) for row in clips.captions])
    smooth = (blocks[2][:, 0] - blocks[1][:, -1]).abs().mean((1, 2, 3))
    assert float(jump[stayed].mean()) > 3 * float(smooth[stayed].mean())


def test_lead_frames_belong_to_the_later_scene() -> None:
    clips = make_clips("gap", 60, 3, SMALL, rng(), switch_share=1.0)
    lead = clips.video[:, 4 : 4 + clips.lead_frames]
    for row, captions in enumerate(clips.captions):
        assert background_shown(lead[row]) == captions[1].background


def test_no_held_out_caption_is_ever_drawn() -> None:
    drawn = set()
    for seed in range(50):
        for kind in KINDS:
            clips = make_clips(kind, 40, 3, SMALL, rng(100 * len(kind) + seed), switch_share=0.5)
            drawn |= {caption for row in clips.captions for caption in row}
    assert len(drawn) > 2500
    assert not drawn & set(sprites.captions("heldout"))
    assert not any(sprites.is_held_out(caption) for caption in drawn)


def test_captions_are_drawn_evenly_from_the_split_asked_for() -> None:
    many = pick_captions(20_000, rng())
    assert set(many) <= set(sprites.captions("train")) and len(set(many)) > 4700
    assert set(pick_captions(5_000, rng(), "heldout")) == set(sprites.captions("heldout"))


@pytest.mark.parametrize("kind", KINDS)
def test_clips_are_a_function_of_the_generator(kind: Kind) -> None:
    one = make_clips(kind, 4, 3, SMALL, rng(1), 0.5)
    torch.rand(5)
    again, other = make_clips(kind, 4, 3, SMALL, rng(1), 0.5), make_clips(kind, 4, 3, SMALL, rng(2), 0.5)
    assert torch.equal(one.video, again.video) and one.captions == again.captions
    assert not torch.equal(one.video, other.video)


def test_a_painter_draws_instead() -> None:
    """Training hands in a compiled one; it gets the arguments of `paint_frames`."""
    seen = []

    def paint(*arguments: Tensor) -> Tensor:
        seen.append(arguments)
        return sprites.paint_frames(*arguments)

    for kind in KINDS:
        painted = make_clips(kind, 2, 3, SMALL, rng(), 0.5, paint)
        assert torch.equal(painted.video, make_clips(kind, 2, 3, SMALL, rng(), 0.5).video)
    assert len(seen) == 4  # a gap is two pieces
