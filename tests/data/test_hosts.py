"""The content of a step: the same for any number of hosts, threads and workers, and wherever the run was stopped."""

import dataclasses
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.data.pipeline import BatchLoader, batch_hash, batches
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import ConfigError
from tests import compiling
from tests.data.host import _sums, loader_of
from tests.data.mixed import mixed_config, read_lines

ROOT = Path(__file__).parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def whole(mixed_folder):
    return list(batches(loader_of(mixed_config(mixed_folder)), STEPS))


def test_the_mixture_has_what_makes_batches_differ(mixed_folder, whole):
    """So that what the other tests compare says something."""
    plan = loader_of(mixed_config(mixed_folder)).plan
    counts = {len(plan.facts[i].frames) for n in range(STEPS) for row in plan[n] for i in row}
    assert {0, 1, 2, 4} <= counts
    assert sum(len(planned.failed) for planned in whole) >= 2
    assert all(re.search(r"scrambled\.mp4", failure.reason) for planned in whole for failure in planned.failed)
    assert len({planned.hash for planned in whole}) == STEPS
    seen = {re.sub(r".*\((.*)-\d+\)", r"\1", plan.facts[i].name) for n in range(STEPS) for row in plan[n] for i in row}
    assert seen == {"text", "picture", "clip"}


@pytest.mark.parametrize("hosts", [4, 8, 16])
def test_any_number_of_hosts_makes_the_same_batches(mixed_folder, whole, hosts):
    """Rows, pixels and what failed; each host decodes only its own."""
    config = mixed_config(mixed_folder)
    loaders = [loader_of(config, host, hosts) for host in range(hosts)]
    for step in range(STEPS):
        parts = [loader(step) for loader in loaders]
        rows = [row for part in parts for row in part.row_hashes]
        assert batch_hash(rows) == whole[step].hash
        assert [failure for part in parts for failure in part.failed] == list(whole[step].failed)
        assert sum(part.tokens for part in parts) == whole[step].tokens
        assert parts[0].batch.tokens.shape[0] == 16 // hosts == parts[0].batch.vision[0].patches.shape[0]


@pytest.mark.parametrize(
    ("first", "threads", "workers"),
    [(5, 0, 0), (0, 3, 0), pytest.param(7, 2, 2, marks=pytest.mark.slow)],
)
def test_goes_on_anywhere_with_any_readers(mixed_folder, whole, first, threads, workers):
    """Also from the state that a batch carries, without planning the steps before it again."""
    loader = loader_of(mixed_config(mixed_folder))
    if first:
        loader.plan.resume(json.loads(whole[first - 1].state))
    found = list(batches(loader, STEPS, first=first, threads=threads, workers=workers))
    assert [planned.hash for planned in found] == [planned.hash for planned in whole[first:]]
    assert [planned.state for planned in found] == [planned.state for planned in whole[first:]]


def test_a_plan_that_goes_on_plans_nothing_again(mixed_folder, whole, monkeypatch):
    plan = loader_of(mixed_config(mixed_folder)).plan
    planned = []
    real = type(plan)._plan
    monkeypatch.setattr(type(plan), "_plan", lambda self, place: planned.append(place.step) or real(self, place))
    plan.resume(json.loads(whole[8].state))
    other = pickle.loads(pickle.dumps(plan))
    assert [other[n] for n in (9, 10)] == [plan[n] for n in (9, 10)]
    assert set(planned) == {9, 10}
    # What was before can be asked for still.
    assert plan[2] == loader_of(mixed_config(mixed_folder)).plan[2]


def test_a_long_run_keeps_few_steps(mixed_folder):
    """The plan remembers no more after 5,000 steps than after 500, and can be asked for any of them."""
    plan = loader_of(mixed_config(mixed_folder)).plan
    early = [plan[n] for n in range(3)]
    sizes = []
    for n in (500, 5000):
        plan[n]
        sizes.append(len(plan._recent))
        assert len(plan._places) <= 2 + n // 1000
    assert sizes[0] == sizes[1]
    assert [plan[n] for n in range(3)] == early


def test_rows_that_do_not_divide_are_refused(mixed_folder):
    loader = loader_of(mixed_config(mixed_folder))
    processor = Processor.from_pretrained(mixed_folder / "processor")
    with pytest.raises(ConfigError, match=r"batch\.rows=16 must be a multiple of the 3 hosts"):
        BatchLoader(loader.plan, loader.samples, processor, host=0, hosts=3)
    with pytest.raises(ConfigError, match="host=2 must be from 0 to 1"):
        BatchLoader(loader.plan, loader.samples, processor, host=2, hosts=2)


def test_rows_of_text_need_no_groups(mixed_folder):
    """Groups are of vision rows: a stage without them is shared by hosts as it is by devices."""
    config = mixed_config(mixed_folder)
    (text,) = (part for part in config.stages[0].data.mixture if part.name == "text")
    data, shape = dataclasses.replace(config.stages[0].data, mixture=(text,)), BatchShape(rows=16, length=160)
    config = dataclasses.replace(config, stages=(dataclasses.replace(config.stages[0], data=data, batch=shape),))
    alone, halves = loader_of(config)(0), [loader_of(config, host, 2)(0) for host in range(2)]
    assert batch_hash([row for half in halves for row in half.row_hashes]) == alone.hash
    for half in halves:
        assert half.batch.tokens.shape == (8, 160) and not half.batch.vision


def start(folder: Path, *arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.quickly()}
    command = [sys.executable, "-m", "tests.data.host", str(folder), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_processes_on_one_mesh(mixed_folder, whole):
    """Two real processes read their halves and put them on a mesh over both: it is the batch of a single process."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [start(mixed_folder, host, 2, STEPS, port) for host in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    lines = [read_lines(output) for output, _ in outputs]
    assert all(len(of_host) == STEPS for of_host in lines)
    for step, planned in enumerate(whole):
        assert batch_hash(lines[0][step]["rows"] + lines[1][step]["rows"]) == planned.hash
        assert lines[0][step]["sums"] == lines[1][step]["sums"] == [int(value) for value in _sums(planned.batch)]
        assert lines[0][step]["shape"] == [[16, 192], list(planned.batch.vision[0].patches.shape)]
