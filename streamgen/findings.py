"""What was found out about a device, kept on disk: one file for each kind of question, device and set of versions.

A file that is broken, or that answers for something else, is as none: the question is asked again.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from streamgen.checkpoints.places import cache_dir

log = logging.getLogger("streamgen")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def read_found(kind: str, identity: Mapping[str, str]) -> dict[str, Any] | None:
    """What was found for exactly this identity, None where nothing (readable) was."""
    try:
        values = json.loads(_file(kind, identity).read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(values, dict) and all(values.get(name) == value for name, value in identity.items())
    return values["found"] if same and isinstance(values.get("found"), dict) else None


def write_found(kind: str, identity: Mapping[str, str], found: Mapping[str, Any]) -> None:
    """Keep it; where that cannot be done, a line says so."""
    file = _file(kind, identity)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**identity, "found": found}, indent=1))
        temporary.replace(file)
    except OSError as error:
        log.warning("what was found about the %s cannot be kept (%s): they are checked at every start", kind, error)


def _file(kind: str, identity: Mapping[str, str]) -> Path:
    return cache_dir(kind) / (re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(identity.values())) + ".json")
