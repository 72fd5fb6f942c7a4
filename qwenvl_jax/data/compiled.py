"""Loops that Python is too slow for, compiled by numba, which is imported with this module."""

from collections.abc import Callable

import numba


def kept(function: Callable) -> Callable:
    """The function, compiled at first use and then kept on disk.

    It is kept beside the package or, where that cannot be written, in the user's cache; where neither can be, each
    process compiles its own.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)
