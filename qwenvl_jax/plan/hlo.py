"""What a compiled program exchanges between devices, read from the text of its HLO.

`Compiled.as_text` of libtpu 0.0.52 fails for programs with ragged or asynchronous exchanges, whose protos have more
operands than its reader expects; what the compiler writes to a folder (`xla_dump_to`) is read here instead. A loop's
exchanges count as often as the loop goes round.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from qwenvl_jax.errors import QwenVLError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch|called)_computations=\{([^}]*)\}")
_BETWEEN_SLICES = 'handler_name="xla_megascale_runtime"'
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z\d]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """An instruction by which devices exchange something.

    Attributes:
      kind: one of `KINDS`.
      sent: bytes that a device sends, as rings have it: with n devices in a group and b bytes that each of them gives,
        (n - 1) b to gather, (n - 1) / n b to scatter sums or to exchange, twice that to sum, b to permute. Of a ragged
        exchange b is the smaller of what it takes and gives, which is what goes where all devices get alike.
      groups: of devices, by place in the mesh, that exchange among themselves; pairs (from, to) of a permutation; empty
        of an exchange between slices.
      between_slices: whether it goes through the network between slices: one device of each slice takes part.
    """

    kind: str
    sent: int
    groups: tuple[tuple[int, ...], ...]
    between_slices: bool = False

    def axes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The axes of a mesh of this shape along which devices of a group differ."""
        places = np.asarray([np.unravel_index(group, shape) for group in self.groups])  # [groups, axes, devices]
        return tuple(np.flatnonzero((places != places[:, :, :1]).any(axis=(0, 2))).tolist())


@dataclasses.dataclass(frozen=True)
class Exchanges:
    """All that a program exchanges.

    Attributes:
      counts: how often each instruction runs.
      unknown_loops: loops of which it is not known how often they go round; what is in them counts once.
    """

    counts: collections.Counter[Exchange]
    unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


def exchanges(text: str) -> Exchanges:
    """The exchanges of a program in HLO text."""
    computations, entry = _parsed(text)
    unknown = set[str]()

    @functools.cache
    def total(name: str) -> collections.Counter[Exchange]:
        counts: collections.Counter[Exchange] = collections.Counter()
        shapes = {one.name: one.shape for one in computations[name]}
        for one in computations[name]:
            kind = one.opcode.removesuffix("-start")
            if kind in KINDS:
                counts[_exchange(one, kind, shapes, scattered=name.startswith("all-reduce-scatter"))] += 1
            elif one.opcode == "send" and _BETWEEN_SLICES in one.attributes:
                counts[_exchange_between_slices(one, shapes)] += 1
            elif one.opcode == "conditional":
                branches = [total(branch) for branch in _called(one)]
                counts.update(max(branches, key=lambda found: sum(e.sent * n for e, n in found.items())))
            elif one.opcode == "while":
                times = _times(one, computations)
                if times is None:
                    unknown.add(one.name)
                for exchange, count in total(*_called(one)).items():
                    counts[exchange] += count * (times or 1)
            # What SparseCores see to on TPU7x stands in the computation of a custom call.
            elif one.opcode in ("fusion", "call", "async-start", "custom-call"):
                for called in _called(one):
                    counts.update(total(called))
        return counts

    found = total(entry)
    return Exchanges(found, len(unknown))


def _parsed(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if begun := _COMPUTATION.match(line):
            current = computations.setdefault(begun["name"], [])
            entry = begun["name"] if begun["entry"] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_instruction(found["name"], found["rest"], root=bool(found["root"])))
    return computations, entry


