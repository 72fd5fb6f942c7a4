"""Videos: what a file says about its frames and their times, and the frames themselves, through ffmpeg.

Only the `ffmpeg` program is needed, no ffprobe: a stream copy into ffmpeg's `framecrc` format lists every packet with
its presentation time. Files are not trusted (`qwenvl_jax.data.ffmpeg_child`); and what ffmpeg writes is read frame by
frame, so that nothing is allocated on a file's word.

Frames that lie far apart are decoded without those between: listings tell the key frame that each depends on, and the
packets in between are dropped before the decoder. Where many are wanted, those of H.264 are dropped that are not wanted
and that no other frame depends on. A frame is handed on only if it came at its own time and without complaint; at the
first doubt the file is decoded as a whole.
"""

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.data.ffmpeg_child import (
    MAX_FRAME_PIXELS,
    MAX_LISTING_BYTES,
    Child,
    command,
    keep_timestamps,
    knows_packets,
    too_many_pixels,
)
from qwenvl_jax.data.files import LocalFile, local_file
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.data.packets import (
    ENTRY_UNITS,
    PICTURE_UNITS,
    Listing,
    Packets,
    among,
    one_of,
    packets_of,
    read_listing,
    runs_of,
    shown_times,
    within_runs,
)
from qwenvl_jax.errors import MediaError

MAX_SELECTED = 8192  # beyond as many frames the filter's expression gets long, and picking them here is cheaper
# Frames are decoded without those between if they are no more than this, and need at most this share of the packets.
MAX_SPARSE = 1024
SPARSE_SHARE = 0.5
# It takes a look at the whole file to tell which frames no other depends on: so many pixels must be decoded for frames
# that are not wanted, about a quarter of a second's work.
LEAST_SPARED_PIXELS = 1 << 27
_SHOWN = re.compile(r"\] n: *\d+ pts: *(-?\d+|NOPTS) .*? s:(\d+)x(\d+) ")

# Probes of one file follow each other: to measure it, and to decode it. A clip of a minute takes 100 kB.
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
        times = known_times(self.timestamps, len(frames), self.duration, "VideoFrames.")
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


def known_times(timestamps: Any, n: int, duration: float | None, of: str = "") -> np.ndarray:
    """f64[n], the times that a caller gives for frames, in seconds.

    Args:
      timestamps: as given.
      n: how many frames there are.
      duration: seconds, or None.
      of: what stands before their names in errors, such as "VideoFrames.".

    Raises:
      MediaError: times unknown, of another number, negative, not finite or decreasing, or a duration that ends before
        the last.
    """
    name = f"{of}timestamps"
    if timestamps is None:
        raise MediaError(f"{name} are unknown (None); give the time of each frame in seconds, they are never guessed.")
    try:
        times = np.asarray(timestamps, np.float64)
    except (TypeError, ValueError) as error:
        raise MediaError(f"{name} must be numbers, one time in seconds for each frame.") from error
    if times.shape != (n,):
        raise MediaError(
            f"{name} must be one time in seconds for each of the {n} frames, got shape {list(times.shape)}."
        )
    if not np.isfinite(times).all() or (times < 0).any():
        raise MediaError(
            f"{name} must be known, finite and not negative; give the time of each frame in seconds from the start of "
            "the clip."
        )
    if (np.diff(times) < 0).any():
        at = int(np.flatnonzero(np.diff(times) < 0)[0])
        raise MediaError(
            f"{name} must not decrease, but times {at} and {at + 1} are {times[at]} and {times[at + 1]}; put the "
            "frames in order of time."
        )
    if duration is not None and not duration >= times[-1]:
        raise MediaError(f"{of}duration={duration} must be at least the time of the last frame, {times[-1]}.")
    return times


@dataclasses.dataclass(frozen=True, eq=False)
class VideoInfo:
    """What a video file says about the frames it shows, in the order it shows them.

    Attributes:
      file: where it is.
      height, width: of a frame as shown, in pixels, after the rotation that the file asks for.
      times: f64[n], seconds from the first frame shown; at a constant rate exactly index / fps.
      fps: mean frames per second.
      constant_rate: whether one rate explains the times of all frames.
      duration: seconds from the first frame shown to the end of the last.
      ticks: i64[n], the stream's own presentation timestamps, in units of `time_base` seconds.
      packets: how to decode some frames without the others; None where that is not known.
    """

    file: LocalFile
    height: int
    width: int
    times: np.ndarray
    fps: float
    constant_rate: bool
    duration: float
    ticks: np.ndarray
    time_base: Fraction
    packets: Packets | None = None

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.file.path

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.file.name


