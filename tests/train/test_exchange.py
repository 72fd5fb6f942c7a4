"""What processes tell each other before each step, and which of them is named as slow."""

import dataclasses
import math
import time

import numpy as np
import pytest

from qwenvl_jax.data.failure import Failure
from qwenvl_jax.data.pipeline import PlannedBatch, batch_hash
from qwenvl_jax.flops import Work
from qwenvl_jax.train import exchange, processes
from qwenvl_jax.train.exchange import Exchange
from qwenvl_jax.train.pace import Pace, behind
from qwenvl_jax.train.processes import Processes


def parts(index, steps, seconds=0.0, error_at=None):
    """The part of each batch that a process makes: one row, and now and then a failure."""
    for step in range(steps):
        if step == error_at:
            raise RuntimeError("no more")
        time.sleep(seconds)
        failed = (Failure(f"sample-{index}", "gone"),) if step == 1 and index != 1 else ()
        work = Work(tokens=10 + index, text_pairs=100 * (1 + index))
        yield PlannedBatch(None, 10 + index, (f"row-{index}-{step}",), failed, "state", work)


def test_one_process_passes_batches_on():
    said = []
    one = Exchange(Processes(0, 1), 0, said.append)
    given = list(parts(0, 3))
    assert list(one.batches("s", 0, iter(parts(0, 3)))) == given
    one.say("hello")
    assert said == ["hello"]


@pytest.mark.parametrize(
    ("loading", "done_after", "wait"),
    [(1.1, 1.0, 0.1), (0.9, 1.0, 0.0), (1.1, math.inf, 0.0), (1.1, -5.0, 1.1)],
)
def test_only_devices_with_nothing_to_do_wait(monkeypatch, loading, done_after, wait):
    """A batch that takes 1.1 s to make, beside a step of a second, costs a tenth of a second."""
    now = [100.0]
    monkeypatch.setattr(exchange.time, "monotonic", lambda: now[0])

    def made():
        for planned in parts(0, 2):
            now[0] += loading
            yield planned

    one = Exchange(Processes(0, 1), 0, print)
    monkeypatch.setattr(one.pace, "add", lambda stage, step, records: seen.append(records[0]["wait"]))
    seen, began = [], [now[0]]
    for _ in one.batches("s", 0, made(), lambda: began[-1] + done_after):
        assert one.waits == (pytest.approx(wait), 0.0)
        began.append(now[0])
    assert seen == [pytest.approx(wait)] * 2


def test_waits_for_other_processes_are_told_apart(three):
    """The third takes half a second for each batch; its devices wait for that, those of the others for it."""
    pool, processes = three

    def work(one):
        exchange = Exchange(one, one.index, print)
        seconds = 0.5 if one.index == 2 else 0.0
        return [exchange.waits for _ in exchange.batches("s", 0, parts(one.index, 2, seconds))]

    first, second, third = pool.map(work, processes)
    for own, others in (*first, *second):
        assert own < 0.2 and others > 0.3
    for own, others in third:
        assert own >= 0.5 and others < 0.2


def test_all_processes_see_the_whole_batch(three):
    """Of three, two make the same part, which is counted once; what one of them says comes with its number."""
    pool, processes = three
    said = []

    def work(one):
        part = {0: 0, 1: 1, 2: 0}[one.index]
        exchange = Exchange(one, part, said.append)
        if one.index == 1:
            exchange.say("a worker died")
        return list(exchange.batches("s", 4, parts(part, 3)))

    found = list(pool.map(work, processes))
    assert found[0] == found[1] == found[2]
    assert [planned.tokens for planned in found[0]] == [21] * 3
    assert [planned.work for planned in found[0]] == [Work(tokens=21, text_pairs=300)] * 3
    assert [planned.hash for planned in found[0]] == [
        batch_hash([f"row-0-{step}", f"row-1-{step}"]) for step in range(3)
    ]
    assert [planned.failed for planned in found[0]] == [(), (Failure("sample-0", "gone"),), ()]
    assert said == ["process 1: a worker died"]


def test_processes_that_make_the_same_rows_differently_are_told(three):
    """The first and the third make the same part; the third could not read one of its samples."""
    pool, processes = three

    def work(one):
        part = {0: 0, 1: 1, 2: 0}[one.index]
        made = list(parts(part, 3))
        if one.index == 2:
            failed = (Failure("a", "a.mp4 is gone"),)
            made[1] = dataclasses.replace(made[1], row_hashes=("another",), failed=failed)
        taken = []
        with pytest.raises(RuntimeError) as error:
            for planned in Exchange(one, part, print).batches("s", 4, (one for one in made)):
                taken.append(planned)
        assert len(taken) == 1
        return str(error.value)

    told = set(pool.map(work, processes))
    assert len(told) == 1
    for words in ("step 6: processes 0 and 2 hold the same rows", "process 2: a.mp4 is gone", "Start the run again"):
        assert words in told.copy().pop()


