"""`Failure`: a sample that cannot be used, and why. It is left out and told, never replaced by another."""

import dataclasses
from collections.abc import Collection

from qwenvl_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Failure:
    """A sample that cannot be used.

    Attributes:
      sample: how errors call it: file, line and id.
      reason: what is wrong with it, in one line.
    """

    sample: str
    reason: str


def check_share(failures: Collection[Failure], samples: int, allowed: float, option: str = "data.max_failed=") -> None:
    """Refuses data of which too much cannot be used.

    Args:
      failures: the samples that cannot be used.
      samples: how many there are.
      allowed: the share of them that may fail.
      option: what sets the share, as the user writes it, up to the number.

    Raises:
      DataError: names the first of them and the share.
    """
    if len(failures) > allowed * samples:
        first = next(iter(failures))
        raise DataError(
            f"{first.reason} ({len(failures)} of {samples} samples cannot be used, {option}{allowed} allows "
            f"{int(allowed * samples)}; mend the data, or raise it)."
        )
