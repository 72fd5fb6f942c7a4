"""Times as text, alike before the frames of a video and in answers.

    seconds   <3.0 seconds>      what processors of Qwen3-VL write
    hms       <00:00:03.0>       hours, minutes and seconds, for training data only

The Qwen3-VL report trains with times in both forms. Which of them a sample has follows from the run's seed and the name
of its record alone.
"""

import hashlib

from qwenvl_jax.errors import ConfigError

TIME_FORMATS = ("seconds", "hms")


def time_text(seconds: float, time_format: str = "seconds") -> str:
    """A time as it stands in a prompt or an answer, to a tenth of a second.

    Args:
      seconds: not negative.
      time_format: one of `TIME_FORMATS`. Both round alike, by Python's `format`, which is the reference's way.
    """
    tenths = f"{seconds:.1f}"
    if time_format == "seconds":
        return f"<{tenths} seconds>"
    whole, _, tenth = tenths.partition(".")
    minutes, rest = divmod(int(whole), 60)
    hours, minutes = divmod(minutes, 60)
    return f"<{hours:02}:{minutes:02}:{rest:02}.{tenth}>"


def check_time_format(time_format: str):
    """Raises ConfigError unless this is one of `TIME_FORMATS`."""
    if time_format not in TIME_FORMATS:
        raise ConfigError(f"time_format must be one of {', '.join(TIME_FORMATS)}, got {time_format!r}.")


def choose_time_format(seed: int, record: str, hms_share: float) -> str:
    """The form of the times of a sample: a function of its arguments, the same in every process and on every machine.

    Args:
      seed: of the run.
      record: the record's name.
      hms_share: from 0 to 1, of many records, how many get "hms". A record that has it keeps it as the share grows.
    """
    drawn = int.from_bytes(hashlib.sha256(f"{seed} {record}".encode()).digest()[:8], "big") / 2**64
    return "hms" if drawn < hms_share else "seconds"
