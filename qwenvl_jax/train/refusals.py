"""What an operating system refuses for reasons that the user can mend, a full disk say, told with the file it is of."""

import contextlib
import errno
import os
from collections.abc import Iterator

_MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ESTALE}


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Names the file in an error of the system, which tells it where a file is opened and not where it is written."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def refusal(error: BaseException, where: object = "") -> str | None:
    """The line that tells of such an error in a run; None for another one.

    Args:
      where: what is named if the error names no file.
    """
    if not isinstance(error, OSError) or error.errno not in _MENDABLE:
        return None
    return (
        f"{error.filename or where} cannot be written ({error.strerror}); make room or give leave, and start the same "
        "command again: the run continues from its latest checkpoint."
    )