def _instruction(name: str, rest: str, *, root: bool) -> _Instruction:
    """Of `SHAPE opcode(operands), attributes`."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    closing = _closing(rest, len(opcode))
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : closing]))
    if opcode == "constant":
        operands = (rest[len(opcode) + 1 : closing - 1],)
    return _Instruction(name, opcode, shape, operands, rest[closing:], root)


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)


def _called(one: _Instruction) -> list[str]:
    if branches := _BRANCHES.search(one.attributes):
        return [name.strip().lstrip("%") for name in branches[1].split(",")]
    return _CALLED.findall(one.attributes)


def _times(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    """How often a loop goes round whose counter begins at 0; None where that is not told."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes)
    inside = computations[condition[1]] if condition else []
    constants = {one.name: one.operands[0] for one in inside if one.opcode == "constant"}
    root = next((one for one in inside if one.root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    bounds = [constants[name] for name in root.operands if name in constants]
    return int(bounds[0]) if len(bounds) == 1 and bounds[0].isdigit() else None


def _exchange(one: _Instruction, kind: str, shapes: dict[str, str], *, scattered: bool) -> Exchange:
    groups = device_groups(one.attributes)
    sizes = [_bytes(shapes[name]) for name in one.operands if name in shapes]
    # A ragged exchange has room for all rows of all devices on one of its sides, and the rows of one on the other.
    given = min(sizes[:2], default=0) if kind == "ragged-all-to-all" else sum(sizes)
    n = len(groups[0]) if groups else 1
    if scattered:
        # A sum of which each device keeps its part, in one fusion.
        kind = "reduce-scatter"
    return Exchange(kind, _sent(kind, given, n), groups)


def _exchange_between_slices(one: _Instruction, shapes: dict[str, str]) -> Exchange:
    """An exchange that the compiler has handed to the runtime of the network between slices."""
    told = dict(re.findall(r'_xla_megascale_(\w+)="([^"]*)"', one.attributes))
    kind = told["transfer_type"].lower().replace("_", "-")
    # "{1,2}x{0:3}": slices 1 and 2, devices 0 to 3 of each.
    slices = sum(_count(part) for part in told["target"].split("x")[0].strip("{}").split(","))
    given = _bytes(shapes[one.operands[0]])
    return Exchange(
        kind if kind in KINDS else "collective-permute", _sent(kind, given, slices), (), between_slices=True
    )


def _count(part: str) -> int:
    """Of "3" or "0:3", the last one included."""
    first, _, last = part.partition(":")
    return int(last or first) - int(first) + 1


def _sent(kind: str, given: int, n: int) -> int:
    """Bytes that each of n devices sends; see `Exchange`."""
    match kind:
        case "all-gather":
            return given * (n - 1)
        case "all-reduce":
            return 2 * given * (n - 1) // n
        case "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
            return given * (n - 1) // n
    return given


def _bytes(shape: str) -> int:
    """Of the arrays of a shape."""
    return sum(_bits(kind) * math.prod(_numbers(sizes)) for kind, sizes in _ARRAY.findall(shape)) // 8


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 8  # pred


def device_groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """The devices that exchange among themselves: replica groups as axes of a mesh, as an iota, or listed, or the pairs
    of a permutation.

    Args:
      attributes: of an instruction in HLO text.
    """
    ordered = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if named := re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({ordered}\))? \{{([^}}]*)\}}", attributes
    ):
        axes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        devices = _iota(named[2], named[3]) if named[2] else np.arange(math.prod(axes.values()))
        return _groups_along(axes, devices, named[4])
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={ordered}", attributes):
        return tuple(tuple(group) for group in _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist())
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes):
        return tuple(_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", listed[1]))
    raise QwenVLError(f"the compiler wrote replica groups in a form that is not known: {attributes[:300]}")


def _groups_along(axes: dict[str, int], devices: np.ndarray, named: str) -> tuple[tuple[int, ...], ...]:
    """Groups along axes of a mesh: "'a', 'b':(2)4" are all of a, and of b the part of size 4 within 2 outer ones."""
    parts = [
        (axis, int(outer or 1), int(size or axes[axis]))
        for axis, outer, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named)
    ]
    # Where each axis is cut so that every part is some of its pieces.
    cuts = {
        axis: sorted({1, size} | {cut for name, outer, of in parts if name == axis for cut in (outer, outer * of)})
        for axis, size in axes.items()
    }
    pieces = [(axis, begin, end // begin) for axis, found in cuts.items() for begin, end in itertools.pairwise(found)]
    places = [
        number
        for axis, outer, of in parts
        for number, (name, begin, size) in enumerate(pieces)
        if name == axis and outer <= begin and begin * size <= outer * of
    ]
    groups = np.moveaxis(devices.reshape([size for _, _, size in pieces]), places, range(-len(places), 0))
    rows = groups.reshape(-1, math.prod(pieces[place][2] for place in places)).tolist()
    return tuple(tuple(group) for group in rows)


def _iota(dims: str, order: str | None) -> np.ndarray:
    """The devices in order, in this shape, its axes then in another order."""
    devices = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())
