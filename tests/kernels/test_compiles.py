"""Kernels compile for a GPU, with what its multiprocessors have: the interpreter accepts what the compiler does not."""

import json
import platform
import sys
from pathlib import Path

import pytest

SHARED_BYTES = 227 * 1024  # of a thread block on compute capability 9.0


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_every_kernel_compiles_for_compute_capability_9(run_python, tmp_path):
    script = Path(__file__).with_name("compile_for_gpu.py")
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = run_python(str(script), env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    files = {
        "norm_modulate",
        "gate_residual",
        "norm_rope",
        "norm_rope_store",
        "gelu",
        "attention",
        "quantise",
        "ring_rope",
    }
    assert {one["kernel"].split(".")[0] for one in made} == files | {"linear", "noise", "renoise"}
    assert {"norm_modulate._backward", "gate_residual._backward", "norm_rope._backward", "gelu._backward"} <= {
        one["kernel"] for one in made
    }
    assert all(one["shared"] <= SHARED_BYTES for one in made), made
