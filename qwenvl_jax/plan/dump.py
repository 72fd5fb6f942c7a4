"""What the compiler writes to a folder (`xla_dump_to`): the program, and which memory its buffers have."""

import re
from pathlib import Path
from typing import Any

from qwenvl_jax.parallel.mesh import AXES, axis_across
from qwenvl_jax.plan.hlo import exchanges

_PROGRAM = "*.after_optimizations.txt"
_BUFFERS = "*.after_optimizations-buffer-assignment.txt"
_AFTERWARDS = "*.after_optimizations_after_buffer_assignment.txt"
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(?: color (\d+),)? (.*)$", re.MULTILINE)
# Numbers of memory spaces: none is HBM; other numbers are those of memories on the chip.
_HOST = "5"


def sent_bytes(dump: Path, mesh_shape: tuple[int, ...], slices: int = 1) -> dict[str, Any]:
    """What a device sends: "sent" by mesh axes and kind, most first; "across", of it to other slices; and
    "unknown_loops", of how many loops the length is not known.

    None where the compiler came to no program.
    """
    file = _only(dump, _PROGRAM)
    if file is None:
        return {"sent": None, "across": None, "unknown_loops": 0}
    found, sent, across = exchanges(file.read_text()), dict[str, int](), 0
    outermost = AXES[axis_across(mesh_shape, slices)]
    for exchange, count in found.counts.items():
        axes = outermost if exchange.between_slices else "+".join(AXES[axis] for axis in exchange.axes(mesh_shape))
        key = f"{axes} {exchange.kind}"
        sent[key] = sent.get(key, 0) + exchange.sent * count
        across += exchange.sent * count if exchange.between_slices else 0
    ordered = {key: sent[key] for key in sorted(sent, key=lambda key: -sent[key]) if sent[key]}
    return {"sent": ordered, "across": across, "unknown_loops": found.unknown_loops}


def assigned(dump: Path) -> bool:
    """Whether the compiler has given all buffers their memory, and written that down."""
    program, afterwards = _only(dump, _PROGRAM), _only(dump, _AFTERWARDS)
    return program is not None and afterwards is not None and afterwards.stat().st_size >= program.stat().st_size > 0


def assigned_bytes(dump: Path) -> dict[str, int]:
    """Bytes of a device that the buffers of a program have: the figures that `memory_analysis` gives once it is whole.

    arguments, temporaries, outputs, aliased (of the outputs, in place of arguments) and host.
    """
    file = _only(dump, _BUFFERS)
    assert file is not None  # `assigned` has been asked
    found = dict.fromkeys(("arguments", "temporaries", "outputs", "aliased", "host"), 0)
    for size, color, kind in _ALLOCATION.findall(file.read_text()):
        count = int(size)
        if "preallocated-temp" in kind:
            found["host" if color == _HOST else "temporaries"] += count if color in ("", _HOST) else 0
        elif not color and "parameter" in kind:
            found["arguments"] += count
            found["aliased"] += count if "maybe-live-out" in kind else 0
        elif not color and "maybe-live-out" in kind:
            found["outputs"] += count
    return found | {"outputs": found["outputs"] + found["aliased"]}


def _only(dump: Path, pattern: str) -> Path | None:
    files = sorted(dump.glob(pattern))
    return files[-1] if files else None
