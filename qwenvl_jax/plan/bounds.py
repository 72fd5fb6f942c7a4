"""What a compiled step cannot be faster than: bounds by arithmetic, memory and networks, each as if it were alone.

    compute     FLOPs of the step / (devices * peak)          what rematerialization makes again is not counted
    hbm         (arguments + outputs + 2 * temporaries) / bandwidth       each read or written once at least
    ici         bytes that a device sends / what its links send together
    dcn         bytes of them that go to other slices / what a device has of the network between them; None within one

They are no prediction: a step takes longer than the largest of them.
"""

import dataclasses

from qwenvl_jax.plan.compiling import Compiled
from qwenvl_jax.plan.topology import Topology

DAY = 86_400  # seconds
# Of HBM that arguments and temporaries may take: what a run holds besides its step needs the rest.
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of a device, in bytes.

    Attributes:
      limit: what a program may use; `USABLE` of it is what a step may take.
      arguments, temporaries, total: of the step; those that are not known of one that does not compile are None.
      refused: whether the compiler refused it.
    """

    limit: int
    arguments: int | None
    temporaries: int | None
    total: int | None
    refused: bool = False

    @property
    def fits(self) -> bool:
        """Whether the step fits, with room to spare."""
        return not self.refused and self.total is not None and self.total <= USABLE * self.limit

    @property
    def excess(self) -> int:
        """Bytes by which it does not."""
        return max(0, (self.total or 0) - int(USABLE * self.limit))


def memory(compiled: Compiled, topology: Topology) -> Memory:
    """The HBM that a compiled step takes; outputs that are not where arguments were count as temporaries."""
    limit = topology.hardware.hbm
    if compiled.arguments is None or compiled.temporaries is None:
        return Memory(limit, sum(compiled.state.values()), None, compiled.needed, refused=True)
    apart = (compiled.outputs or 0) - (compiled.aliased or 0)
    temporaries = compiled.temporaries + apart
    total = compiled.arguments + temporaries
    return Memory(limit, compiled.arguments, temporaries, total, refused=compiled.needed is not None)


def bounds(compiled: Compiled, topology: Topology) -> dict[str, float | None]:
    """Seconds that a step takes at least, by what bounds it; None where it is not known, or nothing is exchanged."""
    hardware = topology.hardware
    found: dict[str, float | None] = {"compute": compiled.flops / (topology.devices * hardware.flops)}
    moved = None
    if compiled.arguments is not None and compiled.temporaries is not None:
        moved = compiled.arguments + (compiled.outputs or 0) + 2 * compiled.temporaries
    found["hbm"] = moved / hardware.hbm_bandwidth if moved is not None else None
    sent, across = compiled.sent, compiled.across
    found["ici"] = (sum(sent.values()) - (across or 0)) / hardware.ici if sent is not None else None
    return found | {"dcn": across / hardware.dcn if across is not None and topology.slices > 1 else None}


def by_axis(sent: dict[str, int] | None) -> dict[str, int] | None:
    """Bytes that a device sends, by mesh axes, such as "fsdp" or "fsdp+context"."""
    if sent is None:
        return None
    axes: dict[str, int] = {}
    for key, count in sent.items():
        name = key.split(" ")[0]
        axes[name] = axes.get(name, 0) + count
    return axes
