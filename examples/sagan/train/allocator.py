"""How the system's allocator treats memory that a step frees."""

from __future__ import annotations

import ctypes
import platform

# glibc's names for what mallopt sets.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed for what is allocated next, in all of this process, until it ends.

    Every step frees and allocates the same large blocks. glibc gives each back to the system, which clears its pages
    when they are taken anew: a seventh of a step on two CPU cores (docs/training_step.md). What was taken at the
    highest point stays with the process then.

    Returns:
        Whether this system's malloc took the settings: glibc's does.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(bool(libc.mallopt(name, value)) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))
