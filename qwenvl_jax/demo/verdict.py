"""What a run of the demo had to show, and the table of what it showed."""

from collections.abc import Sequence

import rich.table

from qwenvl_jax.demo.evaluate import Figures
from qwenvl_jax.demo.report import Check, Row, StageCurve

# At least, of the questions about clips never seen; and at most, with the pixels blanked, above the best blind answer.
WANTED_STARTS, WANTED_IOU, ABOVE_CHANCE = 0.80, 0.60, 0.05


def figures_wanted(
    figures: Figures,
    blanked: Figures,
    chance: Figures,
    stages: Sequence[StageCurve],
    same: int,
) -> list[Check]:
    """What the run had to show, and whether it did.

    Args:
      figures, blanked, chance: of the judged model, of the same with the pixels blanked, of who does not look.
      stages: every one of them must lower the loss on held-out clips.
      same: answers that the export gives as the model did.
    """

    def percent(value: float) -> str:
        return f"{100 * value:.0f} %"

    most_starts, most_iou = chance.starts + ABOVE_CHANCE, chance.iou + ABOVE_CHANCE
    lowered = [stage.name for stage in stages if stage.held_out and stage.held_out[1] < stage.held_out[0]]
    count = figures.count
    rows = [
        ("starts within 0.5 s", f"at least {percent(WANTED_STARTS)}", percent(figures.starts)),
        ("mean IoU", f"at least {WANTED_IOU:.2f}", f"{figures.iou:.2f}"),
        ("starts, pixels blanked", f"at most {percent(most_starts)}", percent(blanked.starts)),
        ("mean IoU, pixels blanked", f"at most {most_iou:.2f}", f"{blanked.iou:.2f}"),
        ("stages that lower the held-out loss", f"all {len(stages)}", f"{len(lowered)} of {len(stages)}"),
        ("answers the same after export", f"{count} of {count}", f"{same} of {count}"),
    ]
    met = [
        figures.starts >= WANTED_STARTS,
        figures.iou >= WANTED_IOU,
        blanked.starts <= most_starts,
        blanked.iou <= most_iou,
        len(lowered) == len(stages),
        same == count,
    ]
    return [Check(*row, met=reached) for row, reached in zip(rows, met, strict=True)]


def figures_table(rows: Sequence[Row]) -> rich.table.Table:
    """The table of figures, for the terminal."""
    table = rich.table.Table(box=None, padding=(0, 2))
    for name in ("", "starts", "ends", "IoU", "name", "JSON"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        f = row.figures
        known = ("", "") if row.kind == "blind" else (f"{f.names:.0%}", f"{f.json:.0%}")
        table.add_row(row.name, f"{f.starts:.0%}", f"{f.ends:.0%}", f"{f.iou:.2f}", *known)
    return table
