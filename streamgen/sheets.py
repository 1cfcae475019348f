"""Contact sheets: several clips as rows of frames in one picture, each under its caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAPTION_HEIGHT = 13
GAP = 2
PAPER = (24, 24, 24)
INK = (235, 235, 235)


def contact_sheet(
    clips_rgb_u8: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    frames: int = 8,
    scale: int = 1,
    columns: int = 1,
) -> np.ndarray:
    """One picture, uint8 [height, width, 3].

    Each clip is uint8 [T, H, W, 3] (all of one H and W) and shows at most `frames` frames, evenly
    spaced, first and last included, `scale` times enlarged; clips fill `columns` columns row by
    row.
    """
    if not clips_rgb_u8 or len(clips_rgb_u8) != len(captions):
        raise ValueError(f"a contact sheet needs one caption per clip: {len(clips_rgb_u8)} and {len(captions)}")
    height, width = clips_rgb_u8[0].shape[1:3]
    for clip in clips_rgb_u8:
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[1:] != (height, width, 3) or not len(clip):
            raise ValueError(
                f"a clip is uint8 [frames > 0, {height}, {width}, 3] here, got {clip.dtype} {list(clip.shape)}"
            )
    shown = min(frames, max(len(clip) for clip in clips_rgb_u8))
    cell_width = shown * (width * scale + GAP) + GAP
    cell_height = CAPTION_HEIGHT + height * scale + 2 * GAP
    rows = -(-len(clips_rgb_u8) // columns)
    sheet = Image.new("RGB", (cell_width * min(columns, len(clips_rgb_u8)), cell_height * rows), PAPER)
    for index, (clip, caption) in enumerate(zip(clips_rgb_u8, captions, strict=True)):
        row, column = divmod(index, columns)
        _draw_clip(sheet, clip, caption, (column * cell_width, row * cell_height), shown, scale)
    return np.asarray(sheet)


def _draw_clip(
    sheet: Image.Image,
    clip_rgb_u8: np.ndarray,
    caption: str,
    corner: tuple[int, int],
    shown: int,
    scale: int,
) -> None:
    left, top = corner
    strip_width = shown * (clip_rgb_u8.shape[2] * scale + GAP)
    ImageDraw.Draw(sheet).text((left + GAP, top), _fit(caption, strip_width), fill=INK, font=_font())
    for place, frame in enumerate(np.linspace(0, len(clip_rgb_u8) - 1, min(shown, len(clip_rgb_u8))).round()):
        picture = Image.fromarray(clip_rgb_u8[int(frame)])
        if scale != 1:
            picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (left + GAP + place * (picture.width + GAP), top + CAPTION_HEIGHT + GAP))


def _fit(caption: str, width: int) -> str:
    """The caption cut to `width` pixels, with dots where it was cut."""
    if _font().getlength(caption) <= width:
        return caption
    while caption and _font().getlength(caption + "...") > width:
        caption = caption[:-1]
    return caption + "..."


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=10)
