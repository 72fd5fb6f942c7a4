"""Pictures of token budgets, computed by the package's own rules for frames and sizes: docs/budgets.png.

    python -m tools.plot_budgets [--out docs/budgets.png]

Left and middle: tokens of a video against its length, at several frame rates, under the cap on a video with which a
generation was trained or judged, and how high frames are then, of a video of 720p. A dot is where the cap begins to
make frames smaller. Right: at an equal number of tokens, frame rate against the height of frames, for frames that are
pooled and not, of a video of 1080p.
"""

import argparse
import dataclasses

import numpy as np

from qwenvl_jax.data.frames import public_opener
from qwenvl_jax.data.media import MediaOpener
from qwenvl_jax.data.sampling import pooled_size

SOURCE_FPS = 30.0
HD, FULL_HD = (720, 1280), (1080, 1920)
MAX_FRAMES = 2048
RATES = (0.5, 1.0, 2.0, 4.0)
POOLS = (1, 2, 3)
# Of a clip, for the picture on the right.
SECONDS, BUDGET = 60, 16_384
COLOURS = ("#9bb0ee", "#3457d5", "#e4972e", "#c23b22")


@dataclasses.dataclass(frozen=True)
class Case:
    """A generation and the caps of its videos, in tokens."""

    title: str
    model: str
    caps: dict[str, int]


CASES = (
    Case("Qwen2-VL: 16,384 tokens a video", "qwen2_vl_7b", {"max_video_tokens": 16_384}),
    Case(
        "Qwen3-VL: 224K a video, 768 a frame", "qwen3_vl_8b", {"max_video_tokens": 224 * 1024, "max_frame_tokens": 768}
    ),
)


def sized(
    opener: MediaOpener, seconds: float, fps: float, size: tuple[int, int], *, pool: int = 1, **caps: int
) -> tuple[int, int]:
    """(tokens of a video in the prompt, height of its frames in pixels)."""
    config = opener.video
    rule = opener.generation.sampling[opener.dialect]
    n_frames = round(seconds * SOURCE_FPS)
    n = len(rule(n_frames, SOURCE_FPS, fps=fps, min_frames=config.min_frames, max_frames=MAX_FRAMES))
    height, width = pooled_size(
        opener.generation.video_size,
        n,
        *size,
        pool=pool,
        factor=config.factor,
        temporal_factor=config.temporal_patch_size,
        cap_tokens=config.cap_tokens,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        **caps,
    )
    rows, columns = height // config.factor, width // config.factor
    return -(-n // config.temporal_patch_size) * -(-rows // pool) * -(-columns // pool), height


def draw(out: str) -> None:
    """Draws the picture into a file."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 8}):
        figure = Figure(figsize=(12, 5.2), layout="constrained", dpi=100)
        grid = figure.add_gridspec(2, 3)
        for column, case in enumerate(CASES):
            above = figure.add_subplot(grid[0, column])
            _draw_case(above, figure.add_subplot(grid[1, column], sharex=above), case)
        _draw_trade(figure.add_subplot(grid[:, 2]))
        for panel in figure.axes:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(color="#e6e9ee", linewidth=0.7)
        figure.savefig(out)


def _draw_case(above, below, case: Case) -> None:
    opener, seconds = public_opener(case.model), np.geomspace(4, 4 * 3600, 160)
    for fps, colour in zip(RATES, COLOURS, strict=True):
        tokens, heights = np.transpose([sized(opener, time, fps, HD, **case.caps) for time in seconds])
        above.plot(seconds, tokens, color=colour, linewidth=1.5, label=f"{fps:g} fps")
        below.plot(seconds, heights, color=colour, linewidth=1.5)
        # The rule of Qwen3-VL counts an odd number of frames as one more, so that short videos waver.
        last = np.flatnonzero(heights == heights.max())[-1]
        above.plot(seconds[last], tokens[last], "o", color=colour, markersize=5)
    cap = case.caps["max_video_tokens"]
    above.axhline(cap, color="0.5", linewidth=0.8, linestyle="--")
    above.set_title(case.title, fontsize=9, loc="left", fontweight="bold")
    above.set(xscale="log", yscale="log", ylabel="tokens of the video", ylim=(1000, 400_000))
    ticks = (1000, 4000, 16_000, 64_000, 256_000)
    above.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    above.minorticks_off()
    above.legend(frameon=False, loc="lower right")
    above.tick_params(labelbottom=False)
    below.set(xlabel="length of the video", ylabel="height of frames, pixels", ylim=(0, HD[0] + 30))
    times = {4: "4 s", 15: "15 s", 60: "1 min", 240: "4 min", 900: "15 min", 3600: "1 h", 14_400: "4 h"}
    below.set_xticks(list(times), list(times.values()))
    below.minorticks_off()


def _draw_trade(panel) -> None:
    opener, rates = public_opener("qwen3_vl_8b"), np.geomspace(0.25, 8, 120)
    for pool, colour in zip(POOLS, COLOURS[1:], strict=True):
        heights = [sized(opener, SECONDS, fps, FULL_HD, pool=pool, max_video_tokens=BUDGET)[1] for fps in rates]
        label = "a token for each 32 x 32 pixels" if pool == 1 else f"pooled {pool} x {pool}"
        panel.plot(rates, heights, color=colour, linewidth=1.5, label=label)
    panel.set_title(f"Qwen3-VL: {SECONDS} s in {BUDGET:,} tokens", fontsize=9, loc="left", fontweight="bold")
    panel.set(xscale="log", xlabel="frames per second", ylabel="height of frames, pixels", ylim=(0, FULL_HD[0] + 30))
    ticks = (0.25, 0.5, 1, 2, 4, 8)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.legend(frameon=False, loc="lower left")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/budgets.png", help="the file; default: docs/budgets.png")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
