"""Videos: what a file says about its frames and their times, and the frames themselves, through ffmpeg.

Only the `ffmpeg` program is needed, no ffprobe: a stream copy into ffmpeg's `framecrc` format lists every packet with
its presentation time. Files are not trusted. The child reads one local file, with the demuxers of plain containers only
(a playlist, which names other files, is refused), under a time limit; and what it writes is read frame by frame, so
that nothing is allocated on a file's word.
"""

import dataclasses
import functools
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Self

import numpy as np

from qwenvl_jax.data.image import check_file
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.errors import MediaError

TIME_LIMIT_SECONDS = 600.0
MAX_FRAME_PIXELS = 64 * 1024 * 1024
MAX_LISTING_BYTES = 256 * 1024 * 1024
MAX_SELECTED = 1024  # beyond as many frames the filter's expression gets long, and picking them here is cheaper
# Containers that carry times and show where a file was cut off. Playlists (concat, hls, dash) would open other files,
# raw streams have no times to tell, and a cut Ogg, FLV or ASF looks whole.
DEMUXERS = "mov,matroska,webm,avi,mpegts,gif"

# What ffmpeg says, without failing, about files that end before their header says they do.
_CUT_SHORT = re.compile(r"ended prematurely|partial file|truncat", re.IGNORECASE)
_DISCARDED = 0x4  # packet flag: needed to decode others, but outside the edit list and never shown

# Probes of one file follow each other: to measure it, and to decode it. A clip of a minute takes 40 kB.
_PROBED = Kept(64 << 20)


