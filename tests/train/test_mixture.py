"""Mixtures in a run: every setting changes the batches, a stopped run goes on, and what steps will hold is told."""

import dataclasses
import json

import pytest

from qwenvl_jax.cli import main
from qwenvl_jax.data.mixture import MixturePart, VideoBudget
from qwenvl_jax.data.pipeline import batches
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.train.config import DataConfig
from qwenvl_jax.train.loop import train
from qwenvl_jax.train.metrics import read_metrics
from tests.data.host import loader_of
from tests.data.mixed import mixed_config
from tests.tiny import tiny_processor_folder

pytestmark = pytest.mark.usefixtures("promotion_as_usual")

STEPS = 3


@pytest.fixture(scope="module")
def before(mixed_folder):
    return hashes(mixed_config(mixed_folder))


def hashes(config, steps: int = STEPS) -> list[str]:
    return [planned.hash for planned in batches(loader_of(config), steps)]


def with_part(config, number: int, **changes) -> DataConfig:
    data = config.stages[0].data
    parts = list(data.mixture)
    parts[number] = dataclasses.replace(parts[number], **changes)
    return dataclasses.replace(data, mixture=tuple(parts))


@pytest.mark.parametrize(
    ("number", "changes", "steps"),
    [
        (0, {"name": "other"}, 3),
        (0, {"weight": 5.0}, 1),
        (0, {"final_weight": 9.0}, 6),
        (1, {"max_epochs": 1.0}, 3),
        (2, {"max_samples": 5}, 1),
    ],
)
def test_every_setting_of_a_part_changes_the_batches(mixed_folder, number, changes, steps):
    config = mixed_config(mixed_folder)
    (stage,) = config.stages
    changed = dataclasses.replace(stage, data=with_part(config, number, **changes))
    assert hashes(dataclasses.replace(config, stages=(changed,)), steps) != hashes(config, steps)


@pytest.mark.parametrize(
    "changes",
    [
        {"frame_rates": ()},
        {"frame_rates": ((2.0, 1.0), (4.0, 1.0), (8.0, 9.0))},
        {"weigh_by": "tokens"},
        {"video_budget": VideoBudget(max_frames=4)},
        {"max_image_tokens": 4},
        {"hms_share": 0.0},
        {"window": 17},
        {"shuffle": False},
    ],
)
def test_every_setting_of_the_data_changes_the_batches(mixed_folder, before, changes):
    assert hashes(mixed_config(mixed_folder, **changes)) != before


def test_shares_of_modalities_change_the_batches(mixed_folder, before):
    config = mixed_config(mixed_folder)
    parts = tuple(
        dataclasses.replace(part, modality=modality)
        for part, modality in zip(config.stages[0].data.mixture, ("text", "seen", "seen"), strict=True)
    )
    assert hashes(mixed_config(mixed_folder, mixture=parts)) == before
    assert hashes(mixed_config(mixed_folder, mixture=parts, modality_weights=(("text", 0.1), ("seen", 0.9)))) != before


def test_format_of_a_part_is_its_own(mixed_folder, tmp_path):
    """One part of LLaVA's conversations, one of messages."""
    asked = {"from": "human", "value": "<video>\nwhat leaves?"}
    lines = [
        {
            "id": str(n),
            "video": str(mixed_folder / "clip.mp4"),
            "conversations": [asked, {"from": "gpt", "value": "red"}],
        }
        for n in range(3)
    ]
    (tmp_path / "llava.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = MixturePart("text", str(mixed_folder / "text.jsonl"))
    config = mixed_config(mixed_folder, mixture=(text, MixturePart("a", str(tmp_path / "llava.jsonl"), format="llava")))
    assert len(loader_of(config).plan.parts[1].entries) == 3
    with pytest.raises(DataError, match=r"llava\.jsonl:1"):
        loader_of(
            mixed_config(
                mixed_folder, mixture=(text, MixturePart("a", str(tmp_path / "llava.jsonl"), format="messages"))
            )
        )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"source": "a.jsonl"}, "in a mixture each part has its own"),
        ({"format": "llava"}, "in a mixture each part has its own"),
        ({"max_image_tokens": 0}, "max_image_tokens=0 must be at least 1"),
        ({"frame_rates": ((2.0, -1.0),)}, r"data\.frame_rates"),
        ({"frame_rates": ((2.0, 0.0),)}, "a weight above 0"),
        ({"modality_weights": (("text", float("nan")),)}, r"data\.modality_weights"),
    ],
)
def test_settings_that_cannot_be(mixed_folder, values, told):
    with pytest.raises(ConfigError, match=told):
        mixed_config(mixed_folder, **values)


