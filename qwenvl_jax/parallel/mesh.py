"""Device meshes. One device is a mesh of one, so that there is no second path for it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from qwenvl_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "context", "expert")


def make_mesh(devices=None, **sizes: int) -> Mesh:
    """Makes a mesh with the axes data, fsdp, tensor, context and expert.

    Args:
      devices: a list of devices; all devices by default.
      **sizes: the size of an axis, by name; those left out are 1. Without any, `fsdp` takes every device.

    Raises:
      ConfigError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ConfigError(f"unknown mesh axis {unknown[0]!r}; the axes are {', '.join(AXES)}.")
    sizes = sizes or {"fsdp": len(devices)}
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if np.prod(shape) != len(devices):
        raise ConfigError(
            f"mesh {dict(zip(AXES, shape, strict=True))} needs {np.prod(shape)} devices, but there are {len(devices)}; "
            "change a size so that the product fits."
        )
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def single_device_mesh(device=None) -> Mesh:
    """Makes the mesh of one device, the first by default."""
    return make_mesh([device if device is not None else jax.devices()[0]])