@dataclasses.dataclass(frozen=True, eq=False)
class VideoFrames:
    """Frames chosen by the caller, used as they are.

    Attributes:
      frames: u8[N, H, W, 3], RGB.
      timestamps: f64[N], seconds from the start of the clip, not decreasing.
      duration: length in seconds of the clip the frames came from, or None where unknown.

    Raises:
      MediaError: frames of another shape or dtype, times unknown, of another number, negative, not finite or
        decreasing, or a duration that ends before the last frame.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    duration: float | None = None

    def __post_init__(self):
        frames = np.asarray(self.frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise MediaError(
                f"VideoFrames.frames must be uint8[frames, height, width, 3] in RGB, got "
                f"{frames.dtype}{list(frames.shape)}; stack and convert the frames."
            )
        if self.timestamps is None:
            raise MediaError(
                "VideoFrames.timestamps are unknown (None); give the time of each frame in seconds, they are never "
                "guessed."
            )
        try:
            times = np.asarray(self.timestamps, np.float64)
        except (TypeError, ValueError) as error:
            raise MediaError("VideoFrames.timestamps must be numbers, one time in seconds for each frame.") from error
        if times.shape != (len(frames),):
            raise MediaError(
                f"VideoFrames.timestamps must be one time in seconds for each of the {len(frames)} frames, got shape "
                f"{list(times.shape)}."
            )
        if not np.isfinite(times).all() or (times < 0).any():
            raise MediaError(
                "VideoFrames.timestamps must be known, finite and not negative; give the time of each frame in seconds "
                "from the start of the clip."
            )
        if (np.diff(times) < 0).any():
            at = int(np.flatnonzero(np.diff(times) < 0)[0])
            raise MediaError(
                f"VideoFrames.timestamps must not decrease, but times {at} and {at + 1} are {times[at]} and "
                f"{times[at + 1]}; put the frames in order of time."
            )
        if self.duration is not None and not self.duration >= times[-1]:
            raise MediaError(
                f"VideoFrames.duration={self.duration} must be at least the time of the last frame, {times[-1]}."
            )
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "timestamps", times)

    @property
    def height(self) -> int:
        """Of a frame, in pixels."""
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        """Of a frame, in pixels."""
        return self.frames.shape[2]


@dataclasses.dataclass(frozen=True, eq=False)
class VideoInfo:
    """What a video file says about the frames it shows, in the order it shows them.

    Attributes:
      path: the file.
      height, width: of a frame as shown, in pixels, after the rotation that the file asks for.
      times: f64[n], seconds from the first frame shown; at a constant rate exactly index / fps.
      fps: mean frames per second.
      constant_rate: whether one rate explains the times of all frames.
      duration: seconds from the first frame shown to the end of the last.
      ticks: i64[n], the stream's own presentation timestamps, in units of `time_base` seconds.
    """

    path: Path
    height: int
    width: int
    times: np.ndarray
    fps: float
    constant_rate: bool
    duration: float
    ticks: np.ndarray
    time_base: Fraction


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


def probe(path: str | Path) -> VideoInfo:
    """Reads the times and the size of a file's frames without decoding them.

    Where the container keeps no presentation times (AVI with reordered frames), the frames are decoded once for them.
    What was found is remembered for as long as the file has the same size and time.

    Raises:
      MediaError: the file is missing, empty, truncated, no video, a playlist, or says nothing about times.
    """
    path = check_file(path, "video")
    status = path.stat()
    key = (path, status.st_ino, status.st_size, status.st_mtime_ns)
    return _PROBED.get(key, lambda: _probe(path), lambda info: 500 + info.times.nbytes + info.ticks.nbytes)


def _probe(path: Path) -> VideoInfo:
    _check_ends(path)
    command = _command(path, format="framecrc", c="copy")
    with _Child(command, path) as child:
        listing = child.stdout.read(MAX_LISTING_BYTES).decode("ascii", "replace")
        messages = child.finish()
    height, width = _shown_size(path, listing, messages)
    ticks, lengths, time_base = _packets(listing) or _times_by_decoding(path)
    if not ticks:
        raise MediaError(f"video {path} has no frames that are shown; make or copy it again.")
    order = np.argsort(ticks, kind="stable")
    return _timeline(path, height, width, np.asarray(ticks, np.int64)[order], lengths[order[-1]], time_base)


def read_frames(info: VideoInfo, indices: np.ndarray) -> Iterator[np.ndarray]:
    """Decodes chosen frames, one after the other; only one is held at a time.

    Args:
      info: of the file, from `probe`.
      indices: i64[k], into `info.times`, not decreasing; a frame may be asked for several times.

    Yields:
      u8[H, W, 3] RGB for each index.

    Raises:
      MediaError: a frame cannot be decoded, or does not come, or comes with another time than the file's index says.
    """
    wanted, repeats = np.unique(np.asarray(indices, np.int64), return_counts=True)
    if wanted[0] < 0 or wanted[-1] >= len(info.ticks):
        raise MediaError(
            f"frames {wanted[0]} to {wanted[-1]} of video {info.path} do not exist: it has {len(info.ticks)}."
        )
    picked = len(wanted) <= MAX_SELECTED
    sent = wanted if picked else np.arange(wanted[0], wanted[-1] + 1)
    expression = _one_of(wanted.tolist()) if picked else f"between(n,{wanted[0]},{wanted[-1]})"
    command = _command(info.path, select=expression, format="rawvideo", pix_fmt="rgb24", **keep_timestamps())
    times_wanted = dict(zip(wanted.tolist(), repeats.tolist(), strict=True))
    with _Child(command, info.path, TIME_LIMIT_SECONDS + 2 * info.duration) as child:
        for number in sent.tolist():
            data = child.stdout.read(info.height * info.width * 3)
            if len(data) < info.height * info.width * 3:
                break
            frame = np.frombuffer(data, np.uint8).reshape(info.height, info.width, 3)
            for _ in range(times_wanted.get(number, 0)):
                yield frame
        messages = child.finish()
    _check_shown(info, sent, messages)


def read_small(info: VideoInfo, *, step: int, side: int) -> Iterator[np.ndarray]:
    """Decodes every `step`-th frame at a small size, one after the other; only one is held at a time.

    Args:
      info: of the file, from `probe`.
      step: frames from one to the next.
      side: of what comes, in pixels; each is the mean of its part of the frame, whatever the frame's shape.

    Yields:
      u8[side, side, 3] RGB for frames 0, step, 2 * step and so on.

    Raises:
      MediaError: a frame cannot be decoded, or there are fewer or more than the file's index says.
    """
    command = _command(
        info.path,
        select=f"not(mod(n,{step}))",
        size=f"{side}x{side}",
        format="rawvideo",
        pix_fmt="rgb24",
        **keep_timestamps(),
    )
    expected = len(range(0, len(info.ticks), step))
    with _Child(command, info.path, TIME_LIMIT_SECONDS + 2 * info.duration) as child:
        for n in range(expected):
            data = child.stdout.read(side * side * 3)
            if len(data) < side * side * 3:
                child.finish()
                raise MediaError(
                    f"video {info.path} is damaged: of {expected} frames asked for, {n} came; re-encode it with "
                    "`ffmpeg -i IN OUT.mp4`."
                )
            yield np.frombuffer(data, np.uint8).reshape(side, side, 3)
        child.finish()


def _one_of(numbers: list[int]) -> str:
    """ffmpeg's expression for n being one of these: a search tree, since it refuses a sum of more than 100 terms."""
    if len(numbers) == 1:
        return f"eq(n,{numbers[0]})"
    half = len(numbers) // 2
    return f"if(lt(n,{numbers[half]}),{_one_of(numbers[:half])},{_one_of(numbers[half:])})"


