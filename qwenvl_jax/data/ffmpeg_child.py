"""The ffmpeg program as a child that is not trusted with more than one file.

It reads one local file, with the demuxers of plain containers only (a playlist, which names other files, is refused),
through protocols that know no network. It is stopped when it takes too long, too much of the CPU or too much memory,
and refuses to set pictures aside that are larger than `MAX_FRAME_PIXELS`, before it does so. Limits of CPU time and
memory are set from outside, right after the start, which is safe beside threads; only Linux knows how (`prlimit`).
Elsewhere the limit of time is the one that holds.
"""

import contextlib
import fcntl
import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import IO, Self

from qwenvl_jax.errors import MediaError

TIME_LIMIT_SECONDS = 600.0
CPU_SECONDS_PER_MINUTE = 30.0  # of video
LEAST_CPU_SECONDS = 60.0
# Room for the frames that decoding holds, and for the stacks of threads, of which ffmpeg starts more on more CPUs.
MEMORY_LIMIT_BYTES = 4 << 30
MEMORY_PER_CPU_BYTES = 64 << 20
MAX_FRAME_PIXELS = 64 * 1024 * 1024
MAX_LISTING_BYTES = 256 * 1024 * 1024
LONGEST_ARGUMENT = 100_000  # bytes; Linux takes 128 KiB
# What it may write ahead of being read: a frame would fill the usual 64 KiB a hundred times, each a change of process.
PIPE_BYTES = 1 << 20
# Containers that carry times and show where a file was cut off. Playlists (concat, hls, dash) would open other files,
# raw streams have no times to tell, and a cut Ogg, FLV or ASF looks whole.
DEMUXERS = "mov,matroska,webm,avi,mpegts,gif"

# What ffmpeg says, without failing, about files that end before their header says they do.
_CUT_SHORT = re.compile(r"ended prematurely|partial file|truncat", re.IGNORECASE)
_NO_MEMORY = re.compile(r"cannot allocate memory|malloc of size|pthread_create\(\) failed", re.IGNORECASE)
_SERIOUS = re.compile(r"\[(error|fatal)\]")
_GRACE_SECONDS = 5  # between the signal that ends it and the one that kills it


@functools.cache
def ffmpeg_program() -> str:
    """Path of ffmpeg: the system's, else the one that the imageio-ffmpeg wheel brings.

    Raises:
      MediaError: there is neither.
    """
    found = shutil.which("ffmpeg")
    if found:
        return found
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise MediaError("ffmpeg was not found; install ffmpeg, or the Python package imageio-ffmpeg.") from error


@functools.cache
def ffmpeg_version() -> tuple[int, int]:
    """(major, minor) of `ffmpeg_program()`; that of a build without a number is taken to be high."""
    text = subprocess.run([ffmpeg_program(), "-version"], capture_output=True, text=True, check=False).stdout
    version = re.match(r"ffmpeg version n?(\d+)\.(\d+)", text)
    return (int(version[1]), int(version[2])) if version else (99, 0)


def keep_timestamps() -> dict[str, str]:
    """The output option that passes every frame on once, at its own time; it was renamed in ffmpeg 5.1."""
    return {"vsync": "passthrough"} if ffmpeg_version() < (5, 1) else {"fps_mode": "passthrough"}


def command(
    path: Path, *, packets: str | None = None, select: str | None = None, size: str | None = None, **output
) -> list[str]:
    """ffmpeg's command line over the video stream of one local file.

    Args:
      packets: which packets are decoded, as an expression in `pts` and `dts`; all without. Needs `knows_packets()`.
      select: which frames are passed on; their times are logged.
      size: "width x height" in pixels to scale them to, such as "32x32"; nothing is logged then.
    """
    import ffmpeg

    dropped = {} if packets is None else {"bsf:v": f"noise=amount=0:drop='not({packets})'"}
    source = ffmpeg.input(
        f"file:{path.absolute()}",
        protocol_whitelist="file,pipe",
        format_whitelist=DEMUXERS,
        max_pixels=MAX_FRAME_PIXELS,
        **dropped,
    )
    stream = source["V:0"]  # upper case: no cover pictures
    if select is not None:
        stream = stream.filter("select", select)
        if size is None:
            stream = stream.filter("showinfo", **({} if ffmpeg_version() < (4, 3) else {"checksum": 0}))
        else:
            stream = stream.filter("scale", size=size, flags="area")
    options = ["-nostdin", "-hide_banner", "-nostats", "-xerror", "-copyts", "-loglevel", "level+info"]
    return [ffmpeg_program(), *options, *ffmpeg.get_args(ffmpeg.output(stream, "pipe:", **output))]


