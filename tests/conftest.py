"""Every test: one thread, the same random numbers, no network, and its own temporary folder."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; subprocesses inherit it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what determinism needs on CUDA

import hypothesis
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("streamgen", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("streamgen")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Seeded, one thread, fp32; memory that is read before it is written holds NaN."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own folder, made the current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run python with these arguments in `tmp_path` (or `cwd`); keywords in `env` are added."""

    def run(
        *arguments: str,
        cwd: Path = tmp_path,
        env: dict[str, str] | None = None,
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run