def _check_shown(info: VideoInfo, sent: np.ndarray, messages: str):
    """Raises MediaError unless ffmpeg logged exactly the frames asked for, at their times and of the size known."""
    shown = re.findall(r"\] n: *\d+ pts: *(-?\d+|NOPTS) .*? s:(\d+)x(\d+) ", messages)
    base = re.search(r"config in time_base: (\d+/\d+)", messages)
    scale = Fraction(base[1]) / info.time_base if base else Fraction(1)
    expected = info.ticks[sent].tolist()
    right = sum(pts != "NOPTS" and int(pts) * scale == tick for (pts, _, _), tick in zip(shown, expected, strict=False))
    if len(shown) != len(expected) or right != len(expected):
        raise MediaError(
            f"video {info.path} is damaged: of {len(expected)} frames asked for, {right} came at the time that the "
            "file's index gives; re-encode it with `ffmpeg -i IN OUT.mp4`."
        )
    other = [(int(h), int(w)) for _, w, h in shown if (int(h), int(w)) != (info.height, info.width)]
    if other:
        raise MediaError(
            f"video {info.path} changes its frame size: {info.height} x {info.width} pixels (height x width), then "
            f"{other[0][0]} x {other[0][1]}; re-encode it with `ffmpeg -i IN OUT.mp4`."
        )


def _command(path: Path, *, select: str | None = None, size: str | None = None, **output) -> list[str]:
    """ffmpeg's command line over the video stream of one local file.

    Args:
      select: which frames; their times are logged.
      size: "width x height" in pixels to scale them to, such as "32x32"; nothing is logged then.
    """
    import ffmpeg

    source = ffmpeg.input(f"file:{path.absolute()}", protocol_whitelist="file,pipe", format_whitelist=DEMUXERS)
    stream = source["V:0"]  # upper case: no cover pictures
    if select is not None:
        stream = stream.filter("select", select)
        if size is None:
            stream = stream.filter("showinfo", **({} if ffmpeg_version() < (4, 3) else {"checksum": 0}))
        else:
            stream = stream.filter("scale", size=size, flags="area")
    options = ["-nostdin", "-hide_banner", "-nostats", "-xerror", "-copyts", "-loglevel", "level+info"]
    return [ffmpeg_program(), *options, *ffmpeg.get_args(ffmpeg.output(stream, "pipe:", **output))]


class _Child:
    """A running ffmpeg whose messages go to a file, killed when the block is left or its time is up."""

    def __init__(self, command: list[str], path: Path, limit_seconds: float = TIME_LIMIT_SECONDS):
        self._path, self._limit = path, limit_seconds
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed in __exit__
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log, bufsize=1 << 20
        )
        self._late = threading.Event()
        self._timer = threading.Timer(limit_seconds, self._stop)
        self._timer.daemon = True
        assert self._process.stdout is not None  # it is a pipe
        self.stdout = self._process.stdout

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
        self._log.close()

    def finish(self) -> str:
        """Waits for the end and returns all messages.

        Raises:
          MediaError: ffmpeg failed, took too long, wrote more than it was read for, or says the file is cut short.
        """
        surplus = self.stdout.read(1)
        if surplus:
            self._process.kill()
        code = self._process.wait()
        if self._late.is_set():
            raise MediaError(
                f"video {self._path} took ffmpeg more than {self._limit:.0f} s; cut it into pieces or re-encode it."
            )
        if surplus:
            raise MediaError(f"video {self._path} is damaged: it has more frames than its index; re-encode it.")
        length = self._log.seek(0, 2)  # a read sets aside as much as it is asked for
        self._log.seek(0)
        messages = self._log.read(min(length, MAX_LISTING_BYTES)).decode("utf-8", "replace")
        _raise_for(self._path, code, messages)
        return messages