def test_a_mixture_that_ends_before_the_stage_is_told(mixed_folder):
    parts = (MixturePart("text", str(mixed_folder / "text.jsonl"), max_epochs=2),)
    with pytest.raises(DataError, match=r"stage s1: the mixture comes to its end before step [1-9]"):
        loader_of(mixed_config(mixed_folder, mixture=parts))
    config = mixed_config(mixed_folder, mixture=(dataclasses.replace(parts[0], max_epochs=400),))
    longer = dataclasses.replace(config.stages[0], steps=500)
    with pytest.raises(DataError, match=r"stage s1: the mixture has samples for about \d+ of 500 steps"):
        loader_of(dataclasses.replace(config, stages=(longer,)))


@pytest.mark.slow
def test_a_run_over_a_mixture_goes_on_where_it_was_stopped(mixed_folder, tmp_path):
    config = mixed_config(mixed_folder)
    train(config, tmp_path / "whole")

    def stop(line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", on_step=stop)
    (stage,) = config.stages
    other = dataclasses.replace(stage, data=dataclasses.replace(stage.data, workers=1, threads=2))
    train(dataclasses.replace(config, stages=(other,)), tmp_path / "stopped")

    def lines(name: str) -> list[tuple]:
        found = read_metrics(tmp_path / name / "metrics.jsonl")
        return [(line["step"], line["loss"], line["tokens"], line["batch"]) for line in found]

    assert lines("stopped") == lines("whole") and len(lines("whole")) == 12
    assert [line[3] for line in lines("whole")] == hashes(config, 12)


CONFIG = """\
from tests.data.mixed import mixed_config
from tests.tiny import tiny_processor_folder


def get_config():
    return mixed_config({folder!r})
"""


@pytest.fixture
def config_file(mixed_folder, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(folder=str(mixed_folder)))
    return str(tmp_path / "config.py")


def test_what_steps_will_hold(mixed_folder, config_file, tmp_path, capsys):
    assert main(["data", "steps", config_file, "--json", "--out", str(tmp_path / "steps.png")]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    plan = loader_of(mixed_config(mixed_folder)).plan
    entries = [entry for n in range(12) for row in plan[n] for entry in row]
    assert stage["steps"] == 12 and stage["samples"] == len(entries)
    assert stage["tokens"] == pytest.approx(sum(plan.facts[i].tokens for i in entries) / (12 * 16 * 192))
    assert stage["patches"] == pytest.approx(sum(sum(plan.facts[i].frames) for i in entries) / (12 * 16 * 256))
    assert [part["name"] for part in stage["parts"]] == ["text", "pictures", "clips"]
    assert sum(part["share_of_samples"] for part in stage["parts"]) == pytest.approx(1)
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    assert main(["data", "steps", config_file, "--steps", "2", "--data.mixture.text.weight", "9"]) == 0
    told = capsys.readouterr().out
    assert "s1: 2 steps of 16 rows of 192 tokens" in told and "pictures" in told


def test_steps_of_the_model_that_is_named(config_file, tmp_path, capsys):
    """Its processor plans, as in training; here it makes less of a picture."""
    tiny_processor_folder(tmp_path / "other", image_pixels=(1024, 2048))

    def patches(*arguments):
        assert main(["data", "steps", config_file, "--steps", "2", "--json", *map(str, arguments)]) == 0
        return json.loads(capsys.readouterr().out)["stages"][0]["patches"]

    assert patches("--model", tmp_path / "other") == patches("--processor", tmp_path / "other") < patches()


def test_steps_that_cannot_be_planned(config_file, capsys):
    assert main(["data", "steps", config_file, "--steps", "0"]) == 2
    assert "--steps 0 must be at least 1" in capsys.readouterr().err
    assert main(["data", "steps", config_file, "--out", "steps.doc"]) == 2
    assert main(["data", "steps", config_file, "--data.mixture.text.wait", "3"]) == 2
    assert "data.mixture.text.weight" in capsys.readouterr().err