def probe(source: str | Path | bytes | LocalFile) -> VideoInfo:
    """Reads the times and the size of a file's frames without decoding them.

    Where the container keeps no presentation times (AVI with reordered frames), the frames are decoded once for them.
    What was found in a file of the user's is remembered for as long as it has the same size and time.

    Raises:
      MediaError: the file is missing, empty, truncated, no video, a playlist, says nothing about times, or came to a
        limit of `qwenvl_jax.data.ffmpeg_child`.
    """
    file = source if isinstance(source, LocalFile) else local_file(source, "video")
    if file.temporary:
        return _probe(file)
    status = file.path.stat()
    key = (file.path, status.st_ino, status.st_size, status.st_mtime_ns)
    return _PROBED.get(key, lambda: _probe(file), lambda info: 500 + 7 * info.times.nbytes)


def _probe(file: LocalFile) -> VideoInfo:
    _check_ends(file)
    with Child(command(file.path, format="framecrc", c="copy"), file.name) as child:
        listing = child.stdout.read(MAX_LISTING_BYTES).decode("ascii", "replace")
        messages = child.finish()
    height, width = _shown_size(file, listing, messages)
    listed = read_listing(listing)
    ticks, lengths, time_base = shown_times(listed) or _times_by_decoding(file, listed)
    if not ticks:
        raise MediaError(f"{file.name} has no frames that are shown; make or copy it again.")
    order = np.argsort(ticks, kind="stable")
    info = _timeline(file, height, width, np.asarray(ticks, np.int64)[order], lengths[order[-1]], time_base)
    return dataclasses.replace(info, packets=packets_of(listed, info.ticks))


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
        raise MediaError(f"frames {wanted[0]} to {wanted[-1]} of {info.name} do not exist: it has {len(info.ticks)}.")
    done = 0
    for frame in skip_through(info, wanted):
        for _ in range(repeats[done]):
            yield frame
        done += 1
    if done < len(wanted):
        for frame, times in zip(stream_through(info, wanted[done:]), repeats[done:], strict=True):
            for _ in range(times):
                yield frame


