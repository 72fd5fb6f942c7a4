"""A picture of how a video is sampled: a contact sheet of its frames, over a timeline of motion and of frames taken."""

import math
from pathlib import Path

import numpy as np

from qwenvl_jax.data import image, motion, video
from qwenvl_jax.data.frames import Preview
from qwenvl_jax.errors import ConfigError

COLUMNS = 8
MAX_SHOWN = 64
FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def draw(seen: Preview, out: str | Path) -> Path:
    """Writes the picture; of more than `MAX_SHOWN` frames, as many of them are shown, evenly, and the title says so.

    Args:
      seen: the video.
      out: a file whose ending is one of `FORMATS`; it is replaced.

    Raises:
      ConfigError: another ending, or a folder that is not there.
      MediaError: the file cannot be decoded.
    """
    out = check_picture(out)
    import matplotlib.figure

    choice = seen.opened.choice
    assert choice is not None  # of a file
    n = len(choice.indices)
    shown = np.unique(np.linspace(0, n - 1, min(n, MAX_SHOWN)).round().astype(np.int64))
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    height, width = _thumbnail(seen)
    cell = 1.5 * height / width
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 8}):
        figure = matplotlib.figure.Figure(
            figsize=(1.55 * COLUMNS, rows * (cell + 0.3) + 2.9), layout="constrained", dpi=110
        )
        halves = figure.subfigures(2, 1, squeeze=False, height_ratios=(rows * (cell + 0.3) + 0.5, 2.4))
        above, below = halves.ravel().tolist()
        of = "" if len(shown) == n else f" ({len(shown)} of them shown)"
        t, h, w = seen.opened.grid
        above.suptitle(
            f"{Path(seen.info.name).name}: {n} frames{of}, {t} x {h} x {w} patches, {seen.tokens:,} tokens", fontsize=10
        )
        panels = above.subplots(rows, COLUMNS, squeeze=False).ravel()
        for panel in panels:
            panel.set_axis_off()
        frames = video.read_frames(seen.info, choice.indices[shown])
        for panel, frame, time, index in zip(panels, frames, choice.times[shown], choice.indices[shown], strict=False):
            panel.imshow(image.resize(frame, height, width))
            panel.set_title(f"{time:.2f} s, {index}", fontsize=7, pad=2)
        _draw_timeline(below.subplots(), seen)
        figure.savefig(out)
    return out


def check_picture(out: str | Path) -> Path:
    """The path of a picture that can be drawn.

    Raises:
      ConfigError: an ending that is none of `FORMATS`, or a folder that is not there.
    """
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out {out} must end with one of {', '.join(FORMATS)}; change its ending.")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out} is in a folder that does not exist; make the folder, or choose another.")
    return out


def _thumbnail(seen: Preview) -> tuple[int, int]:
    """Height and width of a frame on the sheet, in pixels; at most 160 to the side."""
    scale = 160 / max(seen.info.height, seen.info.width)
    return max(1, round(seen.info.height * scale)), max(1, round(seen.info.width * scale))


def _draw_timeline(panel, seen: Preview) -> None:
    """How much is going on over time, where shots begin, and a tick for each frame taken."""
    scores = motion.motion_scores(seen.info)
    times, choice = seen.info.times, seen.opened.choice
    assert choice is not None
    panel.fill_between(times, motion.activity(scores, times), color="#b9c6ee", linewidth=0, label="motion")
    beginnings = times[scores.frames[motion.cuts(scores)]]
    if len(beginnings):
        panel.vlines(beginnings, 0, 1.05, color="#3457d5", linewidth=0.8, linestyle="--", label="a shot begins")
    panel.vlines(choice.times, -0.3, -0.05, color="#e4572e", linewidth=0.8, label="frame taken")
    panel.set_ylim(-0.35, 1.1)
    panel.set_xlim(-0.005 * seen.info.duration, seen.info.duration)  # so that a frame at 0 is seen
    panel.set_yticks([0, 1])
    panel.set_xlabel("seconds")
    panel.legend(loc="upper right", fontsize=7, ncols=3, frameon=False, bbox_to_anchor=(1, 1.2))
    panel.spines[["top", "right"]].set_visible(False)
