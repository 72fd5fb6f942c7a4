"""How much a video changes from frame to frame: scores from a small decode, and what they say about it.

A frame is looked at as 32 x 32 RGB pixels, each the mean of its part of the picture. Colour counts: a cut from red to
green leaves the brightness as it was.
"""

import dataclasses

import numpy as np

from qwenvl_jax.data.image import check_file
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.data.video import VideoInfo, read_small

SIDE = 32
MAX_FPS = 61.0  # of a faster file, every second frame or fewer are looked at

# Encoding alone changes small frames by less than this from one to the next, of 1.
NOISE = 2 / 255
# The change within a second that counts as full motion: the most there is within shots, if it lies between these.
LEAST_FULL_MOTION = 0.1
MOST_FULL_MOTION = 1.5
BIN_SECONDS = 0.25

# A cut changes the picture and its colours by this together, of 2, and by a multiple of what the frames around it do.
CUT_CHANGE = 0.12
CUT_RATIO = 3.0
CUT_NEIGHBOURS = 8

_SCORED = Kept(64 << 20)


@dataclasses.dataclass(frozen=True, eq=False)
class Motion:
    """Scores of a video, for each frame that was looked at.

    Attributes:
      frames: i64[m], their indices, rising.
      moved: f64[m], difference from the frame before, in [0, 1]: the mean of the tenth of the picture that differs
        most, so that what is small counts while it moves. The first is 0.
      changed: f64[m], in [0, 2], mean difference of the whole picture plus that of its colours wherever they are. The
        first is 0.
    """

    frames: np.ndarray
    moved: np.ndarray
    changed: np.ndarray

    def part(self, first: int, end: int) -> "Motion":
        """The scores of frames `first` to `end` - 1, counted from `first`."""
        chosen = (self.frames >= first) & (self.frames < end)
        moved, changed = self.moved[chosen], self.changed[chosen]
        if len(moved):  # the first has nothing before it now
            moved[0] = changed[0] = 0.0
        return Motion(self.frames[chosen] - first, moved, changed)


def motion_scores(info: VideoInfo) -> Motion:
    """Decodes a file at a small size and scores its frames; remembered while the file has the same size and time.

    The same file gives the same scores. Memory does not grow with the size of frames; scores take 24 bytes a frame.

    Raises:
      MediaError: the file cannot be decoded.
    """
    status = check_file(info.path, "video").stat()
    key = (info.path, status.st_ino, status.st_size, status.st_mtime_ns)
    return _SCORED.get(key, lambda: _score(info), lambda motion: 500 + 3 * motion.moved.nbytes)


def _score(info: VideoInfo) -> Motion:
    step = max(1, int(np.ceil(info.fps / MAX_FPS)))
    frames = np.arange(0, len(info.ticks), step)
    moved, changed = np.zeros(len(frames)), np.zeros(len(frames))
    before: tuple[np.ndarray, np.ndarray] | None = None
    for i, pixels in enumerate(read_small(info, step=step, side=SIDE)):
        now = pixels.astype(np.int16), _colours(pixels)
        if before is not None:
            moved[i], changed[i] = _differences(before, now)
        before = now
    return Motion(frames, moved, changed)


def _colours(pixels: np.ndarray) -> np.ndarray:
    """f64[3, 16], shares of each channel's values in 16 steps; neighbours are mixed, so that no edge decides."""
    counts = np.stack([np.bincount(pixels[..., c].ravel() >> 4, minlength=16) for c in range(3)]) / SIDE**2
    padded = np.pad(counts, ((0, 0), (1, 1)), mode="edge")
    return (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4


def _differences(one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """`moved` and `changed` between two small frames with their colours."""
    cells = np.abs(two[0] - one[0]).mean(axis=2).ravel() / 255
    most = np.partition(cells, -(len(cells) // 10))[-(len(cells) // 10) :]
    colours = np.abs(two[1] - one[1]).sum(axis=1).mean() / 2
    return float(most.mean()), float(cells.mean() + colours)


def activity(motion: Motion, times: np.ndarray) -> np.ndarray:
    """How much is going on around each frame, from 0 (nothing) to 1 (as much as there is, or as counts as much).

    Change is summed up in quarters of a second and divided by full motion (`MOST_FULL_MOTION`, less in a quieter
    video). A quarter counts as much as the busier of its neighbours, so that frames just before and after motion belong
    to it.

    Args:
      motion: of the clip.
      times: f64[n], seconds of all its frames.

    Returns:
      f64[n].
    """
    # No more bins than frames can fill, whatever times a file tells.
    width = max(BIN_SECONDS, float(times[-1] - times[0]) / (4 * len(times)))
    bins = np.floor((times - times[0]) / width).astype(np.int64)
    change = np.maximum(motion.moved - NOISE, 0)
    within = change.copy()
    within[cuts(motion)] = 0  # one cut is no measure for how much may move
    path, most = (np.bincount(bins[motion.frames], c, minlength=bins[-1] + 1) / width for c in (change, within))
    full = min(max(most.max(), LEAST_FULL_MOTION), MOST_FULL_MOTION)
    level = np.minimum(path / full, 1)
    padded = np.pad(level, 1)
    return np.maximum.reduce([padded[:-2], padded[1:-1], padded[2:]])[bins]


def cuts(motion: Motion) -> np.ndarray:
    """Where one shot ends and the next begins: i64[k], rising, into `motion.frames`, each the first of a new shot.

    Only cuts from one frame to the next are found; a dissolve is motion. A flash of a frame counts as two cuts.
    """
    changed, n = motion.changed, len(motion.changed)
    found = []
    for i in np.flatnonzero(changed >= CUT_CHANGE):
        around = np.concatenate(
            [changed[max(1, i - CUT_NEIGHBOURS) : i], changed[i + 1 : min(n, i + 1 + CUT_NEIGHBOURS)]]
        )
        # Three quarters of the neighbours are quieter by far: shots may be short.
        if not len(around) or changed[i] >= CUT_RATIO * np.quantile(around, 0.75):
            found.append(i)
    return np.asarray(found, np.int64)
