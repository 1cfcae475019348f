"""What a page of streamgen shows, read from outside: its pictures as pixels, its words, its complaints."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from streamgen.worlds import checker

TIMEOUT_MS = 30_000

# The next pictures of a canvas, as PNGs, as long as one comes in half a minute.
COLLECT = """
async ([selector, wanted]) => {
  const canvas = document.querySelector(selector);
  const seen = [];
  let last = "";
  let since = performance.now();
  while (seen.length < wanted && performance.now() - since < 30000) {
    await new Promise(requestAnimationFrame);
    const picture = canvas.toDataURL();
    if (picture === last) continue;
    seen.push((last = picture));
    since = performance.now();
  }
  return seen;
}
"""


class Sight:
    """A page that is watched."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.allowed: list[str] = []
        """Complaints that a test causes on purpose, by a part of their text."""
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", lambda message: message.type in ("error", "warning") and self._complain(message.text))
        page.on("pageerror", lambda error: self._complain(str(error)))

    def _complain(self, text: str) -> None:
        if not any(part in text for part in self.allowed):
            self.complaints.append(text)

    def __getitem__(self, selector: str) -> Any:
        return self.page.locator(selector)

    def play(self, prompt: str | None = None) -> None:
        """Type a prompt and press Enter."""
        if prompt is not None:
            self["#prompt"].fill(prompt)
        self["#prompt"].press("Enter")

    def wait(self, state: str, tile: str = ".tile[data-chosen]") -> None:
        self[f"{tile}[data-state={state}]"].wait_for()

    def caption(self, text: str, tile: str = ".tile[data-chosen]") -> None:
        """Wait until the picture on the screen is one of this prompt, by its own header."""
        self[f"{tile} .prompt-now"].filter(has_text=text).wait_for()

    def frames(self, count: int, tile: str = ".tile[data-chosen]") -> np.ndarray:
        """uint8 [count, H, W, 3]: the next pictures as they come to the screen."""
        found = self.page.evaluate(COLLECT, [f"{tile} canvas", count])
        assert len(found) == count, f"{len(found)} new pictures came, not {count}"
        return np.stack([_decoded(url) for url in found])

    def picture(self, tile: str = ".tile[data-chosen]") -> np.ndarray:
        """uint8 [H, W, 3]: the canvas as it is."""
        return _decoded(self[f"{tile} canvas"].evaluate("canvas => canvas.toDataURL()"))

    def reading(self, tile: str = ".tile[data-chosen]") -> checker.Reading:
        """What the world's checker sees in a second and a half of pictures."""
        return checker.check(self.frames(24, tile))

    def seconds(self) -> float:
        """The clock beside the transport."""
        minutes, _, rest = self["#clock"].evaluate("clock => clock.value").partition(":")
        return 60 * int(minutes) + float(rest)

    def look_at(self, second: int) -> None:
        """Look back, by the timeline's keys, and wait for the picture."""
        self["#timeline .track"].press("Home")
        for _ in range(second):
            self["#timeline .track"].press("PageUp")
        self.page.wait_for_function("s => document.querySelector('#clock').value === `0:0${s}.0`", arg=second)

    def later_than(self, seconds: float) -> None:
        """Wait until the clock has passed this media time."""
        self.page.wait_for_function(
            "limit => { const [m, s] = document.querySelector('#clock').value.split(':');"
            " return 60 * Number(m) + Number(s) > limit; }",
            arg=seconds,
        )


def _decoded(url: str) -> np.ndarray:
    data = base64.b64decode(url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