def skip_through(info: VideoInfo, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Frames decoded without others that they do not depend on; ends early where that is not sure or no gain.

    Args:
      wanted: i64[k], rising.

    Yields:
      u8[H, W, 3] RGB; each came at its time, and of nothing before it did ffmpeg complain.
    """
    kept = _needed_packets(info, wanted)
    if kept is None or info.packets is None:
        return
    # Matroska does not tell when its first packets are decoded: the listing guesses, and the first few are decoded too.
    within = f"eq(dts,nopts)+{among(info.packets, kept)}"
    select = one_of(info.ticks[wanted].tolist(), "pts")
    arguments = command(
        info.path, packets=within, select=select, format="rawvideo", pix_fmt="rgb24", **keep_timestamps()
    )
    with Child(arguments, info.name, info.duration) as child:
        said = ""
        for tick in info.ticks[wanted].tolist():
            data = child.stdout.read(info.height * info.width * 3)
            said += child.said()
            shown = _SHOWN.search(said)
            if shown is None or re.search(r"\[(error|fatal)\]", said):
                return
            expected = (str(tick), str(info.width), str(info.height))
            if shown.groups() != expected or len(data) < info.height * info.width * 3:
                return
            said = said[shown.end() :]
            yield np.frombuffer(data, np.uint8).reshape(info.height, info.width, 3)


def _needed_packets(info: VideoInfo, wanted: np.ndarray) -> np.ndarray | None:
    """bool[m]: the packets to decode for some frames; None where that is not known, or where it is all of them."""
    packets = info.packets
    if packets is None or not knows_packets() or len(wanted) > MAX_SELECTED:
        return None
    far_apart = _from_key_frames(info, packets, wanted)
    upto = np.arange(len(packets.sent)) <= packets.place[wanted].max()
    kept = upto if far_apart is None else far_apart
    spared = (int(kept.sum()) - len(wanted)) * info.height * info.width
    if packets.codec not in PICTURE_UNITS or spared < LEAST_SPARED_PIXELS:
        return far_apart
    needed = _packets_with(info, packets, f"pass_types={PICTURE_UNITS[packets.codec]}:discard=nonref")
    if needed is None:
        return far_apart
    needed[packets.place[wanted]] = True
    return kept & needed


def _from_key_frames(info: VideoInfo, packets: Packets, wanted: np.ndarray) -> np.ndarray | None:
    """bool[m]: the packets from key frames to frames that lie far apart; None where they are not much less than all."""
    most = SPARSE_SHARE * len(packets.sent)
    if len(wanted) > MAX_SPARSE:
        return None
    flagged = within_runs(packets, runs_of(packets, packets.flagged, wanted))
    if not 0 < flagged.sum() <= most:
        return None
    entries = _packets_with(info, packets, f"pass_types={ENTRY_UNITS[packets.codec]}")
    if entries is None:
        return None
    kept = within_runs(packets, runs_of(packets, np.flatnonzero(entries), wanted))
    return kept if 0 < kept.sum() <= most else None


def _packets_with(info: VideoInfo, packets: Packets, units: str) -> np.ndarray | None:
    """bool[m]: the packets of which ffmpeg's `filter_units` leaves something; None where it fails."""
    arguments = command(info.path, format="framecrc", c="copy", **{"bsf:v": f"filter_units={units}"})
    try:
        with Child(arguments, info.name) as child:
            listing = child.stdout.read(MAX_LISTING_BYTES).decode("ascii", "replace")
            child.finish()
    except MediaError:  # decoding the whole will tell whether it matters
        return None
    return np.isin(packets.sent, [dts for dts in read_listing(listing).sent if dts is not None])


def stream_through(info: VideoInfo, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Frames picked while the file is decoded as a whole.

    Args:
      wanted: i64[k], rising.

    Yields:
      u8[H, W, 3] RGB.

    Raises:
      MediaError: as `read_frames`; when all have come, if they were others.
    """
    picked = len(wanted) <= MAX_SELECTED
    sent = wanted if picked else np.arange(wanted[0], wanted[-1] + 1)
    select = one_of(wanted.tolist(), "n") if picked else f"between(n,{wanted[0]},{wanted[-1]})"
    arguments = command(info.path, select=select, format="rawvideo", pix_fmt="rgb24", **keep_timestamps())
    asked = set(wanted.tolist())
    with Child(arguments, info.name, info.duration) as child:
        for number in sent.tolist():
            data = child.stdout.read(info.height * info.width * 3)
            if len(data) < info.height * info.width * 3:
                break
            if number in asked:
                yield np.frombuffer(data, np.uint8).reshape(info.height, info.width, 3)
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
    arguments = command(
        info.path,
        select=f"not(mod(n,{step}))",
        size=f"{side}x{side}",
        format="rawvideo",
        pix_fmt="rgb24",
        **keep_timestamps(),
    )
    expected = len(range(0, len(info.ticks), step))
    with Child(arguments, info.name, info.duration) as child:
        for n in range(expected):
            data = child.stdout.read(side * side * 3)
            if len(data) < side * side * 3:
                child.finish()
                raise MediaError(
                    f"{info.name} is damaged: of {expected} frames asked for, {n} came; re-encode it with "
                    "`ffmpeg -i IN OUT.mp4`."
                )
            yield np.frombuffer(data, np.uint8).reshape(side, side, 3)
        child.finish()


def _check_shown(info: VideoInfo, sent: np.ndarray, messages: str):
    """Raises MediaError unless ffmpeg logged exactly the frames asked for, at their times and of the size known."""
    shown = _SHOWN.findall(messages)
    base = re.search(r"config in time_base: (\d+/\d+)", messages)
    scale = Fraction(base[1]) / info.time_base if base else Fraction(1)
    expected = info.ticks[sent].tolist()
    right = sum(pts != "NOPTS" and int(pts) * scale == tick for (pts, _, _), tick in zip(shown, expected, strict=False))
    if len(shown) != len(expected) or right != len(expected):
        raise MediaError(
            f"{info.name} is damaged: of {len(expected)} frames asked for, {right} came at the time that the "
            "file's index gives; re-encode it with `ffmpeg -i IN OUT.mp4`."
        )
    other = [(int(h), int(w)) for _, w, h in shown if (int(h), int(w)) != (info.height, info.width)]
    if other:
        raise MediaError(
            f"{info.name} changes its frame size: {info.height} x {info.width} pixels (height x width), then "
            f"{other[0][0]} x {other[0][1]}; re-encode it with `ffmpeg -i IN OUT.mp4`."
        )


def _check_ends(file: LocalFile):
    """Refuses an MP4 or MOV that is shorter than its boxes, a GIF without its end mark, a TS that ends within a packet.

    ffmpeg takes the end of such a file for the end of the film when it falls between two frames.
    """
    name = file.name
    with open(file.path, "rb") as data:
        length = data.seek(0, 2)
        data.seek(0)
        head = data.read(189)
        if head[:4] == b"GIF8":
            data.seek(max(0, length - 64))
            if not data.read().rstrip(b"\0").endswith(b"\0;"):
                raise MediaError(f"{name} is truncated: the end mark of a GIF is missing; copy it again.")
        if head[:1] == head[188:] == b"G" and length % 188:
            raise MediaError(f"{name} is truncated: it ends within a packet of its transport stream; copy it again.")
        if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return
        start, seen = 0, set()
        while start + 8 <= length:
            data.seek(start)
            header = data.read(16)
            size, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if not re.fullmatch(rb"[ -~]{4}", kind):
                break  # something appended after the last box
            size = {0: length - start, 1: int.from_bytes(header[8:16], "big")}.get(size, size)
            if size < 8:
                break
            seen.add(kind)
            if start + size > length:
                raise MediaError(
                    f"{name} is truncated: {length} bytes, but its {kind.decode()} part needs {start + size}; "
                    "copy it again."
                )
            start += size
    if b"moov" not in seen:
        raise MediaError(f"{name} is truncated: it lacks the index (moov) of an MP4; copy or make it again.")


def _shown_size(file: LocalFile, listing: str, messages: str) -> tuple[int, int]:
    """(height, width) after the rotation that the stream asks for."""
    found = re.search(r"^#dimensions 0: (\d+)x(\d+)", listing, re.MULTILINE)
    if not found or not int(found[1]) or not int(found[2]):
        raise MediaError(f"{file.name} does not tell the size of its frames; re-encode it with `ffmpeg -i IN OUT.mp4`.")
    width, height = int(found[1]), int(found[2])
    if width * height > MAX_FRAME_PIXELS:
        raise too_many_pixels(file.name, width, height)
    output = messages[messages.find("Output #0") :]  # holds the one stream that was mapped
    rotation = re.search(r"display ?matrix: rotation of (-?[\d.]+) degrees", output, re.IGNORECASE)
    if rotation and round(float(rotation[1]) / 90) % 2:
        return width, height
    return height, width


def _times_by_decoding(file: LocalFile, listed: Listing) -> tuple[list[int], list[int], Fraction]:
    """The same as `shown_times`, from the decoder, which knows the times that some containers leave out."""
    lasts = float(sum(listed.lengths) * (listed.time_base or 0))
    with Child(command(file.path, select="1", format="null", **keep_timestamps()), file.name, lasts) as child:
        messages = child.finish()
    frames = re.findall(r"\] n: *\d+ pts: *(-?\d+|NOPTS) (?:.*? duration: *(\d+) )?", messages)
    base = re.search(r"config in time_base: (\d+/\d+)", messages)
    if not base or any(pts == "NOPTS" for pts, _ in frames):
        raise MediaError(
            f"{file.name} does not tell the times of its frames, and they are never guessed; re-encode it with "
            "`ffmpeg -i IN OUT.mp4`."
        )
    return [int(pts) for pts, _ in frames], [int(d or 0) for _, d in frames], Fraction(base[1])


def _timeline(
    file: LocalFile, height: int, width: int, ticks: np.ndarray, last_length: int, time_base: Fraction
) -> VideoInfo:
    """Seconds from ticks. Where a constant rate explains every tick to within one, times are exactly index / rate."""
    n, since = len(ticks), ticks - ticks[0]
    span = since[-1] * time_base
    last = last_length * time_base if last_length > 0 else (span / (n - 1) if n > 1 else Fraction(0))
    duration = span + last
    if (n > 1 and span == 0) or duration == 0:
        raise MediaError(f"{file.name} gives all its frames the same time; re-encode it with its frame rate stated.")
    rate = _constant_rate(since, time_base) if n > 1 else None
    if rate is not None:
        times = np.arange(n) / float(rate)
    else:
        times = since * time_base.numerator / time_base.denominator
    return VideoInfo(
        file=file,
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
