"""An image as the beginning of a stream: its latent is block 0, or the first latent frame of block 0.

The causal models continue an image that is in their cache as if they had made it (Self-Forcing, arXiv 2506.08009;
block 0 alone in Causal-Forcing); the 5B models keep it inside the first block, clean among noisy frames (LongLive 2).
CLIP-conditioned image models (Wan's I2V-14B) are something else and not run here.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streamgen.codec import StreamingCodec
from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry

if TYPE_CHECKING:
    from PIL import Image


def image_geometry(geometry: VideoGeometry, place: str) -> VideoGeometry:
    """The geometry of a stream that begins with an image; place: `SchedulerConfig.image`."""
    return replace(geometry, first_block_frames=1) if place == "block" else geometry


@torch.no_grad()
def image_latents(codec: StreamingCodec, geometry: VideoGeometry, image: Any, device: torch.device) -> Tensor:
    """An image (`open_image`) -> the latents of a video that begins with it, [1, 1, C, H, W] float32.

    It is repeated for as many frames as the first latent stands for.
    """
    pixels_HWC = torch.from_numpy(open_image(image, geometry.height, geometry.width))
    frame_CHW = pixels_HWC.to(device).movedim(-1, 0).float() / 127.5 - 1
    return codec.encode(frame_CHW.expand(1, geometry.first_latent_frames, -1, -1, -1)).float()


def open_image(image: Any, height: int, width: int) -> np.ndarray:
    """A file, a PIL image or an array uint8 [h, w, 3] -> uint8 [height, width, 3]: scaled to cover, cut at the edges
    alike on both sides. Turned as its EXIF says; what is transparent becomes white; of several pictures the first.

    UserError for what is no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise UserError(f"the image is {image.dtype} {list(image.shape)}; it must be uint8 [height, width, 3], RGB")
        picture = Image.fromarray(image)
    elif isinstance(image, str | Path | Image.Image):
        called = image if isinstance(image, str | Path) else "the image"
        try:
            # Pillow reads when it must: most of what is broken shows in the conversion.
            with nullcontext(image) if isinstance(image, Image.Image) else Image.open(Path(image)) as file:
                picture = _on_white(ImageOps.exif_transpose(file))
        except FileNotFoundError:
            raise UserError(f"there is no image {called}") from None
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{called} is no image that can be read: {error}") from error
    else:
        raise UserError(f"the image is a {type(image).__name__}; it must be a file, a PIL image or an array uint8")
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.array(picture)


def _on_white(picture: Image.Image) -> Image.Image:
    """In RGB. ValueError for numbers that say nothing of how bright they are."""
    from PIL import Image

    if picture.mode.startswith("I;16"):  # Pillow's own conversion cuts at 255
        levels = np.asarray(picture).astype(np.float32) / 257
        return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {picture.mode}; save it with 8 or 16 bits per channel")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    shown = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
