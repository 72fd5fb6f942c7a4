"""TPU slices by name, such as "v5p:8x8x8", and what their hardware gives."""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.flops import TPU_CORE_PEAKS

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A device of a generation of TPUs, as JAX counts devices: a chip, or one of the two halves of a TPU7x.

    Attributes:
      kind: JAX's name of the device.
      cores: of a device.
      devices: of a chip.
      hbm: bytes that a program may use.
      hbm_bandwidth: bytes a second from and to HBM.
      ici: bytes a second that a device sends to its neighbours, over all its links together.
      dcn: bytes a second that a device sends to other slices.
    """

    kind: str
    cores: int
    devices: int
    hbm: int
    hbm_bandwidth: float
    ici: float
    dcn: float

    @property
    def flops(self) -> float:
        """Peak bf16 FLOPs a second, dense."""
        return TPU_CORE_PEAKS[self.kind] * self.cores


# `hbm` is what libtpu 0.0.52 says is available when a program is too large. The others are those of the pages v5e,
# v5p, v6e and tpu7x under docs.cloud.google.com/tpu/docs, where figures are for a chip, and those of the links count
# both directions: HBM 819, 2765, 1638 and 7380 GB/s; links 400, 1200, 800 and 1200 GB/s; data center network 6.4 Tb/s
# for 256 chips of v5e, 50, 100 and 100 Gb/s for one of the others.
HARDWARE: Mapping[str, Hardware] = {
    "v5e": Hardware("TPU v5 lite", 1, 1, int(15.75 * _GIB), 819e9, 200e9, 6.4e12 / 8 / 256),
    "v6e": Hardware("TPU v6 lite", 1, 1, int(31.24 * _GIB), 1638e9, 400e9, 100e9 / 8),
    "v5p": Hardware("TPU v5", 2, 1, int(95.73 * _GIB), 2765e9, 600e9, 50e9 / 8),
    "tpu7x": Hardware("TPU7x", 1, 2, int(94.74 * _GIB), 7380e9 / 2, 300e9, 100e9 / 8 / 2),
}

# Shapes of slices, in chips, that are rented out. Of two dimensions as listed on those pages; of three, the small
# ones, and what is made of cubes of 4x4x4 with sides in rising order.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_LARGEST = {"v5p": (16, 16, 24), "tpu7x": (16, 24, 24)}


def known_shapes(generation: str) -> tuple[str, ...]:
    """The shapes that slices of a generation have, smallest first."""
    if generation not in _LARGEST:
        return _FLAT
    largest = _LARGEST[generation]
    sides = itertools.product(*(range(4, side + 1, 4) for side in largest))
    cubes = sorted((side for side in sides if list(side) == sorted(side)), key=lambda side: (math.prod(side), side))
    return (*_SMALL, *("x".join(map(str, side)) for side in cubes))


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or several alike, joined by the data center's network.

    Attributes:
      name: of one of them as libtpu calls it, such as "v5p:8x8x8".
      hardware: one of its devices.
      devices: how many there are, of all slices.
      slices: how many of them.
    """

    name: str
    hardware: Hardware
    devices: int
    slices: int = 1

    @property
    def title(self) -> str:
        """For reading."""
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"

    @classmethod
    def named(cls, name: str, slices: int = 1) -> "Topology":
        """So many slices of this name.

        Raises:
          ConfigError: there is none; lists those that there are.
        """
        if slices < 1:
            raise ConfigError(f"--slices {slices}: expected a number from 1.")
        generation, _, shape = name.partition(":")
        if generation not in HARDWARE:
            raise ConfigError(f"unknown topology {name!r}; known are {'; '.join(map(_listed, HARDWARE))}.")
        if shape not in known_shapes(generation):
            known = known_shapes(generation)
            turned = [one for one in known if sorted(one.split("x")) == sorted(shape.split("x"))]
            near = turned or difflib.get_close_matches(shape, known, n=1)
            hint = f", did you mean {generation}:{near[0]}?" if near else ";"
            raise ConfigError(f"unknown topology {name!r}{hint} Known are {_listed(generation)}.")
        hardware = HARDWARE[generation]
        return cls(name, hardware, math.prod(map(int, shape.split("x"))) * hardware.devices * slices, slices)


def _listed(generation: str) -> str:
    shapes = known_shapes(generation)
    if generation not in _LARGEST:
        return f"{generation}:{', '.join(shapes)}"
    largest = "x".join(map(str, _LARGEST[generation]))
    return f"{generation}:{', '.join(_SMALL)} and multiples of 4 in rising order up to {largest}, as 4x4x4 or 4x8x8"
