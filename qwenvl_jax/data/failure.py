"""`Failure`: a sample that cannot be used, and why. It is left out and told, never replaced by another."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Failure:
    """A sample that cannot be used.

    Attributes:
      sample: how errors call it: file, line and id.
      reason: what is wrong with it, in one line.
    """

    sample: str
    reason: str
