"""`quarantine.jsonl`: the samples that a run could not use, one a line, with the reason.

    {"stage": "s1", "step": 0, "sample": "clips.jsonl:7 (clip-6)", "reason": "clips.jsonl:7: video ... is truncated"}

Step 0 is the planning: such a sample is never asked for. Others were planned and then could not be decoded; a line
tells of the first time.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax.data.failure import Failure
from qwenvl_jax.train.refusals import naming

FILE = "quarantine.jsonl"


class Quarantine:
    """The list of a run, opened at the step that the run goes on from.

    Args:
      folder: of the run.
      planned: the samples left out of the plan, by the name of their stage.
      done: steps that the restored checkpoint holds; what was found in later ones will be found again.
    """

    def __init__(self, folder: Path, planned: Sequence[tuple[str, Failure]], done: int):
        self.path = folder / FILE
        lines = [_line(stage, 0, failure) for stage, failure in planned]
        lines += [line for line in _read(self.path) if 0 < line["step"] <= done]
        self._known = {(line["stage"], line["sample"]): Failure(line["sample"], line["reason"]) for line in lines}
        temporary = self.path.with_name(f".{FILE}.new")
        if lines or self.path.exists():
            with naming(self.path):
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
            os.replace(temporary, self.path)

    def add(self, stage: str, step: int, failures: Sequence[Failure]) -> list[Failure]:
        """Writes down the samples that a step could not use; returns those that are new."""
        new = [failure for failure in failures if (stage, failure.sample) not in self._known]
        if new:
            with naming(self.path), self.path.open("a") as file:
                for failure in new:
                    self._known[stage, failure.sample] = failure
                    file.write(json.dumps(_line(stage, step, failure)) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return new

    def of(self, stage: str) -> list[Failure]:
        """All that a stage could not use so far."""
        return [failure for (name, _), failure in self._known.items() if name == stage]


def _line(stage: str, step: int, failure: Failure) -> dict[str, Any]:
    return {"stage": stage, "step": step, "sample": failure.sample, "reason": failure.reason}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a list; a line half written ends it."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
