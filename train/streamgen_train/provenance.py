"""Where, from what code and with what config a run was started."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "omegaconf", "hydra-core", "safetensors", "peft")


def environment(argv: list[str]) -> dict[str, Any]:
    """Where and from what code a run was started."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "argv": argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: found[name] for name in PACKAGES if name in found},
        "code": code_version(),
    }


def code_version() -> str:
    """`git describe` of the checkout with -dirty, or the installed version where there is no
    checkout.
    """
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except FileNotFoundError:
        print("git is not installed: the run records the package version only", file=sys.stderr)
        result = None
    if result is not None and result.returncode == 0:
        return result.stdout.strip()
    from streamgen import __version__

    return str(__version__)


def write_provenance(run_dir: Path, resolved: Mapping[str, Any], step: int) -> None:
    """config.yaml and environment.json of this start; those of earlier starts are kept as
    NAME.before_step_N.
    """
    from omegaconf import OmegaConf

    texts = {
        "config.yaml": OmegaConf.to_yaml(OmegaConf.create(dict(resolved))),
        "environment.json": json.dumps(environment(sys.argv), indent=1) + "\n",
    }
    for name, text in texts.items():
        path = run_dir / name
        if path.exists() and path.read_text() != text:
            stem, suffix = name.split(".")
            path.replace(run_dir / f"{stem}.before_step_{step}.{suffix}")
        path.write_text(text)