def test_what_was_gathered_is_freed(three):
    """A long run leaves no record of each step with the coordinator."""
    pool, processes = three
    list(pool.map(lambda one: list(Exchange(one, one.index, print).batches("s", 0, parts(one.index, 20))), processes))
    left = processes[0]._client.key_value_dir_get(f"{processes[0]._scope}/step/")
    assert {name.split("/")[-2] for name, _ in left} == {"20"}


def test_a_process_with_slow_data_is_named(three):
    """For real: one of three waits 20 ms for each batch, and so do the others for it."""
    pool, processes = three
    said = []

    def work(one):
        exchange = Exchange(one, one.index, said.append)
        exchange.pace = Pace(said.append, every=8)
        seconds = 0.02 if one.index == 2 else 0.0
        for _ in exchange.batches("s", 0, parts(one.index, 20, seconds)):
            time.sleep(0.002)

    list(pool.map(work, processes))
    assert said
    assert all(line.startswith("s step ") and ": process 2 waits for batches" in line for line in said)


def test_a_process_that_is_waited_for_is_named(three, monkeypatch):
    """It is alive, and its second batch takes a second."""
    monkeypatch.setattr(exchange, "_LATE_SECONDS", 0.2)
    monkeypatch.setattr(processes, "_PIECE_MS", 50)
    pool, of_run = three
    said = []

    def work(one):
        def made():
            for step, planned in enumerate(parts(one.index, 3)):
                time.sleep(1.0 if (one.index, step) == (2, 1) else 0.0)
                yield planned

        return len(list(Exchange(one, one.index, said.append).batches("s", 0, made())))

    assert list(pool.map(work, of_run)) == [3, 3, 3]
    assert said and all(line.startswith("s step 2: process 2 has been waited for") for line in said)
    assert len(said) <= 3  # after 0.2, 0.4 and 0.8 s


@pytest.fixture
def steady():
    """Fifty steps of a second in four processes, that wait a little."""
    return np.stack([np.full((50, 4), 1.0), np.full((50, 4), 0.01), np.full((50, 4), 0.02)], axis=-1)


def test_nobody_is_named_who_keeps_pace(steady):
    assert behind(steady) == []
    assert behind(steady[:, :1]) == []


def test_a_starved_process(steady):
    steady[:, 2, 1] = 0.4
    steady[:, [0, 1, 3], 2] = 0.4
    assert behind(steady) == ["process 2 waits for batches 40% of the last 50 steps' time, the others 1%"]


def test_now_and_then_is_starved_too(steady):
    """One step in ten waits for eight seconds."""
    steady[::10, :, 0] = 8.0
    steady[::10, 0, 1] = 8.0
    assert behind(steady) == ["process 0 waits for batches 48% of the last 50 steps' time, the others 1%"]


def test_a_slow_host(steady):
    """Its batches are there, and the others wait for it all the same."""
    steady[:, [0, 1, 2], 2] = 0.5
    assert behind(steady) == [
        "process 3 is slow: the others wait for it at least 50% of the last 50 steps' time, and not for its batches"
    ]


def test_all_starved(steady):
    steady[..., 1] = 0.3
    assert behind(steady) == ["all processes wait for batches 30% of the last 50 steps' time"]
    assert behind(steady[:, :1]) == ["waits for batches 30% of the last 50 steps' time"]


def test_a_short_stage_is_looked_at_in_its_end():
    """Of several processes, one whose batches are late; of one alone, or of too few steps, nothing."""
    for steps, count, told in ((9, 2, 1), (9, 1, 0), (5, 2, 0)):
        said = []
        pace = Pace(said.append)
        for step in range(1, steps + 1):
            seconds = None if step == 1 else 1.0
            pace.add("s", step, [{"step": seconds, "wait": 0.5 * (i == count - 1), "idle": 0.0} for i in range(count)])
        assert not said
        pace.end(steps)
        assert len(said) == told
        if said:
            assert said[0].startswith("s step 9: process 1 waits for batches 50% of the last 7 steps' time, the others")
        pace.end(steps)
        assert len(said) == told


def test_a_look_is_taken_now_and_then():
    """Not at the first step, which has no time and whose compilation is in the second's."""
    said = []
    pace = Pace(said.append, every=10)
    for step in range(1, 42):
        seconds = None if step == 1 else 500.0 if step == 2 else 1.0
        pace.add("s", step, [{"step": seconds, "wait": 0.5, "idle": 0.0}])
    assert [line.partition(":")[0] for line in said] == ["s step 12", "s step 22", "s step 32"]
