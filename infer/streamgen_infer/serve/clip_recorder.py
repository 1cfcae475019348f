"""A clip of what a viewer is shown: mp4, webm or gif, written while it is shown, in a thread of its own."""

from __future__ import annotations

import queue
import secrets
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamgen_infer.encoders import ENCODERS, Video

if TYPE_CHECKING:
    import numpy as np

PIECE_FRAMES = 16
MAX_CLIP_BYTES = 256 * 2**20
MAX_WAITING_FRAMES = 512
"""Slower disks than that end the clip rather than fill the memory."""


class ClipRecorder:
    """Give it frames (uint8 RGB [H, W, 3]) by `add`, which never blocks; `finish` gives the file."""

    def __init__(self, folder: Path, format: str, geometry: Any, fps: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{secrets.token_hex(8)}.{format}"
        self.part = self.path.with_suffix(f".part.{format}")
        self.video = Video(height=geometry.height, width=geometry.width, fps=fps)
        self.frames, self.full, self._over = 0, False, False
        self.error: Exception | None = None
        self._waiting: queue.Queue[np.ndarray | None] = queue.Queue(MAX_WAITING_FRAMES)
        self._thread = threading.Thread(target=self._run, name="clip", daemon=True)
        self._thread.start()

    def add(self, rgb_HWC: np.ndarray) -> None:
        if self.full:
            return
        try:
            self._waiting.put_nowait(rgb_HWC)
        except queue.Full:
            self.full = True

    def finish(self) -> Path | None:
        """The closed file, None if nothing was given; raises what the writing ran into."""
        self.full = True
        self._waiting.put(None)
        self._thread.join()
        if self.error is not None:
            self.part.unlink(missing_ok=True)
            raise self.error
        return self.path if self.frames else None

    def _run(self) -> None:
        try:
            with self.part.open("wb") as file:
                encoder = ENCODERS[self.path.suffix](file, self.video)
                while piece := self._piece():
                    self._write(encoder, piece)
                    self.full = self.full or file.tell() > MAX_CLIP_BYTES
                if self.frames:
                    encoder.finish()
            if self.frames:
                self.part.replace(self.path)
            else:
                self.part.unlink()
        except Exception as error:  # noqa: BLE001 (raised again by `finish`, in the thread that waits)
            self.error, self.full = error, True
            while not self._over and self._waiting.get() is not None:
                pass

    def _write(self, encoder: Any, piece: list[np.ndarray]) -> None:
        import numpy as np

        encoder.write(np.stack(piece))
        self.frames += len(piece)

    def _piece(self) -> list[np.ndarray]:
        """About a second of frames; fewer at the end, none after it."""
        piece: list[np.ndarray] = []
        while not self._over and len(piece) < PIECE_FRAMES:
            frame = self._waiting.get()
            if frame is None:
                self._over = True
            else:
                piece.append(frame)
        return piece
