"""A tiny run that is judged on its way: its held-out data, its settings, and a config file of it."""

import dataclasses
import json
from pathlib import Path

from qwenvl_jax.data.mixture import MixturePart
from qwenvl_jax.train.config import MeshConfig, TrainConfig, ValidationConfig
from tests.train.several import several_config
from tests.train.tiny_run import tiny_config, write_records, write_tiny_run

CONFIG = """\
from tests.train.judged import judged_config


def get_config():
    return judged_config({folder!r}, {changes})
"""


def write_judged_run(folder: Path, clip: Path) -> None:
    """The data of a tiny run, and two data sets beside it: clips, and words of which one record has two turns.

    `judged.py` is its config, `plain.py` that of the run without validation, `several.py` that for several processes.
    """
    write_tiny_run(folder, clip)
    clips = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()[:2]]
    write_records(folder / "held-clips.jsonl", clips)
    words = [_record(f"w{i}", ("what " * i, "a blue circle")) for i in range(5)]
    words.append(_record("two", ("describe", "a red square"), ("when?", "at 3 seconds")))
    write_records(folder / "held-words.jsonl", words)
    for name, changes in (("judged", ""), ("plain", "data=()")):
        (folder / f"{name}.py").write_text(CONFIG.format(folder=str(folder), changes=changes))
    several = CONFIG.format(folder=str(folder), changes="").replace("judged_config", "judged_by_several_config")
    (folder / "several.py").write_text(several)


def judged_config(folder: str | Path, **changes) -> TrainConfig:
    """One stage of five steps, judged after steps 2, 4 and 5."""
    parts = tuple(MixturePart(name, str(Path(folder) / f"held-{name}.jsonl")) for name in ("clips", "words"))
    settings = {"data": parts, "every": 2, "batches": 3, "answers": 2, "max_new_tokens": 4} | changes
    config = tiny_config(folder)
    stage = dataclasses.replace(config.stages[1], validation=ValidationConfig(**settings))
    return dataclasses.replace(config, stages=(stage,), checkpoint_every=3)


def judged_by_several_config(folder: str | Path) -> TrainConfig:
    """The same stage, with batches that several processes can share, over all their devices."""
    config = judged_config(folder)
    stage = dataclasses.replace(config.stages[0], batch=several_config(folder).stages[0].batch)
    return dataclasses.replace(config, stages=(stage,), mesh=MeshConfig())


def _record(name: str, *turns: tuple[str, str]) -> dict:
    roles = ("user", "assistant")
    said = [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]
    return {"id": name, "messages": said}
