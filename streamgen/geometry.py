"""Pixels -> latent grid -> tokens, and frames <-> blocks: the only place where such a number is computed.

A *latent frame* is one temporal position of the codec. Latent frame 0 covers `first_latent_frames` pixel frames (1 is
Wan's rule, `temporal_stride` the sprites codec's), every later one covers `temporal_stride`. A *block* is the group of
latent frames that is denoised together; block 0 may be shorter (an image as first block). All indices count from 0.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoGeometry:
    """The shape of one video stream. `height` and `width` are pixels, `fps` is pixel frames per second."""

    height: int
    width: int
    latent_channels: int
    fps: float = 16.0
    spatial_stride: int = 8
    temporal_stride: int = 4
    first_latent_frames: int = 4
    """Pixel frames that latent frame 0 decodes to."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns per token."""
    block_frames: int = 3
    """Latent frames per block."""
    first_block_frames: int | None = None
    """Latent frames of block 0; None means `block_frames`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))  # JSON has lists only
        for name in ("height", "width", "latent_channels", "spatial_stride", "temporal_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps={self.fps}: must be a finite number above 0")
        if not 1 <= self.first_latent_frames <= self.temporal_stride:
            raise ValueError(
                f"first_latent_frames={self.first_latent_frames}: must be 1 (Wan) to "
                f"temporal_stride={self.temporal_stride}"
            )
        if len(self.patch) != 3 or self.patch[0] != 1 or min(self.patch) < 1:
            raise ValueError(f"patch={self.patch}: must be (1, rows, columns), each at least 1")
        for name, size, patch in (
            ("height", self.height, self.patch[1]),
            ("width", self.width, self.patch[2]),
        ):
            if size % (self.spatial_stride * patch):
                raise ValueError(f"{name}={size}: must be a multiple of {self.spatial_stride * patch} pixels")
        if self.block_frames < 1:
            raise ValueError(f"block_frames={self.block_frames}: must be at least 1 latent frame")
        if self.first_block_frames is not None and not 1 <= self.first_block_frames <= self.block_frames:
            raise ValueError(
                f"first_block_frames={self.first_block_frames}: must be 1 to block_frames={self.block_frames}, "
                "or None for the same"
            )

    # The spatial grid.

    @property
    def latent_height(self) -> int:
        return self.height // self.spatial_stride

    @property
    def latent_width(self) -> int:
        return self.width // self.spatial_stride

    @property
    def grid_height(self) -> int:
        """Rows of tokens."""
        return self.latent_height // self.patch[1]

    @property
    def grid_width(self) -> int:
        """Columns of tokens."""
        return self.latent_width // self.patch[2]

    @property
    def tokens_per_frame(self) -> int:
        return self.grid_height * self.grid_width

    def tokens(self, frames: int) -> int:
        """Tokens of `frames` latent frames."""
        return frames * self.tokens_per_frame

    # Blocks of latent frames.

    def block_size(self, block: int) -> int:
        """Latent frames of a block."""
        return self._first_block if block == 0 else self.block_frames

    def block_start(self, block: int) -> int:
        """First latent frame of a block; of block n also the number of latent frames in n blocks."""
        return 0 if block == 0 else self._first_block + (block - 1) * self.block_frames

    def block_of_latent(self, latent: int) -> int:
        """The block that holds a latent frame."""
        return 0 if latent < self._first_block else 1 + (latent - self._first_block) // self.block_frames

    # Pixel frames.

    def pixel_start(self, latent: int) -> int:
        """First pixel frame of a latent frame; of latent n also the number of pixel frames in n latent frames."""
        return 0 if latent == 0 else self.first_latent_frames + (latent - 1) * self.temporal_stride

    def pixel_frames(self, latent_start: int, latent_stop: int) -> int:
        """Pixel frames of the latent frames [latent_start, latent_stop)."""
        return self.pixel_start(latent_stop) - self.pixel_start(latent_start)

    def block_pixel_start(self, block: int) -> int:
        """First pixel frame of a block."""
        return self.pixel_start(self.block_start(block))

    def block_pixel_frames(self, block: int) -> int:
        """Pixel frames of a block."""
        return self.block_pixel_start(block + 1) - self.block_pixel_start(block)

    # Seconds of media time.

    def block_at_seconds(self, seconds: float) -> int:
        """The first block whose first pixel frame is shown at or after `seconds`."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"seconds={seconds}: must be finite and at least 0")
        frames = math.ceil(seconds * self.fps - 1e-6)  # 0.1 s at 30 fps is 3 frames, whatever the float says
        if frames <= 0:
            return 0
        latents = 1 + max(0, -(-(frames - self.first_latent_frames) // self.temporal_stride))
        return 1 + max(0, -(-(latents - self._first_block) // self.block_frames))

    def blocks_for_seconds(self, seconds: float) -> int:
        """The number of blocks that cover `seconds` of video (0 for 0 seconds)."""
        return self.block_at_seconds(seconds)  # n blocks cover the time at which block n starts

    @property
    def _first_block(self) -> int:
        return self.block_frames if self.first_block_frames is None else self.first_block_frames
