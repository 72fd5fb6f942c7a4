"""Times as text, and which form of them a record has."""

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl_jax.data.times import TIME_FORMATS, choose_time_format, time_text


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, ("<0.0 seconds>", "<00:00:00.0>")),
        (3, ("<3.0 seconds>", "<00:00:03.0>")),
        (0.25, ("<0.2 seconds>", "<00:00:00.2>")),  # half to even
        (59.94, ("<59.9 seconds>", "<00:00:59.9>")),
        (59.96, ("<60.0 seconds>", "<00:01:00.0>")),
        (3599.97, ("<3600.0 seconds>", "<01:00:00.0>")),
        (np.float64(445.5), ("<445.5 seconds>", "<00:07:25.5>")),
        (100 * 3600 + 61.1, ("<360061.1 seconds>", "<100:01:01.1>")),
    ],
)
def test_forms(seconds, expected):
    assert tuple(time_text(seconds, form) for form in TIME_FORMATS) == expected
    assert time_text(seconds) == expected[0]


@given(st.floats(0, 1e6))
def test_both_forms_tell_the_same_time(seconds):
    hours, minutes, rest = map(float, re.fullmatch(r"<(\d\d+):(\d\d):(\d\d\.\d)>", time_text(seconds, "hms")).groups())
    assert minutes < 60 and rest < 60
    assert f"<{hours * 3600 + minutes * 60 + rest:.1f} seconds>" == time_text(seconds)


def test_the_choice_follows_from_seed_and_name():
    names = [f"r{i}" for i in range(4000)]
    chosen = {share: [choose_time_format(1, name, share) for name in names] for share in (0.0, 0.25, 0.5, 1.0)}
    counts = {share: forms.count("hms") for share, forms in chosen.items()}
    assert counts[0.0] == 0 and counts[1.0] == 4000
    # Five standard deviations.
    assert all(abs(counts[s] - 4000 * s) < 5 * (4000 * s * (1 - s)) ** 0.5 for s in (0.25, 0.5))
    assert all(b == "hms" for a, b in zip(chosen[0.25], chosen[0.5], strict=True) if a == "hms")
    assert [choose_time_format(2, name, 0.5) for name in names] != chosen[0.5]
    program = "from qwenvl_jax.data.times import *; print([choose_time_format(1, f'r{i}', 0.5) for i in range(50)])"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(chosen[0.5][:50])
