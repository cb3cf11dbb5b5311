"""What the C library does with memory that a training step has freed."""

import ctypes
import os

# Parameters of mallopt(3), from malloc.h of glibc.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 1 << 30
LARGEST_ON_HEAP = 1 << 25  # what glibc allows at most


def keep_freed_memory() -> bool:
    """Make this process keep up to 1 GiB that it frees for its next allocations.

    A step frees and allocates the same hundreds of MiB again and again. Given back to the operating system in between, as
    glibc does from some 64 MiB on, they would have to be mapped and zeroed at every step. Whether this was done: not where
    the C library has no ``mallopt``, or the environment says otherwise by ``MALLOC_TRIM_THRESHOLD_`` or
    ``MALLOC_MMAP_THRESHOLD_``.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; TypeError on Windows
        return False
    return all([mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP), mallopt(M_TRIM_THRESHOLD, KEPT)])