def _raise_for(path: Path, code: int, messages: str):
    """Turns what ffmpeg said into a MediaError, if it failed or the file is cut short."""
    cut = _CUT_SHORT.search("\n".join(line for line in messages.splitlines() if re.search(r"\[(error|fatal)\]", line)))
    if code == 0 and not cut:
        return
    if re.search(r"not (on|in) (the )?whitelist|m3u8", messages, re.IGNORECASE):
        raise MediaError(
            f"video {path} is a playlist, sound alone, a raw stream without times, or in a container that is not read; "
            "give an MP4, MOV, MKV, WebM, AVI, TS or GIF file."
        )
    if "matches no streams" in messages:
        raise MediaError(f"video {path} has no video stream (audio only?); give a file with pictures.")
    if cut or "corrupt input packet" in messages:
        raise MediaError(f"video {path} is truncated or damaged: it ends before its header says; copy it again.")
    said = [
        re.sub(r"^(\[[^\]]*\] )+", "", line) for line in messages.splitlines() if re.search(r"\[(error|fatal)\]", line)
    ]
    reason = said[0].strip()[:200] if said else f"exit status {code}"
    if "Input #0" in messages:
        raise MediaError(f"video {path} is truncated or damaged ({reason}); copy or make it again.")
    raise MediaError(
        f"video {path} is not a video that ffmpeg can read ({reason}); copy it again, or convert it to MP4."
    )


def _check_ends(path: Path):
    """Refuses an MP4 or MOV that is shorter than its boxes, a GIF without its end mark, a TS that ends within a packet.

    ffmpeg takes the end of such a file for the end of the film when it falls between two frames.
    """
    with open(path, "rb") as file:
        length = file.seek(0, 2)
        file.seek(0)
        head = file.read(189)
        if head[:4] == b"GIF8":
            file.seek(max(0, length - 64))
            if not file.read().rstrip(b"\0").endswith(b"\0;"):
                raise MediaError(f"video {path} is truncated: the end mark of a GIF is missing; copy it again.")
        if head[:1] == head[188:] == b"G" and length % 188:
            raise MediaError(
                f"video {path} is truncated: it ends within a packet of its transport stream; copy it again."
            )
        if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return
        start, seen = 0, set()
        while start + 8 <= length:
            file.seek(start)
            header = file.read(16)
            size, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if not re.fullmatch(rb"[ -~]{4}", kind):
                break  # something appended after the last box
            size = {0: length - start, 1: int.from_bytes(header[8:16], "big")}.get(size, size)
            if size < 8:
                break
            seen.add(kind)
            if start + size > length:
                raise MediaError(
                    f"video {path} is truncated: {length} bytes, but its {kind.decode()} part needs {start + size}; "
                    "copy it again."
                )
            start += size
    if b"moov" not in seen:
        raise MediaError(f"video {path} is truncated: it lacks the index (moov) of an MP4; copy or make it again.")


def _shown_size(path: Path, listing: str, messages: str) -> tuple[int, int]:
    """(height, width) after the rotation that the stream asks for."""
    found = re.search(r"^#dimensions 0: (\d+)x(\d+)", listing, re.MULTILINE)
    if not found or not int(found[1]) or not int(found[2]):
        raise MediaError(
            f"video {path} does not tell the size of its frames; re-encode it with `ffmpeg -i IN OUT.mp4`."
        )
    width, height = int(found[1]), int(found[2])
    if width * height > MAX_FRAME_PIXELS:
        raise MediaError(
            f"video {path} has frames of {width} x {height} pixels, more than {MAX_FRAME_PIXELS} in all; scale it down."
        )
    output = messages[messages.find("Output #0") :]  # holds the one stream that was mapped
    rotation = re.search(r"display ?matrix: rotation of (-?[\d.]+) degrees", output, re.IGNORECASE)
    if rotation and round(float(rotation[1]) / 90) % 2:
        return width, height
    return height, width


