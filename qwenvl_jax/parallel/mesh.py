"""Device meshes. One device is a mesh of one, so that there is no second path for it."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from qwenvl_jax.errors import ConfigError

AXES = ("data", "fsdp", "expert", "context", "tensor")
# Axes that may span slices, whose network (DCN) is slow: what crosses it is a gradient, or a shard of weights, a step.
_ACROSS_SLICES = ("data", "fsdp")


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """Makes a mesh with the axes data, fsdp, expert, context and tensor, the last one between the nearest devices.

    Devices of several TPU slices are laid out with the slices outermost: along `data` if it is a multiple of their
    number, else along `fsdp`.

    Args:
      devices: a list of devices; all devices by default.
      **sizes: the size of an axis, by name; those left out are 1. Without any, `fsdp` takes every device.

    Raises:
      ConfigError: an unknown axis, sizes whose product is not the number of devices, or that slices do not divide.
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
    return Mesh(_arranged(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def with_all_axes(mesh: Mesh) -> Mesh:
    """A mesh of any of our axes, in any order, as `make_mesh` makes it: those that it lacks have size 1, all are Auto.

    Raises:
      ConfigError: an axis that is none of ours.
    """
    if mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}:
        return mesh
    sizes = dict(mesh.shape)
    unknown = [name for name in sizes if name not in AXES]
    if unknown:
        raise ConfigError(f"mesh {sizes}: unknown axis {unknown[0]!r}; the axes are {', '.join(AXES)}.")
    order = [mesh.axis_names.index(axis) for axis in AXES if axis in sizes]
    devices = mesh.devices.transpose(order).reshape([sizes.get(axis, 1) for axis in AXES])
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices in the shape of a mesh, neighbours on the network where they talk most."""
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.asarray(devices).reshape(shape)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    axis = axis_across(shape, len(slices))
    across = tuple(len(slices) if number == axis else 1 for number in range(len(shape)))
    within = tuple(size // outer for size, outer in zip(shape, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def axis_across(shape: Sequence[int], slices: int) -> int:
    """The axis, by its place among `AXES`, along which `make_mesh` lays slices out.

    Raises:
      ConfigError: sizes that they do not divide.
    """
    for axis in map(AXES.index, _ACROSS_SLICES):
        if shape[axis] % slices == 0:
            return axis
    raise ConfigError(
        f"mesh {dict(zip(AXES, shape, strict=True))} over {slices} slices: data or fsdp must be a multiple of "
        f"{slices}, for the other axes are too talkative for the network between slices."
    )


def single_device_mesh(device=None) -> Mesh:
    """Makes the mesh of one device, the first of this process by default."""
    return make_mesh([device if device is not None else jax.local_devices()[0]])
