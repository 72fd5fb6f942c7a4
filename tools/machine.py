"""What a benchmark says of the machine that it ran on."""

import os
import platform
import time

from qwenvl_jax.data.ffmpeg_child import ffmpeg_version


def machine() -> str:
    """CPUs, architecture, versions of Python and ffmpeg, and the day."""
    ffmpeg = ".".join(map(str, ffmpeg_version()))
    cpus = f"{os.cpu_count()} CPUs, {platform.machine()}"
    return f"{cpus}, Python {platform.python_version()}, ffmpeg {ffmpeg}, {time.strftime('%Y-%m-%d')}"
