"""Who may use the server, from where, and how fast: bearer tokens, origins, rates. No server framework here."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from streamgen.errors import UserError
from streamgen_infer.protocol import TOKEN_SUBPROTOCOL, Refusal

LOCAL = "local"
"""The owner of everything where no token is asked for."""
TOKEN_FORM = re.compile(r"[A-Za-z0-9._~-]{8,128}")


@dataclass(frozen=True, slots=True)
class Quota:
    """What one token may have."""

    owner: str
    sessions: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Secret -> quota; empty: everybody may, and shares one quota."""

    quotas: Mapping[str, Quota]
    open_sessions: int

    def check(self, authorization: str | None, subprotocols: list[str]) -> Quota:
        """Refusal without a good token, from `Authorization: Bearer ...` or the second subprotocol."""
        if not self.quotas:
            return Quota(LOCAL, self.open_sessions)
        given = [name.removeprefix(TOKEN_SUBPROTOCOL) for name in subprotocols if name.startswith(TOKEN_SUBPROTOCOL)]
        scheme, _, word = (authorization or "").partition(" ")
        if scheme.lower() == "bearer":
            given.append(word.strip())
        for secret, quota in self.quotas.items():
            if any(hmac.compare_digest(secret.encode(), one.encode("utf-8", "replace")) for one in given):
                return quota
        raise Refusal("unauthorized", "no good token: send Authorization: Bearer TOKEN", fatal=True)


def read_tokens(token: str | None, file: Path | None, sessions: int) -> Tokens:
    """--token and --token-file (lines NAME TOKEN [SESSIONS]); UserError for what is no token."""
    quotas: dict[str, Quota] = {}
    if token is not None:
        quotas[_checked(token, "--token")] = Quota("token", sessions)
    for number, line in enumerate(_lines(file), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"{file} line {number}"
        if len(words) not in (2, 3) or (len(words) == 3 and not words[2].isdecimal()):
            raise UserError(f"{where}: must be NAME TOKEN, or NAME TOKEN SESSIONS")
        quotas[_checked(words[1], where)] = Quota(words[0], int(words[2]) if len(words) == 3 else sessions)
    if file is not None and not quotas:
        raise UserError(f"--token-file {file} holds no token: write lines of NAME TOKEN, or leave it out")
    return Tokens(quotas, sessions)


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file} is not readable: {error}") from error


def _checked(token: str, where: str) -> str:
    if not TOKEN_FORM.fullmatch(token):
        raise UserError(f"{where}: a token has 8 to 128 letters, digits or . _ ~ -, so that a browser can send it")
    return token


def is_local(host: str) -> bool:
    """Only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, tokens: Tokens) -> None:
    """UserError: never open to others without a token."""
    if not is_local(host) and not tokens.quotas:
        raise UserError(
            f"--host {host} opens the server to other machines: add --token or --token-file, or use 127.0.0.1"
        )


def check_origin(origin: str | None, host: str | None, *, bound_to: str, allowed: tuple[str, ...]) -> None:
    """Refusal for pages of other sites, and for other names of this machine (DNS rebinding)."""
    try:
        name = urlsplit(f"//{host}").hostname if host else None
        site = None if origin is None else urlsplit(origin).netloc
    except ValueError:
        raise Refusal("forbidden_origin", "Host or Origin is no address", fatal=True) from None
    named = [urlsplit(one).hostname for one in allowed]
    if is_local(bound_to) and name is not None and not is_local(name) and name not in named:
        raise Refusal("forbidden_origin", f"this server is not called {name}: use 127.0.0.1, or --origin", fatal=True)
    if origin is None or origin in allowed:
        return
    if site != host:
        raise Refusal(
            "forbidden_origin", f"pages of {origin} may not use this server; allow them by --origin", fatal=True
        )


@dataclass(slots=True)
class Rate:
    """A token bucket: `per_s` on average, `burst` at once."""

    per_s: float
    burst: float
    clock: Callable[[], float]
    _left: float = field(init=False)
    _at_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._left, self._at_s = self.burst, self.clock()

    def take(self, cost: float = 1.0) -> bool:
        """Whether there was enough."""
        now_s = self.clock()
        self._left = min(self.burst, self._left + (now_s - self._at_s) * self.per_s)
        self._at_s = now_s
        if self._left < cost:
            return False
        self._left -= cost
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """All that `streamgen serve` decides before anything is loaded."""

    host: str = "127.0.0.1"
    tokens: Tokens
    origins: tuple[str, ...] = ()
    web: Path | None = None
    save_dir: Path | None = None
    work_dir: Path
    """For recordings; emptied at the start and at the end."""
    model: str = "sprites"
    messages_per_s: float = 20.0
    messages_burst: float = 60.0
    start_s: float = 10.0
    """For the first message of a connection."""
    idle_s: float = 60.0
    session_s: float = 6 * 3600.0
    resume_s: float = 30.0
    save_every_s: float = 5.0
    retry_s: float = 5.0
    """What clients are told when the server drains."""
    waiting: int = 32
    """Clients that may wait for a place."""
    branches: int = 8
    """Kept per owner; the oldest gives way."""
    max_upload_bytes: int = 64 * 2**20
