"""Pages that need no other file: how a report looks, and how it is written."""

import io
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of `page.css` for what matplotlib draws.
ACCENT, PALE, GRID, ALERT = "#3457d5", "#c7cdd6", "#e6e9ee", "#e4572e"


def write_page(template: str | os.PathLike, target: str | os.PathLike, **values: Any) -> Path:
    """Fills a template and writes the page, whole or not at all.

    Args:
      template: a Jinja file; its values are escaped, and it may include `page.css`, the common style.
      target: the page, whose folder is made.
      **values: what the template names.

    Returns:
      The path of the page.
    """
    template, target = Path(template), Path(target)
    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["percent"] = lambda value: f"{100 * value:.0f} %"
    page = environment.get_template(template.name).render(**values)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(target)
    return target


def drawing() -> AbstractContextManager:
    """A context in which matplotlib draws as the pages do: text stays text, in the font of the page."""
    import matplotlib

    return matplotlib.rc_context(
        {"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "same"}
    )


def svg_of(figure: "Figure") -> str:
    """A figure as an SVG element, the same each time."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """f64[n - window + 1], the means of each `window` values in a row."""
    return np.convolve(values, np.ones(window) / window, mode="valid")


def style_panel(panel: "Axes") -> None:
    """The look of a panel: lines across, no frame above and at the right."""
    panel.grid(axis="y", color=GRID, linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)


def log_scale(panel: "Axes") -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    from matplotlib import ticker

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_locator(ticker.NullLocator())
