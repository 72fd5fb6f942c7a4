"""Runs of several processes: real ones, over loopback, with real signals."""

import contextlib
import json
import random
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train import processes as processes_module
from qwenvl_jax.train.metrics import read_metrics
from qwenvl_jax.train.processes import first_of_each, join
from qwenvl_jax.train.stopping import Stop
from tests.train.several import finish, free_port, said, start, write_several_run

STEPS = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory, clip):
    return write_several_run(tmp_path_factory.mktemp("several"), clip)


def run(config, out, count, *arguments, moment=None):
    """Carries out the run in so many processes: (statuses, what they said)."""
    logs = config.parent / "logs" / f"{out.name}-{time.monotonic_ns()}"
    program = ["-m", "tests.train.killed", moment] if moment else ["train"]
    statuses = finish(start(count, *program, config, "--out", out, *arguments, logs=logs))
    return statuses, said(logs)


@pytest.fixture(scope="module")
def whole(config):
    """The run of one process."""
    out = config.parent / "whole"
    statuses, told = run(config, out, 1)
    assert statuses == [0], told
    return out


def check_alike(out, whole):
    """The same batches, and the same numbers but for rounding."""
    found, expected = (read_metrics(folder / "metrics.jsonl") for folder in (out, whole))
    for name in ("step", "batch", "tokens", "stage"):
        assert [line[name] for line in found] == [line[name] for line in expected]
    assert len(found) == STEPS
    np.testing.assert_allclose([line["loss"] for line in found], [line["loss"] for line in expected], rtol=1e-5)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (out, whole))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert {path.name for path in (out / "model").iterdir()} == {path.name for path in (whole / "model").iterdir()}
    assert not list(out.glob(".model*"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_are_the_run_of_one(config, whole, count):
    """Weights, rows and vision groups are spread over processes; one of them writes."""
    out = config.parent / f"of-{count}"
    statuses, told = run(config, out, count)
    assert statuses == [0] * count, told
    check_alike(out, whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert told.count("s1: measuring") <= 1 and told.count("step compiled") == 1


@pytest.mark.slow
def test_parts_of_a_process_need_not_follow_one_another(config, whole):
    """Of four devices each process has every other one."""
    out, logs = config.parent / "interleaved", config.parent / "interleaved-logs"
    statuses = finish(start(2, "-m", "tests.train.interleaved", config, "--out", out, logs=logs))
    assert statuses == [0, 0], said(logs)
    check_alike(out, whole)


@pytest.mark.slow
def test_processes_that_share_rows(config, whole):
    """`tensor` over both processes: each makes the whole batch, and it is counted once."""
    out, heads = config.parent / "tensor", ("--model.text.num_key_value_heads", 2)
    alone = config.parent / "tensor-alone"
    assert run(config, alone, 1, *heads)[0] == [0]
    statuses, told = run(config, out, 2, *heads, "--mesh.fsdp", 1, "--mesh.tensor", 2)
    assert statuses == [0, 0], told
    check_alike(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("process", "after"), [(0, 4), (1, 1)])
def test_a_signal_to_one_stops_all_after_the_same_step(config, whole, process, after):
    """SIGTERM to either of two; the run goes on in so many others, on their mesh."""
    out = config.parent / f"stopped-{process}"
    statuses, told = run(config, out, 2, moment=f"SIGTERM:step:2:{process}")
    assert statuses == [130, 130], told
    # The line of step 2 is written with its checkpoint; the other process may have begun the next step.
    done = len(read_metrics(out / "metrics.jsonl"))
    assert done in (2, 3)
    assert (out / "checkpoints" / str(done)).is_dir()
    assert f"stopped after step {done} of {STEPS}" in told

    statuses, told = run(config, out, after)
    assert statuses == [0] * after, told
    assert f"continuing after step {done} of" in told
    assert "losses may differ in their last digits" in told
    check_alike(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_killed_process_ends_the_others(config, process):
    """Within a minute, and not with the status of a mistake, which no restart mends."""
    out, logs = config.parent / f"killed-{process}", config.parent / f"killed-{process}-logs"
    moment = f"SIGKILL:step:2:{process}"
    processes = start(2, "-m", "tests.train.killed", moment, config, "--out", out, logs=logs)
    killed, other = processes[process], processes[1 - process]
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(finish, processes, 1)
        assert killed.wait(400) == -signal.SIGKILL
        began = time.monotonic()
        assert other.wait(60) not in (0, 2, 130), said(logs)
        assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_mistake_in_one_process_ends_all(config, tmp_path):
    """Another setting in one of two, told by both in a line."""
    logs = tmp_path / "logs"
    arguments = ["train", config, "--out", tmp_path / "out"]
    port = free_port()
    processes = [
        process
        for index, seed in enumerate((0, 1))
        for process in start(2, *arguments, "--seed", seed, logs=logs, port=port, only=index)
    ]
    assert finish(processes) == [2, 2]
    lines = [line for line in said(logs).splitlines() if "error: process" in line]
    assert len(lines) == 2
    assert all("process 1 has seed=1, but process 0 has 0; start every process with the same" in line for line in lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_mistake_before_the_run_ends_all(config, tmp_path, mistaken):
    """A setting that one of two has and that there is not: the other does not wait for minutes."""
    logs, port = tmp_path / "logs", free_port()
    arguments = ["train", config, "--out", tmp_path / "out"]
    processes = [
        process
        for index in range(2)
        for process in start(
            2, *arguments, *(["--sed", "1"] if index == mistaken else []), logs=logs, port=port, only=index
        )
    ]
    began = time.monotonic()
    assert finish(processes) == [2, 2], said(logs)
    assert time.monotonic() - began < 100
    lines = [line for line in said(logs).splitlines() if "error: process" in line]
    assert len(lines) == 2
    assert all(f"process {mistaken}: unknown setting --sed; did you mean --seed?" in line for line in lines)


@pytest.mark.slow
def test_checkpoints_go_to_any_number_of_processes(tmp_path):
    """Written by two, read by four and by one: the same bits, and the same place."""

    def hashes(count, what):
        logs = tmp_path / f"{what}-{count}"
        program = ("-m", "tests.train.restored", what, tmp_path / "checkpoints")
        assert finish(start(count, *program, logs=logs)) == [0] * count, said(logs)
        lines = [json.loads(line) for line in said(logs).splitlines() if line.startswith("{")]
        assert [line["devices"] for line in lines] == [count] * count
        return [line["hashes"] for line in lines]

    written = hashes(2, "save")
    assert len(written[0]) == 4
    assert written[0] == written[1]
    for count in (4, 1):
        assert all(found == written[0] for found in hashes(count, "load"))


def test_what_is_gathered_is_the_same_everywhere(three):
    pool, processes = three
    found = list(pool.map(lambda one: one.gather("x", f"of {one.index}"), processes))
    assert found == [["of 0", "of 1", "of 2"]] * 3
    settings = [{"seed": "0"}, {"seed": "0"}, {"seed": "1"}]
    for check in [pool.submit(one.check_same, mine) for one, mine in zip(processes, settings, strict=True)]:
        with pytest.raises(ConfigError, match="process 2 has seed=1, but process 0 has 0"):
            check.result()


@pytest.mark.parametrize("seed", range(3))
def test_all_stop_after_the_same_step(three, seed):
    """Processes that wait for each other's steps, as devices do, each a step ahead at most; one asks at some moment."""
    pool, processes = three
    draw = random.Random(seed)
    pauses = [[draw.random() * 0.01 for _ in range(100)] for _ in processes]
    begun = [0, 0, 0]
    asks = draw.randrange(3)
    at = {}

    def work(index):
        stop = Stop(processes[index])
        with processes[index].watched("stop", stop.agree):
            done = 0
            while done < 100 and not stop.here():
                begun[index] = done = done + 1
                if index == asks and done == 20:
                    at["asked"] = max(begun)
                    stop.ask()
                time.sleep(pauses[index][done - 1])
                while min(begun) < done - 1:
                    time.sleep(0.001)
            stop.close()
            return done

    last = set(pool.map(work, range(3)))
    assert len(last) == 1
    # One step that begins while the question is on its way.
    assert at["asked"] <= last.pop() <= at["asked"] + 2


def test_a_watcher_waits_longer_than_its_store_does(three, monkeypatch):
    """A run of weeks hears of a signal in its last hour."""
    monkeypatch.setattr(processes_module, "_LONG_MS", 50)
    _, processes = three
    heard = []
    with processes[0].watched("late", heard.append):
        time.sleep(0.5)
        processes[1].tell("late", "now")
        end = time.monotonic() + 20
        while not heard and time.monotonic() < end:
            time.sleep(0.01)
    assert heard == ["now"]


def test_a_question_after_the_last_step_holds_nobody(three):
    pool, processes = three

    def work(index):
        stop = Stop(processes[index])
        with processes[index].watched("stop", stop.agree):
            for _ in range(5):
                assert not stop.here()
            if index == 1:
                stop.ask()
            stop.close()

    began = time.monotonic()
    list(pool.map(work, range(3)))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "are set, but JAX_COORDINATOR_ADDRESS not"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "localhost:1"}, "but JAX_PROCESS_ID not"),
        (
            {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "localhost:1"},
            "JAX_NUM_PROCESSES='two' must be a whole number",
        ),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "localhost:1"},
            "JAX_PROCESS_ID=2 must be from 0 to 1",
        ),
    ],
)
def test_variables_that_do_not_go_together(monkeypatch, variables, told):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told):
        join()


def test_one_process_for_each_part():
    assert first_of_each([0, 0, 1, 1]) == [0, 2]
    assert first_of_each([1, 0]) == [1, 0]
