"""The sprites world: grammar, split, motion and drawing."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from streamgen.worlds import painting, sprites
from streamgen.worlds.sprites import Caption, parse


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shown(text: str, num_frames: int, side: int = 64, seed: int = 0) -> torch.Tensor:
    """One rendered clip in 0..255, [T, 3, side, side]."""
    scenes = sprites.sample_scenes([parse(text)], rng(seed))
    return (sprites.render(scenes, num_frames, side=side)[0] + 1) * 127.5


def path(text: str, num_frames: int = 64, seed: int = 0) -> tuple[sprites.Scenes, sprites.Track]:
    scenes = sprites.sample_scenes([parse(text)], rng(seed))
    return scenes, sprites.track(scenes, torch.arange(num_frames) / 16)


def test_grammar_round_trip() -> None:
    everything = sprites.captions("all")
    assert len(everything) == len({c.text for c in everything}) == 5400
    assert all(parse(c.text) == c for c in everything)
    assert parse("  A small RED star  spinning over a snow background") == Caption(
        "a", "small", "red", "star", "spinning", "snow"
    )
    assert parse("two large blue circles moving left over a black background").count == "two"


@pytest.mark.parametrize("text", ["", "a small red star", "a small red stars spinning over a snow"])
def test_text_outside_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse(text)


def test_a_tenth_is_held_out() -> None:
    held_out, train = sprites.captions("heldout"), sprites.captions("train")
    assert len(held_out) == 557
    assert not set(held_out) & set(train)
    assert set(held_out) | set(train) == set(sprites.captions("all"))
    for attribute in sprites.ATTRIBUTES:
        values = {getattr(c, attribute) for c in sprites.captions("all")}
        assert {getattr(c, attribute) for c in held_out} == values
    with pytest.raises(ValueError, match="allowed"):
        sprites.captions("test")


def test_all_randomness_comes_from_the_generator() -> None:
    some = sprites.captions("train")[::700]
    first = sprites.render(sprites.sample_scenes(some, rng(1)), 6, side=32)
    again = sprites.render(sprites.sample_scenes(some, rng(1)), 6, side=32)
    other = sprites.render(sprites.sample_scenes(some, rng(2)), 6, side=32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_frames_depend_on_time_alone() -> None:
    scenes = sprites.sample_scenes(sprites.captions("train")[::900], rng())
    whole = sprites.render(scenes, 12, side=32)
    assert torch.equal(sprites.render(scenes, 4, side=32, start_s=0.5), whole[:, 8:])
    assert torch.allclose(sprites.render(scenes, 6, fps=8, side=32), whole[:, ::2], atol=1e-5)


def test_straight_motion_wraps_around_the_edge() -> None:
    text = "a large white circle moving right over a black background"
    scenes, track = path(text, 128)
    x, y = track.centre[0, :, 0].unbind(1)
    assert ((x >= 0) & (x < 1)).all() and (y == y[0]).all()
    steps = painting.around(x.diff())
    assert torch.allclose(steps, scenes.speed / 16, atol=1e-5)
    assert (x.diff() < 0).any()
    # Nothing is lost at the edge: a frame has as much light while the sprite crosses it.
    light = shown(text, 128).sum((1, 2, 3))
    assert float(light.std() / light.mean()) < 0.005
    middle = shown(text, 128).sum(1)
    crossing = (middle[:, :, 0] > 100).any(1) & (middle[:, :, -1] > 100).any(1)
    assert crossing.any()


@pytest.mark.parametrize(
    ("motion", "sign"),
    [("moving left", (-1, 0)), ("moving right", (1, 0)), ("rising", (0, -1)), ("falling", (0, 1))],
)
def test_straight_motions_go_their_way(motion: str, sign: tuple[int, int]) -> None:
    _, track = path(f"a small red star {motion} over a black background", 8)
    step = painting.around(track.centre[0, 1, 0] - track.centre[0, 0, 0]) * 16
    assert 0.25 <= float(step @ torch.tensor(sign, dtype=torch.float32)) <= 0.40
    assert float(step.abs().min()) < 1e-6


def test_bouncing_orbiting_growing_spinning() -> None:
    scenes, track = path("a small red star bouncing over a black background", 200)
    x, y = track.centre[0, :, 0].unbind(1)
    low = sprites.FLOOR - float(scenes.radius)
    assert (x == x[0]).all() and low - 0.01 < float(y.max()) <= low + 1e-6 and float(y.min()) > 0.1

    scenes, track = path("two small red stars orbiting over a black background")
    offset = track.centre[0] - 0.5
    assert torch.allclose(offset.norm(dim=-1), torch.tensor(sprites.ORBIT_RADIUS), atol=1e-5)
    assert torch.allclose(offset[:, 0], -offset[:, 1], atol=1e-5)
    phase = torch.atan2(-offset[:, 0, 1], offset[:, 0, 0])
    turned = painting.around(phase.diff() / (2 * math.pi)) * 2 * math.pi * 16
    assert torch.allclose(turned, scenes.orbit_rate, atol=1e-3)  # counter-clockwise: y is up here

    for motion, sign in (("growing", 1), ("shrinking", -1)):
        _, track = path(f"a small red star {motion} over a black background")
        radius = track.radius[0]
        low, high = sprites.RADIUS_RANGE["a"]
        assert low * 0.999 <= float(radius.min()) and float(radius.max()) <= high * 1.001
        rate = radius.log().diff() * 16
        usual = torch.isclose(rate, torch.tensor(sign * sprites.GROWTH_PER_S), atol=1e-3)
        assert (~usual).sum() in (2, 3) and (rate[~usual] * sign < 0).all()  # restarts

    scenes, track = path("a small red star spinning over a black background")
    assert torch.allclose(track.angle[0].diff() * 16, scenes.spin_rate, atol=1e-3)
    assert (track.centre[0, :, 0] == track.centre[0, 0, 0]).all()


def test_spinning_is_clockwise_on_the_screen() -> None:
    up, quarter = torch.zeros(1), torch.full((1,), 0.3)
    star = torch.tensor([sprites.SHAPES.index("star")])
    tip = torch.tensor([[[math.sin(0.3)]]]), torch.tensor([[[-math.cos(0.3)]]])  # right of the top
    assert sprites.signed_distance(*tip, torch.ones(1), quarter, star) < 0
    assert sprites.signed_distance(*tip, torch.ones(1), up, star) > 0


def polygon(shape: str) -> torch.Tensor:
    """Corners of a shape of radius 1 that stands upright, y down, in order: [C, 2]."""
    if shape == "square":
        h = painting.SQUARE_HALF
        return torch.tensor([(-h, -h), (h, -h), (h, h), (-h, h)])
    corners, far, near = {
        "triangle": (3, 2 * painting.TRIANGLE_APOTHEM, None),
        "star": (10, painting.STAR_TIP, painting.STAR_DENT),
    }[shape]
    turn = 2 * math.pi * torch.arange(corners) / corners
    radius = torch.full((corners,), far)
    if near is not None:
        radius[1::2] = near
    return torch.stack([radius * turn.sin(), -radius * turn.cos()], 1)


def distance_to_edges(points: torch.Tensor, corners: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Brute force, float64, per point: distance to the outline, is a side (no corner) nearest, is it inside."""
    start, end = corners, corners.roll(-1, 0)
    side, offset = end - start, points[:, None] - start
    along = (offset * side).sum(-1) / (side * side).sum(-1)
    distance = (offset - along.clamp(0, 1)[..., None] * side).norm(dim=-1)
    nearest, which = distance.min(1)
    foot = along.gather(1, which[:, None])[:, 0]
    crosses = (start[:, 1] > points[:, 1:]) != (end[:, 1] > points[:, 1:])
    crossing_x = start[:, 0] + (points[:, 1:] - start[:, 1]) / side[:, 1] * side[:, 0]
    inside = (crosses & (points[:, :1] < crossing_x)).sum(1) % 2 == 1
    return nearest, (foot > 0) & (foot < 1), inside


