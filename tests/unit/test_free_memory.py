"""What is freed goes back to the system, also from between what stays."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
from streamgen_infer import machine
from streamgen_infer.free_memory import give_back, map_large

if sys.argv[1] == "mapped":
    assert map_large()
first = torch.ones(5 << 18)  # 5 MiB
del first  # here glibc raises its limit for mappings of their own
before_mb = machine.rss_mb()
large, small = zip(*((torch.ones(5 << 18), torch.ones(1 << 16)) for _ in range(30)))  # 150 MiB and 7.5 MiB
del large
print(machine.rss_mb() - before_mb)
assert give_back()
print(machine.rss_mb() - before_mb)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_large_blocks_leave_no_holes() -> None:
    def kept_mb(how: str) -> list[float]:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [float(line) for line in done.stdout.split()]

    assert max(kept_mb("mapped")) < 20
    holes, given_back = kept_mb("as it is")
    assert holes > 100 and given_back < 20