def knows_packets() -> bool:
    """Whether this ffmpeg drops packets before it decodes them (bitstream filters of inputs)."""
    return ffmpeg_version() >= (7, 1)


class EndedError(MediaError):
    """ffmpeg was asked to end, as all processes of a job are where it stops: no fault of the video."""


class Child:
    """A running ffmpeg whose messages go to a file, killed when the block is left or a limit is reached.

    Args:
      command: from `command`.
      name: of the video, for errors.
      seconds: length of the video; the limits of time grow with it.

    Attributes:
      stdout: what it writes.
    """

    def __init__(self, command: list[str], name: str, seconds: float = 0.0):
        self._name = name
        self._time_limit = TIME_LIMIT_SECONDS + 2 * seconds
        self._cpu_limit = max(LEAST_CPU_SECONDS, CPU_SECONDS_PER_MINUTE * seconds / 60)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed in __exit__
        self._told = 0
        self._files: list[IO[bytes]] = []
        self._process = subprocess.Popen(
            self._short(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=1 << 20,
            # Ctrl-C in a terminal goes to the whole foreground group: it asks a run to stop after its step, and must
            # not make a sample of that step look damaged.
            process_group=0,
        )
        self._limit()
        self._late = threading.Event()
        self._timer = threading.Timer(self._time_limit, self._stop)
        self._timer.daemon = True
        assert self._process.stdout is not None  # it is a pipe
        self.stdout = self._process.stdout
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux; a user with many pipes may be refused, which costs some time
            with contextlib.suppress(OSError):
                fcntl.fcntl(self.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def _short(self, command: list[str]) -> list[str]:
        """A command line with files in place of what an argument does not hold: lists of frames and of packets."""
        words = list(command)
        for i, word in enumerate(command):
            if len(word) > LONGEST_ARGUMENT:
                self._files.append(tempfile.NamedTemporaryFile(prefix="qwenvl-ffmpeg-"))  # noqa: SIM115, see __exit__
                self._files[-1].write(word.encode())
                self._files[-1].flush()
                option = command[i - 1]
                words[i] = self._files[-1].name
                words[i - 1] = f"-/{option[1:]}" if ffmpeg_version() >= (7, 0) else f"{option}_script"
        return words

    def _limit(self):
        if not hasattr(resource, "prlimit"):
            return
        seconds = max(1, round(self._cpu_limit))
        memory = MEMORY_LIMIT_BYTES + MEMORY_PER_CPU_BYTES * (os.cpu_count() or 1)
        wanted = {
            resource.RLIMIT_CPU: (seconds, seconds + _GRACE_SECONDS),
            resource.RLIMIT_DATA: (memory, memory),  # what is written to, and not mere address space
            resource.RLIMIT_CORE: (0, 0),
        }
        with contextlib.suppress(ProcessLookupError):  # it has ended
            for which, limits in wanted.items():
                _, most = resource.getrlimit(which)  # inherited, and not to be raised
                known = [limit if most == resource.RLIM_INFINITY else min(limit, most) for limit in limits]
                resource.prlimit(self._process.pid, which, (known[0], known[1]))

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def _stop(self):
        self._late.set()
        self._process.kill()

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_):
        self._timer.cancel()
        self._process.kill()
        self._process.wait()
        self.stdout.close()
        for file in (self._log, *self._files):
            file.close()

    def said(self) -> str:
        """The whole lines of messages that came since the last call; what came of a frame is here before the frame."""
        data = bytearray()
        while piece := os.pread(
            self._log.fileno(), 1 << 16, self._told + len(data)
        ):  # the child writes at its own place
            data += piece
        end = data.rfind(b"\n") + 1
        self._told += end
        return data[:end].decode("utf-8", "replace")

    def finish(self) -> str:
        """Waits for the end and returns all messages.

        Raises:
          MediaError: ffmpeg failed, came to a limit, wrote more than it was read for, or says the file is cut short.
          EndedError: it was asked to end.
        """
        surplus = self.stdout.read(1)
        if surplus:
            self._process.kill()
        code = self._process.wait()
        if self._late.is_set():
            raise MediaError(
                f"{self._name} took ffmpeg more than {self._time_limit:.0f} s; cut it into pieces or re-encode it."
            )
        if surplus:
            raise MediaError(f"{self._name} is damaged: it has more frames than its index; re-encode it.")
        length = self._log.seek(0, 2)  # a read sets aside as much as it is asked for
        self._log.seek(0)
        messages = self._log.read(min(length, MAX_LISTING_BYTES)).decode("utf-8", "replace")
        self._raise_for(code, messages)
        return messages

    def _raise_for(self, code: int, messages: str):
        """Turns what ffmpeg said into a MediaError, if it failed or the file is cut short."""
        name, said = self._name, [line for line in messages.splitlines() if _SERIOUS.search(line)]
        cut = _CUT_SHORT.search("\n".join(said))
        huge = re.search(r"Picture size (\d+)x(\d+) exceeds specified max pixel count", messages)
        if huge:
            raise too_many_pixels(name, int(huge[1]), int(huge[2]))
        if code == 0 and not cut:
            return
        if code == -signal.SIGXCPU or f"received signal {int(signal.SIGXCPU)}" in messages:
            raise MediaError(
                f"{name} took ffmpeg more than {self._cpu_limit:.0f} s of the CPU, which is the limit for its length; "
                "re-encode it in a smaller size, such as `ffmpeg -i IN -vf scale=-2:720 OUT.mp4`."
            )
        if code == -signal.SIGTERM or f"received signal {int(signal.SIGTERM)}" in messages:
            raise EndedError(f"{name}: ffmpeg was ended by SIGTERM; start the same command again.")
        if _NO_MEMORY.search("\n".join(said)):
            raise MediaError(
                f"{name} took ffmpeg more than {MEMORY_LIMIT_BYTES / 2**30:.3g} GiB of memory, which is the limit; "
                "re-encode it in a smaller size, such as `ffmpeg -i IN -vf scale=-2:720 OUT.mp4`."
            )
        if code == -signal.SIGKILL:
            raise MediaError(
                f"{name}: ffmpeg was killed by the system, most likely for want of memory; free some, or re-encode the "
                "video in a smaller size."
            )
        if re.search(r"not (on|in) (the )?whitelist|m3u8", messages, re.IGNORECASE):
            raise MediaError(
                f"{name} is a playlist, sound alone, a raw stream without times, or in a container that is not read; "
                "give an MP4, MOV, MKV, WebM, AVI, TS or GIF file."
            )
        if "matches no streams" in messages:
            raise MediaError(f"{name} has no video stream (audio only?); give a file with pictures.")
        if cut or "corrupt input packet" in messages:
            raise MediaError(f"{name} is truncated or damaged: it ends before its header says; copy it again.")
        reason = re.sub(r"^(\[[^\]]*\] )+", "", said[0]).strip()[:200] if said else f"exit status {code}"
        if "Input #0" in messages:
            raise MediaError(f"{name} is truncated or damaged ({reason}); copy or make it again.")
        raise MediaError(f"{name} is not a video that ffmpeg can read ({reason}); copy it again, or convert it to MP4.")


def too_many_pixels(name: str, width: int, height: int) -> MediaError:
    """The error of a video whose frames are larger than is decoded."""
    return MediaError(
        f"{name} has frames of {width} x {height} pixels, more than {MAX_FRAME_PIXELS} in all; scale it down."
    )