@pytest.mark.parametrize("angle", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("shape", ["square", "triangle", "star"])
def test_distance_equals_that_to_the_polygon(shape: str, angle: float) -> None:
    """Its sign everywhere, its size wherever a side is nearest (corners have the edge's line instead)."""
    kind, turned, one = torch.tensor([sprites.SHAPES.index(shape)]), torch.tensor([angle]), torch.ones(1)
    cos, sin = math.cos(angle), math.sin(angle)  # clockwise on the screen, whose y points down
    corners = polygon(shape).double() @ torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    points = torch.rand(4000, 2, generator=rng(1)) * 3 - 1.5

    def distance(at: torch.Tensor) -> torch.Tensor:
        return sprites.signed_distance(at[None, :, :1], at[None, :, 1:], one, turned, kind)[0, :, 0].double()

    found = distance(points)
    nearest, beside, inside = distance_to_edges(points.double(), corners)
    assert torch.allclose(found.abs()[beside], nearest[beside], atol=1e-5)
    clear = nearest > 1e-4
    assert torch.equal((found < 0)[clear], inside[clear])
    assert (found.abs() <= nearest + 1e-5).all() and inside.any() and beside.sum() > 1000
    assert torch.allclose(distance(corners.float()), torch.zeros(len(corners)).double(), atol=1e-6)
    assert float(corners.norm(dim=1).max()) <= sprites.SHAPE_EXTENT


def test_pairs_stay_apart_and_inside() -> None:
    pairs = [c for c in sprites.captions("heldout") if c.count == "two"]
    track = sprites.track(sprites.sample_scenes(pairs, rng()), torch.arange(32) / 16)
    apart = painting.around(track.centre[:, :, 0] - track.centre[:, :, 1]).norm(dim=-1)
    extent = 2 * track.radius * sprites.SHAPE_EXTENT
    assert float(apart.min()) > 0.44
    assert float((apart - extent).min()) > 0.02  # background in between
    straight = torch.tensor([c.motion in sprites.MOTIONS[:4] for c in pairs])
    inside = track.centre[~straight]
    reach = (track.radius * 1.12)[~straight][..., None, None]
    assert float((inside - reach).min()) > -0.01 and float((inside + reach).max()) < 1.01


@pytest.mark.parametrize("color", sprites.COLORS)
@pytest.mark.parametrize("background", sprites.BACKGROUNDS)
def test_drawing_colours(color: str, background: str) -> None:
    text = f"a large {color} circle spinning over a {background} background"
    scenes, track = path(text, 1)
    frame = shown(text, 1)[0]
    x, y = (track.centre[0, 0, 0] * 64).long().tolist()
    fill = torch.tensor(sprites.COLORS[color], dtype=torch.float32)
    assert torch.allclose(frame[:, y, x], fill, atol=0.01)
    behind = sprites.background_image(background, 64)
    far = torch.ones(64, 64, dtype=torch.bool)
    far[max(y - 15, 0) : y + 15, max(x - 15, 0) : x + 15] = False
    assert torch.allclose(frame[:, far], behind[:, far], atol=0.01)
    rim = frame[:, y, x + int(float(scenes.radius) * 64) - 1]
    assert float(rim.sum()) < float(fill.sum())  # darkened towards the rim


def test_backgrounds_are_the_documented_ones() -> None:
    def at(name: str, row: int) -> list[int]:
        return sprites.background_image(name, 64)[:, row, 16].round().int().tolist()

    assert at("black", 5) == [8, 8, 10]
    assert at("grass", 0) == [110, 175, 225] and at("grass", 63) == [30, 95, 35]
    assert at("snow", 0) == [150, 165, 190] and at("snow", 63) == [205, 215, 228]
    assert at("sunset", 0) == [71, 31, 90] and at("sunset", 63) == [249, 129, 60]
    assert at("navy", 63) == [16, 27, 94]
    with pytest.raises(ValueError, match="allowed"):
        sprites.background_image("lawn", 64)


@pytest.mark.parametrize("side", [32, 128])
def test_scenes_do_not_depend_on_the_resolution(side: int) -> None:
    some = sprites.captions("heldout")[::40]
    scenes = sprites.sample_scenes(some, rng())
    small, large = sorted((64, side))
    coarse = sprites.render(scenes, 3, side=small)
    fine = sprites.render(scenes, 3, side=large)
    fine = torch.nn.functional.avg_pool2d(fine.flatten(0, 1), 2).view_as(coarse)
    # Two ways to draw the same thing differ at outlines only.
    assert float((coarse - fine).abs().mean()) < 0.02


def test_a_switch_keeps_position_and_changes_looks_at_once() -> None:
    before = [parse("a large red circle moving right over a black background")] * 4
    texts = [
        "a large green square falling over a snow background",
        "a small white star growing over a navy background",
        "two small blue rings orbiting over a grass background",
        "a large purple triangle bouncing over a sunset background",
    ]
    after = [parse(t) for t in texts]
    at = torch.full((4,), 16)
    scenes = sprites.sample_scenes(before, rng(3))
    old = sprites.track(scenes, torch.arange(17) / 16)
    new_scenes = sprites.switch_scenes(scenes, at / 16, after, rng(4))
    new = sprites.track(new_scenes, torch.arange(33) / 16)
    moved = painting.around(new.centre[:, 0, 0] - old.centre[:, 16, 0]).abs()
    assert float(moved.max()) < 1e-5
    assert torch.allclose(new.radius[:, 0], old.radius[:, 16], atol=1e-5)
    step = painting.around(new.centre[:, 1:, 0] - new.centre[:, :-1, 0]).norm(dim=-1)
    assert float(step.max()) < (math.sqrt(2) * sprites.FOLLOW_PER_S + 1.1) / 16
    assert float(new.radius.diff(dim=1).abs()[:, :4].max()) <= (sprites.FOLLOW_PER_S + 0.15) / 16
    colors = [list(sprites.COLORS)[i] for i in new_scenes.color.tolist()]
    assert colors == [c.color for c in after]
    # Half a second later the new caption's own size is reached.
    target = sprites.RADIUS["a", "large"]
    assert abs(float(new.radius[0, 8]) / target - 1) <= sprites.RADIUS_JITTER + 1e-4

    video = sprites.render_switched([before, after], [torch.zeros(4).long(), at], 24, rng(3))
    plain = sprites.render(sprites.sample_scenes(before, rng(3)), 16)
    assert torch.equal(video[:, :16], plain)
    corner = (video[:, 16, :, 0, 0] + 1) * 127.5
    expected = torch.stack([sprites.background_image(c.background, 64)[:, 0, 0] for c in after])
    assert torch.allclose(corner[:2], expected[:2], atol=0.01)


def test_switches_at_other_frames_in_one_batch() -> None:
    items = list(sprites.captions("train")[:3])
    after = list(sprites.captions("train")[-3:])
    starts = torch.tensor([4, 8, 99])
    video = sprites.render_switched([items, after], [torch.zeros(3).long(), starts], 12, rng())
    plain = sprites.render(sprites.sample_scenes(items, rng()), 12)
    for row, start in enumerate(starts.tolist()):
        assert torch.equal(video[row, :start], plain[row, :start])
        assert start > 12 or not torch.equal(video[row, start], plain[row, start])


def test_uint8_round_trip() -> None:
    levels = torch.arange(256)
    video = (levels / 127.5 - 1).view(1, 1, 1, 256).expand(2, 3, 1, 256)
    out = sprites.to_uint8(video)
    assert out.dtype == torch.uint8 and out.shape == (2, 1, 256, 3)
    assert torch.equal(out[0, 0, :, 0], levels.to(torch.uint8))


def test_captions_are_values() -> None:
    caption = sprites.captions("all")[0]
    assert dataclasses.replace(caption, color="red") in set(sprites.captions("all"))
