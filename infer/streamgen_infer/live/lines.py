"""What a person types into `streamgen live`, and the keys that make a line of it. No terminal, no torch here.

a red star spinning over a snow background        a new prompt, from the next block on
8=a blue ring rising over a navy background       from the 8th second on
/pause /play /seek 4 /back 2 /steps 2 /blend 6 /help /quit        each may have SECONDS= before it, too
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from streamgen.errors import UserError
from streamgen_infer.live_view import one_line
from streamgen_infer.stream_options import MAX_STEPS, TRANSITIONS

MAX_BLEND_BLOCKS = 64
HELP = (
    "type a prompt and Enter; 8=PROMPT: from the 8th second on; /pause  /play  /seek SECONDS  /back SECONDS  "
    "/steps N|auto  /cut  /recache  /scene  /blend BLOCKS  /quit"
)
# command -> what follows it: nothing, a number, or a number that may be left out
_PLAIN = ("pause", "play", "quit", "help", "cut", "recache", "scene")
_WITH_NUMBER = ("seek", "back", "steps", "blend")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line understood: a prompt, or a command with its number."""

    command: str
    """"prompt", or the command's name without its slash."""
    text: str = ""
    number: float | None = None
    """Seconds of seek and back, steps (None: auto), blocks of blend."""
    at_s: float | None = None
    """Media time from which it holds; None: at once."""


def parse_line(text: str) -> Line:
    """One typed line; UserError for what is none."""
    at_s, rest = _split_time(text.strip())
    if not rest:
        raise UserError(f"nothing to show: {HELP}")
    if not rest.startswith("/"):
        return Line(command="prompt", text=rest, at_s=at_s)
    name, _, argument = rest[1:].partition(" ")
    name, argument = name.lower(), argument.strip()
    if name in _PLAIN and not argument:
        return Line(command=name, at_s=at_s)
    if name in _PLAIN:
        raise UserError(f"/{name} takes nothing after it, not {one_line(argument, 40)!r}")
    if name not in _WITH_NUMBER:
        raise UserError(f"/{one_line(name, 40)} does not exist; {HELP}")
    return Line(command=name, number=_number(name, argument), at_s=at_s)


def _split_time(text: str) -> tuple[float | None, str]:
    """SECONDS=REST, or REST alone."""
    found = re.match(r"(\d+(?:\.\d*)?|\.\d+)\s*=\s*(.*)", text, re.DOTALL)
    return (None, text) if found is None else (float(found[1]), found[2])


def _number(name: str, argument: str) -> float | None:
    if name == "steps" and argument == "auto":
        return None
    if name == "blend" and not argument:
        return 4
    try:
        value = float(argument)
    except ValueError:
        value = math.nan
    low, high, whole = {
        "seek": (0.0, math.inf, False),
        "back": (0.0, math.inf, False),
        "steps": (1.0, MAX_STEPS, True),
        "blend": (1.0, MAX_BLEND_BLOCKS, True),
    }[name]
    if not (math.isfinite(value) and low <= value <= high) or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        limit = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        also = ", or auto" if name == "steps" else ""
        raise UserError(f"/{name} {one_line(argument, 40)!r}: give {kind} {limit}{also}")
    return value


@dataclass(slots=True)
class Manner:
    """How the next prompts take over."""

    transition: str = "recache"
    blend_blocks: int = 4

    def obey(self, line: Line) -> bool:
        """Whether the line was a transition."""
        if line.command not in TRANSITIONS:
            return False
        self.transition = line.command
        if line.number is not None:
            self.blend_blocks = int(line.number)
        return True


@dataclass(slots=True)
class Editor:
    """The line being typed, as a function of the bytes that a terminal in cbreak mode sends."""

    text: str = ""
    cursor: int = 0
    history: list[str] = field(default_factory=list)
    _place: int = 0
    """In `history`, counted from its end; 0 is the line being typed."""
    _draft: str = ""
    _pending: bytes = b""
    """A key or a character that has not arrived whole."""

    def feed(self, data: bytes) -> list[str]:
        """Take keys; the lines that Enter ended, in order."""
        lines = []
        data, self._pending = self._pending + data, b""
        while data:
            key, data = _next_key(data)
            if not key:
                self._pending = data
                break
            if key in (b"\r", b"\n"):
                lines.append(self._enter())
            else:
                self._key(key)
        return lines

    def _enter(self) -> str:
        line = self.text
        if line.strip() and (not self.history or self.history[-1] != line):
            self.history.append(line)
        self.text, self.cursor, self._place, self._draft = "", 0, 0, ""
        return line

    def _key(self, key: bytes) -> None:
        before, after = self.text[: self.cursor], self.text[self.cursor :]
        match key:
            case b"\x7f" | b"\x08":
                self._set(before[:-1], after)
            case b"\x1b[3~" | b"\x04":
                self._set(before, after[1:])
            case b"\x15":
                self._set("", after)
            case b"\x0b":
                self._set(before, "")
            case b"\x17":
                self._set(re.sub(r"\S*\s*$", "", before), after)
            case b"\x1b[D" | b"\x02":
                self.cursor = max(0, self.cursor - 1)
            case b"\x1b[C" | b"\x06":
                self.cursor = min(len(self.text), self.cursor + 1)
            case b"\x1b[H" | b"\x01":
                self.cursor = 0
            case b"\x1b[F" | b"\x05":
                self.cursor = len(self.text)
            case b"\x1b[A":
                self._recall(self._place + 1)
            case b"\x1b[B":
                self._recall(self._place - 1)
            case _:
                typed = key.decode("utf-8", "replace")
                if typed.isprintable():
                    self._set(before + typed, after)

    def _set(self, before: str, after: str) -> None:
        self.text, self.cursor = before + after, len(before)

    def _recall(self, place: int) -> None:
        if not 0 <= place <= len(self.history):
            return
        if self._place == 0:
            self._draft = self.text
        self._place = place
        self.text = self._draft if place == 0 else self.history[-place]
        self.cursor = len(self.text)


def _next_key(data: bytes) -> tuple[bytes, bytes]:
    """The first key and the rest; no key when its bytes are not all there."""
    if data[:1] == b"\x1b":
        found = re.match(rb"\x1b(\[[0-9;]*[A-Za-z~]|O[A-Za-z])", data)
        if found:
            key = found[0].replace(b"\x1bO", b"\x1b[")
            return key, data[found.end() :]
        whole = data[:2] not in (b"\x1b", b"\x1b[", b"\x1bO") and not re.fullmatch(rb"\x1b\[[0-9;]*", data)
        return (data[:1], data[1:]) if whole else (b"", data)
    lead = data[0]
    length = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    return (b"", data) if len(data) < length else (data[:length], data[length:])
