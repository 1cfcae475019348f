"""Free memory goes back to the system. glibc keeps what was freed, in pieces, for itself: a server would seem to grow
for hours. Measured with the shipped model: three streams of 80 s, 577 to 729 MB as it is and 540 to 597 with
`map_large`, of which the kept snapshots are the rise; three streams of 6 s after another, 420 to 500 MB without
`give_back` and 322 with it.
"""

from __future__ import annotations

import ctypes
import functools
import gc

LARGE_BYTES = 2 << 20
"""Below what a snapshot of a cache takes, above the values of a pass of a small model."""
_M_MMAP_THRESHOLD = -3


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        assert libc.malloc_trim and libc.mallopt
    except (OSError, AttributeError):  # not Linux, or another C library
        return None
    return libc


@functools.cache
def map_large() -> bool:
    """From now on large blocks of this process are mapped for themselves, and unmapped when freed: glibc otherwise
    raises that limit to 32 MB once such a block was freed, and snapshots then leave holes in the heap. Whether the C
    library could be asked.
    """
    libc = _libc()
    return libc is not None and libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES) == 1


def give_back() -> bool:
    """Return what is free now; takes some milliseconds. Whether the C library could be asked."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
    return libc is not None


def keep_loaded() -> None:
    """Python's garbage collector looks no more at what is there now: modules and the model, which stay for good. It
    looks at all objects only once a quarter more have come, and takes 0.25 s of every thread for 200,000 of them; what
    is left then are streams, which are looked at often and in a moment.
    """
    gc.collect()
    gc.freeze()
