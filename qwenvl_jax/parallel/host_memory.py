"""Memory of the host process, where training steps run on its own cores."""

import ctypes
import sys

import jax

# Numbers of glibc's mallopt.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Has the allocator keep what a CPU step frees for the next step, and says whether it does now.

    glibc hands large blocks back to the system when they are freed, so that each step has its hundreds of megabytes
    of temporaries mapped and zeroed anew: a fifth to a third of the time of a small step. The process then holds
    the memory of its largest step until it ends.

    Does nothing, and returns False, on accelerators and where the C library is not glibc.
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20), (_ARENA_MAX, 1))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
