"""Where this project keeps what it can make or fetch again."""

import os
from pathlib import Path

CACHE_VARIABLE = "STREAMGEN_CACHE"


def cache_dir(kind: str) -> Path:
    """The folder for `kind` ("text", "models"): $STREAMGEN_CACHE, else the user's cache folder. Not made here."""
    root = os.environ.get(CACHE_VARIABLE)
    if root:
        return Path(root) / kind
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "streamgen" / kind
