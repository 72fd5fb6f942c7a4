"""What the processes of a run tell each other before each step: the hashes of their rows, what failed, how they wait.

With it each process knows the whole batch as a run of one process does: metrics, the list of failed samples and the
decision to go on are the same in all of them.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Generator, Iterator

from qwenvl_jax.data.failure import Failure
from qwenvl_jax.data.pipeline import PlannedBatch
from qwenvl_jax.flops import Work
from qwenvl_jax.train.pace import Pace
from qwenvl_jax.train.processes import Processes, first_of_each

_LATE_SECONDS = 60.0


class Exchange:
    """Passes the batches of this process on, with what the other processes know of theirs.

    Args:
      processes: of the run.
      part: which part of each batch this process makes; see `qwenvl_jax.parallel.placement.row_share`.
      say: where messages go; those of other processes come with their number, in process 0.

    Attributes:
      waits: seconds in which the devices waited for the last batch: for this process's part, then for the others'.
    """

    def __init__(self, processes: Processes, part: int, say: Callable[[str], None]):
        self._processes, self._say = processes, say
        self._parts = [int(text) for text in processes.gather("parts", str(part))]
        self._givers = first_of_each(self._parts)
        self._notes: list[str] = []
        self.pace = Pace(say)
        self.waits = (0.0, 0.0)

    def say(self, line: str) -> None:
        """Says a line in the log of the run, out of whichever process."""
        if self._processes.index == 0:
            self._say(line)
        else:
            self._notes.append(line)

    def batches(
        self,
        stage: str,
        done: int,
        batches: Iterator[PlannedBatch],
        free_at: Callable[[], float] = lambda: -math.inf,
    ) -> Generator[PlannedBatch]:
        """Whole batches, but for their arrays, which are this process's part.

        Args:
          stage: its name.
          done: steps of the run done before the first batch.
          batches: the parts that this process makes; closed with this.
          free_at: when the devices were done with the step before, by `time.monotonic()`, infinity while they are not;
            only from then on do they wait. See `qwenvl_jax.train.timings.LastStep`.

        Raises:
          RuntimeError: processes that make the same part made it differently. It is no mistake of the settings, and
            what was wrong with one of them may be over when the run is started again.
        """
        began, wait, idle = None, 0.0, 0.0
        try:
            while True:
                asked = time.monotonic()
                planned = next(batches, None)
                if planned is None:
                    return
                done += 1
                came = time.monotonic()
                wait = max(came - max(asked, free_at()), 0.0)
                record = {
                    "tokens": planned.tokens,
                    "rows": planned.row_hashes,
                    "work": dataclasses.asdict(planned.work),
                    "failed": [dataclasses.astuple(failure) for failure in planned.failed],
                    "notes": self._notes,
                    # Seconds that devices waited for this batch; of the step before; of those, waiting for the others.
                    "wait": wait,
                    "step": None if began is None else asked - began,
                    "idle": idle,
                }
                self._notes = []
                began = asked
                late = _Late(self._say, f"{stage} step {done}")
                gathered = self._processes.gather(f"step/{done}", json.dumps(record), late.tell)
                records = [json.loads(text) for text in gathered]
                # All have begun this step, so all have read what was said before the one before.
                self._processes.forget(f"step/{done - 1}")
                idle = max(time.monotonic() - max(came, free_at()), 0.0)
                self.waits = (wait, idle if len(records) > 1 else 0.0)
                self._check_alike(done, records)
                if self._processes.index == 0:
                    self._tell(records)
                    self.pace.add(stage, done, records)
                yield self._whole(planned, [records[giver] for giver in self._givers])
        finally:
            batches.close()  # type: ignore[attr-defined]  # Grain's iterators and ours have it

    def _check_alike(self, step: int, records: list[dict]) -> None:
        """Refuses a part that processes share and did not make alike: their devices would compute on different rows."""
        for index, (part, record) in enumerate(zip(self._parts, records, strict=True)):
            giver = self._parts.index(part)
            if record["rows"] != records[giver]["rows"]:
                failed = [
                    f"process {one}: {Failure(*values).reason}"
                    for one in (giver, index)
                    for values in records[one]["failed"]
                ]
                raise RuntimeError(
                    f"step {step}: processes {giver} and {index} hold the same rows of a batch and made them "
                    f"differently ({'; '.join(failed) or 'all samples could be read'}); both must read the same data. "
                    "Start the run again: it goes on after its last checkpoint."
                )

    def _tell(self, records: list[dict]) -> None:
        for index, record in enumerate(records):
            for line in record["notes"]:
                self._say(f"process {index}: {line}")

    def _whole(self, planned: PlannedBatch, records: list[dict]) -> PlannedBatch:
        if len(records) == 1:
            return planned
        return dataclasses.replace(
            planned,
            tokens=sum(record["tokens"] for record in records),
            row_hashes=tuple(row for record in records for row in record["rows"]),
            failed=tuple(Failure(*values) for record in records for values in record["failed"]),
            work=sum((Work(**record["work"]) for record in records), Work()),
        )


class _Late:
    """Names a process that the others wait for, after a minute and then after twice as long each time.

    It is there, since a run ends with a process that dies: stuck in reading, or its devices in a step.
    """

    def __init__(self, say: Callable[[str], None], where: str):
        self._say, self._where, self._next = say, where, _LATE_SECONDS

    def tell(self, index: int, seconds: float) -> None:
        if seconds >= self._next:
            self._next *= 2
            self._say(
                f"{self._where}: process {index} has been waited for {seconds:.0f} s, with its batch or with the step "
                "before it; what it does, `py-spy dump` on its host tells"
            )
