"""One frame -> one payload of a binary message: JPEG, WebP, fragmented MP4 or raw RGB.

Frames are uint8 RGB [height, width, 3]. The MP4 encoder lives as long as a connection: H.264 loses its compression and
its first-frame delay with every restart.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from streamgen_infer.protocol import Format

if TYPE_CHECKING:
    import numpy as np

KEYFRAME_EVERY_S = 2.0


class FrameEncoder(Protocol):
    @property
    def mime(self) -> str: ...

    def opening(self) -> bytes:
        """Bytes that come once, before the first frame; often none."""

    def encode(self, rgb_HWC: np.ndarray) -> bytes: ...

    def close(self) -> None: ...


class Picture:
    """JPEG (4:2:0) or WebP, each frame by itself."""

    def __init__(self, name: str, quality: int) -> None:
        self.options: dict[str, Any] = {"format": name, "quality": quality}
        self.mime = f"image/{name.lower()}"
        if name == "WEBP":
            self.options["method"] = 0  # 5 times as quick as the default, a sixth larger

    def opening(self) -> bytes:
        return b""

    def encode(self, rgb_HWC: np.ndarray) -> bytes:
        from PIL import Image

        memory = io.BytesIO()
        Image.fromarray(rgb_HWC).save(memory, **self.options)
        return memory.getvalue()

    def close(self) -> None:
        return


class Rgb:
    mime = "application/octet-stream"

    def opening(self) -> bytes:
        return b""

    def encode(self, rgb_HWC: np.ndarray) -> bytes:
        return rgb_HWC.tobytes()

    def close(self) -> None:
        return


class FragmentedMp4:
    """H.264 (ISO 14496-12, 8.8): an opening, then one fragment per frame, time stamps without holes."""

    def __init__(self, height: int, width: int, fps: float) -> None:
        from streamgen_infer.encoders import Mp4, Video

        self.memory = io.BytesIO()
        self.lock = threading.Lock()
        """A connection may end while a thread encodes its frame."""
        self.mp4 = Mp4(self.memory, Video(height=height, width=width, fps=fps))
        self.gop_frames = max(1, round(KEYFRAME_EVERY_S * fps))
        self.head = self._drain()
        profile = self.head.index(b"avcC") + 5  # ISO 14496-15, 5.3.3.1: version, then profile, its limits, level
        self.mime = f'video/mp4; codecs="avc1.{self.head[profile : profile + 3].hex()}"'

    def opening(self) -> bytes:
        return self.head

    def encode(self, rgb_HWC: np.ndarray) -> bytes:
        with self.lock:
            self.mp4.write(rgb_HWC[None], keyframe=self.mp4.frames % self.gop_frames == 0)
            return self._drain()

    def close(self) -> None:
        with self.lock:
            self.mp4.finish()

    def _drain(self) -> bytes:
        data = self.memory.getvalue()
        self.memory.seek(0)
        self.memory.truncate()
        return data


def new_encoder(name: Format, *, height: int, width: int, fps: float, quality: int) -> FrameEncoder:
    """The encoder of one connection."""
    makers: dict[Format, Callable[[], FrameEncoder]] = {
        "jpeg": lambda: Picture("JPEG", quality),
        "webp": lambda: Picture("WEBP", quality),
        "m4s": lambda: FragmentedMp4(height, width, fps),
        "rgb": Rgb,
    }
    return makers[name]()
