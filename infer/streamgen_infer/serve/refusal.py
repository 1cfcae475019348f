"""What the frame server refuses, by type: a code, one line, and how the connection ends by it."""

from __future__ import annotations

from typing import Literal

Code = Literal[
    "bad_message",
    "too_large",
    "rate",
    "illegal_state",
    "bad_request",
    "unauthorized",
    "forbidden_origin",
    "quota",
    "not_ready",
    "draining",
    "memory",
    "overload",
    "unknown_session",
    "idle",
    "time_limit",
    "replaced",
    "internal",
]

# Close codes of the websocket (RFC 6455, 7.4.2: 4000 to 4999 are ours), beside 1000 for an ordinary end.
CLOSE_CODES: dict[Code, int] = {
    "bad_message": 4400,
    "bad_request": 4400,
    "illegal_state": 4409,
    "unauthorized": 4401,
    "forbidden_origin": 4403,
    "unknown_session": 4404,
    "idle": 4408,
    "time_limit": 4408,
    "replaced": 4409,
    "too_large": 1009,
    "rate": 4429,
    "quota": 4429,
    "overload": 1013,
    "memory": 1013,
    "not_ready": 1013,
    "draining": 1012,
    "internal": 1011,
}


class Refusal(Exception):
    """A typed refusal: becomes an `error` message."""

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        fatal: bool = False,
        retry_after_s: float | None = None,
        numbers: dict[str, float] | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.fatal, self.retry_after_s, self.numbers = code, fatal, retry_after_s, numbers or {}
