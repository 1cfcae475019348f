"""Streams that begin with an image: it is committed as encoded, and what follows equals a program written out."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from streamgen.errors import UserError
from streamgen.flow import renoise
from streamgen.images import open_image
from streamgen.pipeline import StreamPipeline
from streamgen.pixels import to_uint8
from tests.tiny_model import save_tiny_model

STAR = "a red star spinning over a snow background"
RING = "a blue ring rising over a navy background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("images") / "m")


def piped(folder: Path, **card: object) -> StreamPipeline:
    pipe = StreamPipeline.from_pretrained(folder, dtype="fp32")
    pipe.scheduler = dataclasses.replace(pipe.scheduler, **card)  # type: ignore[arg-type]
    return pipe


def picture(height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pipe: StreamPipeline, image: np.ndarray) -> Tensor:
    """Four equal frames through the codec."""
    frame = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
    return pipe.codec.encode(torch.stack([frame] * 4)[None])


def slow(pipe: StreamPipeline, image: np.ndarray, blocks: int, seed: int, inside: bool) -> list[Tensor]:
    """The latents of a stream from an image, with the model and a cache alone."""
    model, cache, sigmas = pipe.transformer, pipe.new_cache("relative"), pipe.sampling(2).sigmas
    text = model.encode_text(pipe.text.encode([STAR])[:, None])
    latent, context = encoded(pipe, image), pipe.scheduler.context_noise
    noises = pipe.stream(STAR, seed=seed).state  # blocks of three
    single = dataclasses.replace(pipe.geometry, first_block_frames=1)
    made, start = [], 0
    for block in range(blocks):
        size = 1 if block == 0 and not inside else 3
        handle = cache.begin(start, size)
        clean = 1 if block == 0 else 0
        levels = torch.zeros(1, size)
        if size == 1:
            x = latent
        else:
            x = noises.noise(0, block)
            for step, sigma in enumerate(sigmas):
                if clean:
                    x = torch.cat([latent, x[:, 1:]], 1)
                levels[:, clean:] = 1000 * sigma
                x = x - sigma * model(x, levels, text, cache=handle)
                if step == 0:
                    x = renoise(x, noises.noise(1, block), sigmas[1])
            if clean:
                x = torch.cat([latent, x[:, 1:]], 1)
        kept = x
        if context and size > clean:
            kept = renoise(x, noises.noise(2, block), context)
            kept = torch.cat([x[:, :clean], kept[:, clean:]], 1)
        levels[:, :clean], levels[:, clean:] = 0, 1000 * context
        model(kept, levels, text, cache=handle)
        cache.commit(handle)
        made.append(x)
        start += size
    assert start == (pipe.geometry if inside else single).block_start(blocks)
    return made


@torch.no_grad()
@pytest.mark.parametrize("context_noise", [0.0, 0.1])
@pytest.mark.parametrize("place", ["block", "frame"])
def test_equals_a_program_written_out(folder: Path, place: str, context_noise: float) -> None:
    pipe, image = piped(folder, image=place, context_noise=context_noise), picture()
    stream = pipe.stream(STAR, seed=6, image=image)
    latents: list[Tensor] = []
    decode = stream.begin_decode
    stream.begin_decode = lambda x: latents.append(x) or decode(x)  # type: ignore[method-assign,func-returns-value]
    first = next(stream)
    assert torch.equal(latents[0][:, :1], encoded(pipe, image))
    assert torch.equal(stream.state.recent[0], encoded(pipe, image)[:, 0])
    assert len(first.frames) == (4 if place == "block" else 12)
    shown = to_uint8(pipe.codec.decode(encoded(pipe, image)))[0].numpy()
    assert np.array_equal(first.frames[:4], shown)
    rest = [next(stream) for _ in range(5)]
    assert {len(block.frames) for block in rest} == {12}
    for one, other in zip(latents, slow(pipe, image, 6, 6, place == "frame"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["block", "frame"])
def test_the_image_changes_what_follows_and_the_stream_is_saved(folder: Path, place: str) -> None:
    pipe = piped(folder, image=place)

    def begun(seed: int) -> list[np.ndarray]:
        stream = pipe.stream(STAR, seed=1, image=picture(seed=seed))
        return [next(stream).frames for _ in range(3)]

    assert not np.array_equal(begun(0)[2], begun(1)[2])
    stream = pipe.stream(STAR, seed=1, image=picture())
    with pytest.raises(UserError, match="saved after its first block"):
        stream.state_dict()
    with pytest.raises(UserError, match="shares no launches"):
        stream.begin()
    start_s = 4 / 16 if place == "block" else 12 / 16
    receipt = stream.prompt(RING, at_seconds=start_s)
    assert (receipt.block, receipt.seconds) == (1, start_s)
    next(stream)
    saved = stream.state_dict()
    expected = [next(stream).frames for _ in range(4)]
    again = pipe.resume(saved)
    assert again.geometry == stream.geometry
    assert all(np.array_equal(next(again).frames, frames) for frames in expected)


def test_guidance_from_an_image_keeps_both_rows_on_it(folder: Path) -> None:
    pipe = piped(folder, image="frame", guidance=2.0, sampler="unipc")
    stream = pipe.stream(STAR, steps=4, image=picture())
    next(stream)
    assert torch.equal(stream.state.recent[0], encoded(pipe, picture())[:, 0])
    plain = piped(folder, image="frame", sampler="unipc").stream(STAR, steps=4, image=picture())
    next(plain)
    rows, row = stream.state.cache.state_dict()["v"], plain.state.cache.state_dict()["v"]
    first = slice(0, pipe.geometry.tokens_per_frame)
    torch.testing.assert_close(rows[:1, :1, :, first], row[:1, :, :, first])
    assert not torch.allclose(rows[1, 0], rows[1, 1], atol=1e-3)


def test_images_are_scaled_to_cover_and_cut(tmp_path: Path) -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = (200, 10, 30)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for source in (tmp_path / "wide.png", str(tmp_path / "wide.png"), Image.fromarray(wide), wide):
        assert (open_image(source, 32, 32) == (200, 10, 30)).all()
    same = picture()
    assert np.array_equal(open_image(same, 32, 32), same)
    Image.fromarray(wide).convert("P").save(tmp_path / "palette.gif")
    assert open_image(tmp_path / "palette.gif", 16, 16).shape == (16, 16, 3)


def test_a_turned_a_transparent_and_a_deep_picture_look_as_they_do_elsewhere(tmp_path: Path) -> None:
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turned clockwise: stored with the top on the left
    lying = Image.fromarray(np.rot90(upright).copy())
    lying.save(tmp_path / "phone.png", exif=exif)
    with Image.open(tmp_path / "phone.png") as opened:
        for source in (tmp_path / "phone.png", opened):
            assert np.array_equal(open_image(source, 32, 32), upright)

    hidden = np.zeros((32, 32, 4), np.uint8)
    hidden[:, :16] = (0, 0, 200, 255)
    hidden[:, 16:] = (90, 90, 90, 0)
    for name in ("glass.png", "glass.webp"):
        Image.fromarray(hidden).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        shown = open_image(tmp_path / name, 32, 32)
        assert (shown[:, :16] == (0, 0, 200)).all() and (shown[:, 16:] == 255).all()
    palette = Image.fromarray(np.tile(np.array([0, 1], np.uint8).repeat(16), (32, 1)), "P")
    palette.putpalette([9, 9, 9, 0, 200, 0])
    palette.save(tmp_path / "holes.gif", transparency=0)
    shown = open_image(tmp_path / "holes.gif", 32, 32)
    assert (shown[:, :16] == 255).all() and (shown[:, 16:] == (0, 200, 0)).all()

    deep = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    shown = open_image(tmp_path / "deep.png", 32, 32)
    assert np.array_equal(shown, np.round(deep / 257).astype(np.uint8)[..., None].repeat(3, 2))


def test_any_size_and_shape_becomes_the_streams(tmp_path: Path) -> None:
    for height, width in ((1, 1), (1, 500), (500, 3), (31, 33), (700, 400)):
        Image.fromarray(picture(height, width)).save(tmp_path / "any.png")
        assert open_image(tmp_path / "any.png", 32, 48).shape == (32, 48, 3)
    ramp = np.arange(96, dtype=np.uint8).repeat(32).reshape(96, 32).T[..., None].repeat(3, 2)
    cut = open_image(ramp, 32, 32)  # as high as wanted: nothing is scaled, the middle third is left
    assert np.array_equal(cut, ramp[:, 32:64])


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
def test_broken_files_are_refused_in_one_line_or_shown(suffix: str, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / f"broken.{suffix}"
    Image.fromarray(picture(40, 40)).save(path)
    whole, refused = path.read_bytes(), 0
    for trial in range(60):
        content = bytearray(whole)
        if trial % 2:
            content = content[: rng.integers(len(content))]
        else:
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        with warnings.catch_warnings(action="ignore"):
            try:
                assert open_image(path, 32, 32).shape == (32, 32, 3)
            except UserError as error:
                refused += "is no image that can be read" in str(error)
    assert refused >= 25


def test_mistakes_are_said(folder: Path, tmp_path: Path) -> None:
    pipe = piped(folder)
    (tmp_path / "text.png").write_text("no picture")
    for image, said in (
        (tmp_path / "none.png", "there is no image"),
        (tmp_path / "text.png", "is no image that can be read"),
        (tmp_path, "is no image that can be read"),
        (np.zeros((4, 4), np.uint8), "it must be uint8"),
        (np.zeros((4, 4, 3), np.float32), "it must be uint8"),
        (np.zeros((4, 4, 4), np.uint8), r"uint8 \[4, 4, 4\]; it must be uint8 \[height, width, 3\], RGB"),
        (torch.zeros(3, 4, 4), "the image is a Tensor; it must be a file"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "of mode F; save it with 8 or 16 bits"),
    ):
        with pytest.raises(UserError, match=said):
            pipe.stream(STAR, image=image)
    with warnings.catch_warnings(action="ignore"), pytest.raises(UserError, match="block after block"):
        pipe.stream(STAR, image=picture(), visibility="same_level")
    with pytest.raises(ValueError, match="image='clip': must be one of block, frame"):
        piped(folder, image="clip")
