"""The checker is right on rendered video, and refuses what would fake adherence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from streamgen.worlds import checker, regions, sprites
from streamgen.worlds.checker import check, obeys
from streamgen.worlds.sprites import Caption, parse

Clip = NDArray[np.uint8]
NOISE_STD = 8.0
# One per motion, over shapes, counts and backgrounds.
TEXTS = [
    "a small red star moving left over a snow background",
    "two large blue squares moving right over a navy background",
    "a large green ring rising over a grass background",
    "two small yellow triangles falling over a sunset background",
    "a small white circle bouncing over a snow background",
    "two small purple stars orbiting over a black background",
    "a large white square growing over a grass background",
    "two large red rings shrinking over a black background",
    "a small blue triangle spinning over a navy background",
]
MOVING = [t for t in TEXTS if "spinning" not in t]


def rendered(
    items: list[Caption], *, seed: int = 0, num_frames: int = 32, side: int = 64, batch: int = 32
) -> Iterator[tuple[Caption, Clip]]:
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(items), batch):
        some = items[start : start + batch]
        video = sprites.render(sprites.sample_scenes(some, generator), num_frames, side=side)
        yield from zip(some, sprites.to_uint8(video).numpy(), strict=True)


def noisy(clip: Clip, seed: int = 0, std: float = NOISE_STD) -> Clip:
    noise = np.random.default_rng(seed).standard_normal(clip.shape, dtype=np.float32) * std
    return (clip + noise).round().clip(0, 255).astype(np.uint8)


def one(text: str, seed: int = 0, num_frames: int = 32) -> tuple[Caption, Clip]:
    return next(rendered([parse(text)], seed=seed, num_frames=num_frames))


def background(caption: Caption, num_frames: int = 32, side: int = 64) -> Clip:
    image = sprites.background_image(caption.background, side).permute(1, 2, 0)
    return image.round().byte().numpy()[None].repeat(num_frames, 0)


def test_right_on_every_held_out_caption_in_noise() -> None:
    items = list(sprites.captions("heldout"))
    right: dict[str, list[bool]] = {}
    for index, (caption, clip) in enumerate(rendered(items)):
        for attribute, value in obeys(check(noisy(clip, index)), caption).items():
            right.setdefault(attribute, []).append(value)
    shares = {attribute: float(np.mean(values)) for attribute, values in right.items()}
    assert len(right["obeys"]) == 557
    assert min(shares.values()) >= 0.99, shares


@pytest.mark.parametrize("num_frames", [24, 80])
@pytest.mark.parametrize("text", TEXTS)
def test_other_window_lengths(text: str, num_frames: int) -> None:
    caption, clip = one(text, num_frames=num_frames)
    assert all(obeys(check(noisy(clip)), caption).values())


@pytest.mark.parametrize(("side", "fps"), [(128, 16.0), (64, 24.0), (64, 8.0)])
def test_other_sizes_and_rates(side: int, fps: float) -> None:
    items = [parse(t) for t in TEXTS]
    scenes = sprites.sample_scenes(items, torch.Generator().manual_seed(1))
    video = sprites.to_uint8(sprites.render(scenes, round(2 * fps), fps=fps, side=side))
    for caption, clip in zip(items, video, strict=True):
        assert all(obeys(check(clip, fps), caption).values()), (caption.text, check(clip, fps))


def test_numpy_and_torch_read_alike() -> None:
    _, clip = one(TEXTS[0])
    before = clip.copy()
    assert check(clip) == check(torch.from_numpy(clip))
    assert (clip == before).all()


@pytest.mark.parametrize("text", TEXTS)
def test_tolerates_what_models_do(text: str) -> None:
    caption, clip = one(text, seed=5)
    behind = background(caption).astype(np.float32)
    random = np.random.default_rng(0)
    soft = torch.nn.functional.avg_pool2d(
        torch.from_numpy(clip).permute(0, 3, 1, 2).float(), 2, 1, 1, count_include_pad=False
    )[..., :64, :64]
    shift = random.integers(-1, 2, (32, 2))
    damaged = {
        "soft": soft.permute(0, 2, 3, 1).numpy(),
        "off in tone": clip + np.array([14.0, -12.0, 8.0]),
        "low in contrast": 128 + 0.85 * (clip.astype(np.float32) - 128),
        "pale sprite": behind + 0.8 * (clip - behind),
        "flickering": clip + random.normal(0, 8, (32, 1, 1, 1)),
        "jittering": behind + np.stack([np.roll(f, s, (0, 1)) for f, s in zip(clip - behind, shift, strict=True)]),
        "displaced edge": np.where(
            np.abs(clip - behind).sum(-1, keepdims=True) < 6,
            background(caption)[:, np.maximum(np.arange(64) - 2, 0)],
            clip,
        ),
        "one odd frame": np.where(np.arange(32)[:, None, None, None] == 9, 255 - clip, clip),
    }
    for what, video in damaged.items():
        reading = check(noisy(video.clip(0, 255).astype(np.uint8), std=4.0))
        assert obeys(reading, caption)["obeys"], (what, reading)


@pytest.mark.parametrize("text", TEXTS)
def test_refuses_vanishing_sprites(text: str) -> None:
    caption, clip = one(text)
    behind = background(caption)
    frame = np.arange(32)[:, None, None, None]
    fade = np.clip(1.2 - frame / 16, 0, 1)
    vanishing = {
        "gone in the last fifth": np.where(frame < 26, clip, behind),
        "gone every other frame": np.where(frame % 2 == 0, clip, behind),
        "fading out": (behind + fade * (clip.astype(np.float32) - behind)).astype(np.uint8),
    }
    for what, video in vanishing.items():
        verdict = obeys(check(noisy(video)), caption)
        assert verdict.pop("background"), what
        assert not any(verdict.values()), (what, verdict)


def test_refuses_pairs_of_which_one_vanishes() -> None:
    text = "two large blue squares moving right over a navy background"
    caption, clip = one(text)
    behind = background(caption)
    late, upper = np.arange(32)[:, None, None, None] >= 24, np.arange(64)[:, None, None] < 32
    gone = np.where(late & upper, behind, clip)  # the two move one above the other
    reading = check(noisy(gone))
    assert reading.count == "two" and reading.presence == 1.0 and reading.both == 0.75
    assert not obeys(reading, caption)["obeys"]


@pytest.mark.parametrize("text", MOVING)
def test_refuses_still_shuffled_and_reversed_frames(text: str) -> None:
    caption, clip = one(text)
    still = check(noisy(clip[:1].repeat(32, 0)))
    assert not obeys(still, caption)["motion"]
    assert still.motion == ("spinning" if caption.shape in checker.STILL_SHAPES else None)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(32)
        assert not obeys(check(noisy(clip[order])), caption)["obeys"]
    if caption.motion != "bouncing":  # the one motion that is the same backwards
        assert not obeys(check(noisy(clip[::-1])), caption)["motion"]


@pytest.mark.parametrize("shape", ["square", "triangle", "star"])
def test_spinning_must_turn_clockwise_and_in_order(shape: str) -> None:
    _, clip = one(f"a large red {shape} spinning over a black background")
    assert check(noisy(clip)).motion == "spinning"
    for video in (
        clip[:1].repeat(32, 0),
        clip[::-1],
        clip[np.random.default_rng(0).permutation(32)],
    ):
        reading = check(noisy(video))
        assert reading.motion is None and reading.shape == shape


@pytest.mark.parametrize("name", sprites.BACKGROUNDS)
def test_refuses_empty_backgrounds(name: str) -> None:
    caption = Caption("a", "small", "red", "star", "spinning", name)
    reading = check(noisy(background(caption)))
    assert reading == checker.Reading(background=name)
    verdict = obeys(reading, caption)
    assert verdict.pop("background") and not any(verdict.values())


def test_refuses_noise() -> None:
    random = np.random.default_rng(0)
    uniform = random.integers(0, 256, (32, 64, 64, 3), dtype=np.uint8)
    assert check(uniform) == checker.Reading()
    strong = noisy(background(parse(TEXTS[0])), std=70.0)
    reading = check(strong)
    assert not any(obeys(reading, c)["obeys"] for c in sprites.captions("heldout"))


def test_obeys_needs_everything_but_size() -> None:
    caption = parse(TEXTS[0])
    values = {a: getattr(caption, a) for a in sprites.ATTRIBUTES}
    full = checker.Reading(**values, presence=1.0)
    assert all(obeys(full, caption).values())
    for attribute in sprites.ATTRIBUTES:
        verdict = obeys(checker.Reading(**{**values, attribute: None}, presence=1.0), caption)
        assert not verdict[attribute]
        assert verdict["obeys"] == (attribute == "size")


def test_presence_rule() -> None:
    single, pair = parse(TEXTS[0]), parse(TEXTS[1])
    for caption, presence, both, present in (
        (single, 0.90, 0.0, True),
        (single, 0.89, 0.0, False),
        (pair, 1.0, 0.85, True),
        (pair, 1.0, 0.84, False),
    ):
        values = {a: getattr(caption, a) for a in sprites.ATTRIBUTES}
        verdict = obeys(checker.Reading(**values, presence=presence, both=both), caption)
        assert verdict["background"] and verdict["obeys"] == verdict["count"] == present


def test_size_does_not_apply_while_it_changes() -> None:
    caption, clip = one("a large white square growing over a grass background")
    reading = check(noisy(clip))
    assert reading.size is None
    assert obeys(reading, caption)["size"]


def test_components_on_the_torus() -> None:
    mask = np.zeros((2, 16, 16), bool)
    mask[0, :2, 3:6] = mask[0, -2:, 3:6] = True  # around the top and bottom
    mask[0, 7:9, :3] = mask[0, 7:9, -2:] = True  # around the sides
    mask[1, 3, 3] = mask[1, 4, 4] = True  # diagonal
    mask[1, 8, 8:14] = mask[1, 10, 8:14] = mask[1, 9, 8] = True  # joined at one end
    mask[1, 12, 1] = True
    pixel, owner, number = regions.components(mask)
    assert number == 5
    assert sorted(np.bincount(owner).tolist()) == [1, 2, 10, 12, 13]
    assert (np.sort(pixel) == np.flatnonzero(mask)).all()
    first = owner[mask.reshape(-1)[: 16 * 16].nonzero()[0].size :]
    assert set(first.tolist()).isdisjoint(owner[: len(owner) - len(first)].tolist())


def test_components_equal_a_flood_fill() -> None:
    mask = np.random.default_rng(1).random((3, 12, 12)) < 0.4
    mask[:, :, 0] = mask[:, :, -1] = False  # diagonals across the side edge are not joined
    pixel, owner, number = regions.components(mask)
    label = np.full(mask.size, -1)
    label[pixel] = owner
    seen: set[int] = set()
    filled = 0
    for start in pixel.tolist():
        if start in seen:
            continue
        filled += 1
        stack = [start]
        while stack:
            at = stack.pop()
            if at in seen:
                continue
            seen.add(at)
            assert label[at] == label[start]
            frame, y, x = np.unravel_index(at, mask.shape)
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    near = (frame, (y + dy) % 12, (x + dx) % 12)
                    if mask[near]:
                        stack.append(int(np.ravel_multi_index(near, mask.shape)))
    assert filled == number


@pytest.mark.parametrize(
    ("frames", "what"),
    [
        (np.zeros((32, 64, 48, 3), np.uint8), "shape"),
        (np.zeros((32, 3, 64, 64), np.uint8), "shape"),
        (np.zeros((32, 64, 64, 3), np.float32), "dtype"),
        (np.zeros((4, 64, 64, 3), np.uint8), "at least"),
    ],
)
def test_bad_input_is_named(frames: NDArray[np.generic], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        check(frames)