def _packets(listing: str) -> tuple[list[int], list[int], Fraction] | None:
    """Ticks and lengths of the packets that are shown, in file order; seconds per tick. None if a time is missing."""
    time_base = re.search(r"^#tb 0: (\d+/\d+)", listing, re.MULTILINE)
    if time_base is None:
        return None
    packets = re.findall(
        r"^0, *(?:-?\d+|NOPTS), *(-?\d+|NOPTS), *(-?\d+), *\d+, *0x\w+(?:, *F=0x(\w+))?", listing, re.MULTILINE
    )
    packets = [(pts, length) for pts, length, flags in packets if not int(flags or "1", 16) & _DISCARDED]
    if any(pts in ("NOPTS", "-9223372036854775808") for pts, _ in packets):
        return None
    return [int(pts) for pts, _ in packets], [int(length) for _, length in packets], Fraction(time_base[1])


def _times_by_decoding(path: Path) -> tuple[list[int], list[int], Fraction]:
    """The same as `_packets`, from the decoder, which knows the times that some containers leave out."""
    command = _command(path, select="1", format="null", **keep_timestamps())
    with _Child(command, path) as child:
        messages = child.finish()
    frames = re.findall(r"\] n: *\d+ pts: *(-?\d+|NOPTS) (?:.*? duration: *(\d+) )?", messages)
    base = re.search(r"config in time_base: (\d+/\d+)", messages)
    if not base or any(pts == "NOPTS" for pts, _ in frames):
        raise MediaError(
            f"video {path} does not tell the times of its frames, and they are never guessed; re-encode it with "
            "`ffmpeg -i IN OUT.mp4`."
        )
    return [int(pts) for pts, _ in frames], [int(d or 0) for _, d in frames], Fraction(base[1])


def _timeline(
    path: Path, height: int, width: int, ticks: np.ndarray, last_length: int, time_base: Fraction
) -> VideoInfo:
    """Seconds from ticks. Where a constant rate explains every tick to within one, times are exactly index / rate."""
    n, since = len(ticks), ticks - ticks[0]
    span = since[-1] * time_base
    last = last_length * time_base if last_length > 0 else (span / (n - 1) if n > 1 else Fraction(0))
    duration = span + last
    if (n > 1 and span == 0) or duration == 0:
        raise MediaError(f"video {path} gives all its frames the same time; re-encode it with its frame rate stated.")
    rate = _constant_rate(since, time_base) if n > 1 else None
    if rate is not None:
        times = np.arange(n) / float(rate)
    else:
        times = since * time_base.numerator / time_base.denominator
    return VideoInfo(
        path=path,
        height=height,
        width=width,
        times=times,
        fps=float(n / duration if rate is None else rate),
        constant_rate=rate is not None,
        duration=float(duration),
        ticks=ticks,
        time_base=time_base,
    )


def _constant_rate(since: np.ndarray, time_base: Fraction) -> Fraction | None:
    """Frames per second that put every frame within a tick of index / rate, or None for a varying rate.

    Containers round times to their ticks: 30 fps in Matroska's milliseconds is 0, 33, 67, 100.
    """
    gaps = np.diff(since)
    if (gaps == gaps[0]).all():
        return 1 / (int(gaps[0]) * time_base)
    mean = Fraction(len(gaps)) / (int(since[-1]) * time_base)
    ntsc = Fraction(1000, 1001)
    candidates = [mean.limit_denominator(d) for d in (1, 2, 3, 4, 12)] + [(mean / ntsc).limit_denominator(1) * ntsc]
    index = np.arange(len(since))
    for rate in candidates:
        per_frame = 1 / (rate * time_base) if rate else Fraction(0)  # ticks
        expected = index * per_frame.numerator / per_frame.denominator
        if per_frame >= 4 and np.abs(since - expected).max() <= 1:
            return rate
    return None
