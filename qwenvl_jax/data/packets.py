"""What ffmpeg's listing says of the packets of a stream, and which of them some frames can be decoded from.

The listing is that of its `framecrc` format: a line a packet, in the order of the file, with the times at which it is
decoded and shown, in ticks of the stream's time base.
"""

import dataclasses
import re
from fractions import Fraction

import numpy as np

# By codec, the kinds of units (NAL) at which decoding can begin whatever came before: IDR, and of HEVC CRA and BLA too.
# The flag of a key frame is not enough. It also stands at the recovery points of H.264, and where a container says so.
ENTRY_UNITS = {"h264": "5", "hevc": "16-21"}
# By codec, the units that hold pictures, where a unit says that no other picture depends on its own. HEVC says so only
# within a temporal layer, and a picture of a higher one may depend on it.
PICTURE_UNITS = {"h264": "1-5"}

_DISCARDED = 0x4  # packet flag: needed to decode others, but outside the edit list and never shown
_KEY = 0x1


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """What the listing says of the packets, in the order of the file.

    Attributes:
      codec: its name in ffmpeg.
      time_base: seconds per tick, or None.
      shown, sent: presentation and decoding times in ticks; None where unknown.
      lengths: in ticks.
      flags: of each packet.
    """

    codec: str
    time_base: Fraction | None
    shown: list[int | None]
    sent: list[int | None]
    lengths: list[int]
    flags: list[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Packets:
    """The packets of a stream whose frames can be decoded from key frames on.

    Attributes:
      codec: its name in ffmpeg, out of `ENTRY_UNITS`.
      sent: i64[m], when each is decoded, in the order of the file, rising, in ticks.
      shown: i64[m], when its frame is shown.
      place: i64[n], the packet of each frame of `VideoInfo.ticks`.
      flagged: i64[k], the packets that are said to be key frames.
    """

    codec: str
    sent: np.ndarray
    shown: np.ndarray
    place: np.ndarray
    flagged: np.ndarray


def read_listing(text: str) -> Listing:
    """Reads what ffmpeg wrote."""
    codec = re.search(r"^#codec_id 0: (\w+)", text, re.MULTILINE)
    base = re.search(r"^#tb 0: (\d+/\d+)", text, re.MULTILINE)
    rows = re.findall(
        r"^0, *(-?\d+|NOPTS), *(-?\d+|NOPTS), *(-?\d+), *\d+, *0x\w+(?:, *F=0x(\w+))?", text, re.MULTILINE
    )
    unknown = ("NOPTS", "-9223372036854775808")
    return Listing(
        codec[1] if codec else "",
        Fraction(base[1]) if base else None,
        shown=[None if pts in unknown else int(pts) for _, pts, _, _ in rows],
        sent=[None if dts in unknown else int(dts) for dts, _, _, _ in rows],
        lengths=[int(length) for _, _, length, _ in rows],
        flags=[int(flags or "1", 16) for *_, flags in rows],
    )


def shown_times(listed: Listing) -> tuple[list[int], list[int], Fraction] | None:
    """Ticks and lengths of the packets that are shown, in file order; seconds per tick. None if a time is missing."""
    found = [
        (pts, length)
        for pts, length, flags in zip(listed.shown, listed.lengths, listed.flags, strict=True)
        if not flags & _DISCARDED
    ]
    if listed.time_base is None or any(pts is None for pts, _ in found):
        return None
    return [pts for pts, _ in found if pts is not None], [length for _, length in found], listed.time_base


def packets_of(listed: Listing, ticks: np.ndarray) -> Packets | None:
    """The packets behind frames; None where they cannot be told apart by their times, or for codecs of other kinds.

    Args:
      ticks: i64[n], of the frames shown, in order of time.
    """
    if listed.codec not in ENTRY_UNITS or None in listed.shown or None in listed.sent:
        return None
    shown, sent = np.asarray(listed.shown, np.int64), np.asarray(listed.sent, np.int64)
    flags = np.asarray(listed.flags, np.int64)
    place = np.flatnonzero(flags & _DISCARDED == 0)
    place = place[np.argsort(shown[place], kind="stable")]
    if not np.array_equal(shown[place], ticks) or any((np.diff(values) <= 0).any() for values in (sent, ticks)):
        return None
    return Packets(listed.codec, sent, shown, place, np.flatnonzero(flags & _KEY))


def runs_of(packets: Packets, keys: np.ndarray, wanted: np.ndarray) -> list[tuple[int, int]]:
    """First and last packet of each stretch that is decoded for some frames; none if one has no key frame before it.

    Args:
      keys: i64[k], rising, the packets to begin at.
      wanted: i64[k], rising, into the frames shown.
    """
    if not len(keys) or (np.diff(packets.shown[keys]) <= 0).any():
        return []
    places = packets.place[wanted]
    last = np.searchsorted(packets.shown[keys], packets.shown[places], side="right") - 1
    if (last < 0).any() or (keys[last] > places).any():
        return []
    found: list[tuple[int, int]] = []
    for key, place in zip(keys[last].tolist(), places.tolist(), strict=True):
        if found and key <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], place))
        else:
            found.append((key, place))
    return found


def within_runs(packets: Packets, runs: list[tuple[int, int]]) -> np.ndarray:
    """bool[m]: the packets that are decoded for runs.

    Frames that follow a key frame in the file but are shown before it need what stood before it, and are left out.
    """
    kept = np.zeros(len(packets.sent), bool)
    for start, end in runs:
        kept[start : end + 1] = packets.shown[start : end + 1] >= packets.shown[start]
    return kept


def one_of(numbers: list[int], variable: str) -> str:
    """ffmpeg's expression for a variable being one of these, which rise: a search tree, since it refuses a sum of more
    than 100 terms.
    """
    return _tree([(number, f"eq({variable},{number})") for number in numbers], variable)


def among(packets: Packets, kept: np.ndarray) -> str:
    """ffmpeg's expression for a packet that is one of these.

    Args:
      kept: bool[m], at least one.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]])))
    spans = zip(packets.sent[edges[::2]].tolist(), packets.sent[edges[1::2] - 1].tolist(), strict=True)
    return _tree([(first, f"between(dts,{first},{last})") for first, last in spans], "dts")


def _tree(leaves: list[tuple[int, str]], variable: str) -> str:
    """ffmpeg's expression that is, for each value of a variable, the last of these that begin at no more than it."""
    if len(leaves) == 1:
        return leaves[0][1]
    half = len(leaves) // 2
    left, right = _tree(leaves[:half], variable), _tree(leaves[half:], variable)
    return f"if(lt({variable},{leaves[half][0]}),{left},{right})"
