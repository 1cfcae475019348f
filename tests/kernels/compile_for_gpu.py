"""Compiles every kernel for an H200 on a machine without one; prints a JSON line per kernel. Run by test_compiles.py.

Triton compiles for a target that a driver names; this one names compute capability 9.0 and launches nothing.
"""

import dataclasses
import json
import sys
from types import ModuleType

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoDevice:
    """A driver that knows its target."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    driver.set_active(NoDevice())
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        file = self.fn.__module__.removeprefix("streamgen_kernels.")
        values = {"kernel": f"{file}.{self.fn.__name__}", "shared": kernel.metadata.shared}
        print(json.dumps(values | {"cubin": len(kernel.asm["cubin"])}))

    JITFunction.run = compile_only
    from streamgen_kernels import cases

    modules = [module for name, module in sys.modules.items() if name.startswith("streamgen_kernels.")]
    for module in modules:  # the tensors are on the CPU, and no kernel runs
        if isinstance(module, ModuleType) and hasattr(module, "check_place"):
            module.check_place = lambda *tensors: None
    # Widths of the real model, few tokens; 75 queries: the tiles of long blocks.
    sizes = dataclasses.replace(cases.WAN_1_3B, grid=(5, 5), window_frames=5)
    for case in cases.cases("cpu", torch.bfloat16, sizes):
        case.kernel()


if __name__ == "__main__":
    main()
