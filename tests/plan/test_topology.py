"""Slices by name, and which there are."""

import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.flops import peak_flops
from qwenvl_jax.plan.topology import HARDWARE, Topology, known_shapes


@pytest.mark.parametrize(
    ("name", "devices"),
    [("v5e:16x16", 256), ("v6e:2x4", 8), ("v5p:8x8x8", 512), ("v5p:16x16x24", 6144), ("tpu7x:4x4x8", 256)],
)
def test_devices(name, devices):
    assert Topology.named(name).devices == devices


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9:2x2", ["'v9:2x2'", "v5e:1x1, 2x2", "v6e:", "v5p:2x2x1", "tpu7x:"]),
        ("v5e:16x15", ["'v5e:16x15'", "did you mean v5e:16x16?", "8x16"]),
        ("v5p", ["'v5p'", "2x2x1, 2x2x2"]),
        ("v5p:8x4x8", ["'v5p:8x4x8'", "did you mean v5p:4x8x8?", "rising order"]),
        ("v5p:16x8x8", ["did you mean v5p:8x8x16?"]),
        ("v6e:8x4", ["did you mean v6e:4x8?"]),
    ],
)
def test_unknown_names_list_what_is_known(name, words):
    with pytest.raises(ConfigError) as error:
        Topology.named(name)
    assert all(word in str(error.value) for word in words), error.value


def test_shapes_rise():
    shapes = known_shapes("v5p")
    assert shapes[:6] == ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
    assert shapes[-1] == "16x16x24" and "8x8x8" in shapes and "8x4x4" not in shapes


@pytest.mark.parametrize("generation", HARDWARE)
def test_peaks_are_those_of_the_devices(generation):
    hardware = HARDWARE[generation]

    class Device:
        device_kind, num_cores = hardware.kind, hardware.cores

    assert hardware.flops == peak_flops(Device())
