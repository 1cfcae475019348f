"""Broken clips: named, counted, skipped, and too many of them refused."""

from __future__ import annotations

import fcntl
import json
import sys
import threading
from pathlib import Path

from streamgen.errors import UserError

BROKEN_FILE = "broken.jsonl"


class Broken:
    """What is broken in one source: found when it was indexed (of all clips), then by decoding (of those tried).

    Only tells and judges. Whether a clip is used never depends on what was found before: a start that continues
    another must do the same.
    """

    def __init__(self, max_share: float, min_tries: int, log_dir: Path | None) -> None:
        self.reasons: dict[str, str] = {}
        """Name -> what is wrong with it."""
        self._max_share, self._min_tries, self._log_dir = max_share, min_tries, log_dir
        self._indexed = self._indexed_broken = 0
        self._tried: set[str] = set()
        self._lock = threading.Lock()

    def index(self, found: dict[str, str], total: int) -> None:
        """Note what is broken of all `total` clips; UserError if it is too much."""
        self._indexed, self._indexed_broken = total, len(found)
        self.reasons |= found
        self._log(found)
        if found:
            name, reason = next(iter(found.items()))
            print(f"{len(found)} of {total} clips are broken and left out; {name}: {reason}", file=sys.stderr)
        if total >= self._min_tries:
            self._judge(len(found) / total, f"{len(found)} of {total} clips")

    def tried(self, name: str, reason: str | None) -> None:
        """Note that a clip was decoded, or why it could not be; UserError if that is too much of those tried."""
        with self._lock:
            self._tried.add(name)
            if reason is not None and name not in self.reasons:
                self.reasons[name] = reason
                self._log({name: reason})
                print(f"skipping {name}: {reason}", file=sys.stderr)
            decoded_broken = len(self.reasons) - self._indexed_broken
            if len(self._tried) >= self._min_tries:
                before = self._indexed_broken / self._indexed
                share = before + (1 - before) * decoded_broken / len(self._tried)
                self._judge(share, f"{decoded_broken} of {len(self._tried)} clips decoded so far")

    def _judge(self, share: float, what: str) -> None:
        if share <= self._max_share:
            return
        some = "; ".join(f"{name}: {reason}" for name, reason in list(self.reasons.items())[-3:])
        place = f" (all in {self._log_dir / BROKEN_FILE})" if self._log_dir is not None else ""
        raise UserError(
            f"{what} are broken, {100 * share:.3g} % of the source, and max_broken_share={self._max_share} allows "
            f"{100 * self._max_share:.3g} %: repair or remove them, or allow more. {some}{place}"
        )

    def _log(self, found: dict[str, str]) -> None:
        """One line of broken.jsonl for each that is not there yet; all processes of a run write to one file."""
        if self._log_dir is None or not found:
            return
        self._log_dir.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"file": name, "reason": reason}) for name, reason in found.items()]
        with open(self._log_dir / BROKEN_FILE, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            there = set(file.read().splitlines())
            file.write("".join(f"{line}\n" for line in lines if line not in there))
