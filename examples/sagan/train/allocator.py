"""How malloc treats memory that a step frees."""

from __future__ import annotations

import ctypes
import platform

# glibc's numbers for parameters of mallopt.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let malloc reuse freed memory for the rest of this process; return whether it can, as glibc's can.

    Every step frees and allocates the same large blocks. By default glibc returns each to the system, which clears its
    pages when they are allocated again, which takes time (docs/training_step.md). The price: the process keeps its peak
    of memory.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(bool(libc.mallopt(name, value)) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))
