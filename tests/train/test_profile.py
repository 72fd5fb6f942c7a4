"""`--profile`: a trace of the steps asked for, and of no others."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.profile import ANNOTATION, Profiler


def traced(folder) -> list[int]:
    """The numbers of the steps that a trace has."""
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    data = ProfileData.from_file(str(path))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    return sorted(dict(event.stats)["step_num"] for event in events if event.name == ANNOTATION)


def run(profiler: Profiler, steps: range) -> None:
    double = jax.jit(lambda x: x * jnp.float32(2))
    x = jnp.ones(8, jnp.float32)
    for number in steps:
        with profiler.step(number):
            x = double(x)
        profiler.done(number, x)
    profiler.close()


@pytest.mark.parametrize(
    ("steps", "taken", "expected"),
    [
        ("2", range(11, 20), [12, 13]),  # the first step of a process is left out
        ("13-15", range(11, 20), [13, 14, 15]),
        ("3-30", range(28, 33), [28, 29, 30]),  # and it says so
        ("18-30", range(11, 20), [18, 19]),  # a run that ends before
    ],
)
def test_steps(steps, taken, expected, tmp_path):
    said: list[str] = []
    run(Profiler(steps, tmp_path / "profile", said.append), taken)
    assert traced(tmp_path / "profile") == expected
    assert len(said) == 1 and str(tmp_path / "profile") in said[0]
    assert f"a trace of steps {expected[0]} to " in said[0]


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ("10-15", "asks for steps 10 to 15, and 20 of 22 are done"),  # a run that goes on
        ("20-20", "asks for steps 20 to 20"),
        ("23-30", "asks for steps 23 to 30"),  # it ends before
        ("15-21", ""),
        ("22-30", ""),
        ("1", ""),
        (None, ""),
    ],
)
def test_steps_that_are_not_left_are_told(steps, told, tmp_path):
    said: list[str] = []
    Profiler(steps, tmp_path / "profile", said.append).expect(20, 22)
    assert len(said) == bool(told) and all(line.startswith("nothing is traced: ") and told in line for line in said)


def test_the_last_step_is_no_step_for_a_number(tmp_path):
    said: list[str] = []
    Profiler("5", tmp_path / "profile", said.append).expect(21, 22)
    assert len(said) == 1 and "asks for steps 23 to 27, and 21 of 22 are done" in said[0]


def test_none(tmp_path):
    run(Profiler(None, tmp_path / "profile", print), range(1, 4))
    run(Profiler("7-9", tmp_path / "profile", print), range(1, 4))
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", ["0", "", "x", "5-", "9-3", "0-4", "-1"])
def test_what_is_no_steps(steps, tmp_path):
    with pytest.raises(ConfigError, match="such as 10-15"):
        Profiler(steps, tmp_path, print)
