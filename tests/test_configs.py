"""Every shipped config against its text in `tests/golden/configs`, and what the recipes say of themselves."""

import difflib
import math
import re

import pytest

from qwenvl_jax.cli import main
from qwenvl_jax.data.mixture import MixturePart
from qwenvl_jax.errors import DataError
from qwenvl_jax.train import recipes
from qwenvl_jax.train.config import PARTS, DataConfig, StageConfig, TrainConfig, ValidationConfig, flat
from qwenvl_jax.train.config_file import load_config_file
from qwenvl_jax.train.overrides import apply_overrides
from tools.golden_configs import GOLDEN, ROOT, dump, shipped

REMAKE = "if that is meant, .venv/bin/python -m tools.golden_configs writes the texts again"


@pytest.mark.parametrize("name", shipped())
def test_shipped_configs_are_as_written(name):
    file = GOLDEN / f"{name}.txt"
    written = file.read_text().splitlines() if file.exists() else []
    moved = [
        line
        for line in difflib.unified_diff(written, dump(shipped()[name]).splitlines(), lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]
    if moved:
        pytest.fail(f"{shipped()[name].relative_to(ROOT)} has changed; {REMAKE}:\n" + "\n".join(moved))


def test_no_text_is_left_of_a_config_that_is_gone():
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(shipped()), REMAKE


@pytest.mark.parametrize(
    ("stage", "trainable", "tokens", "length"),
    [
        (recipes.s0, "mergers", 67e9, 8_192),
        (recipes.s1, "all", 1e12, 8_192),
        (recipes.s2, "all", 1e12, 32_768),
        (recipes.s3, "all", 100e9, 262_144),
    ],
)
def test_the_stages_are_those_of_the_report(stage, trainable, tokens, length):
    made = stage()
    assert (made.trainable, made.batch.length) == (trainable, length)
    assert made.steps * made.batch.rows * length == pytest.approx(tokens, rel=1e-3)
    # What a video may take fits a row, times beside it included.
    most = made.data.video_budget.max_video_tokens or 0
    assert max(most, made.data.max_image_tokens or 0) < 0.9 * length


@pytest.mark.parametrize("path", [path for name, path in shipped().items() if not name.startswith("demo")])
def test_mixtures_add_up_and_are_in_the_guide(path):
    config, _ = load_config_file(path)
    guide = (ROOT / "docs/curriculum.md").read_text()
    for stage in config.stages:
        shares = stage.data.modality_weights
        assert not shares or math.isclose(sum(share for _, share in shares), 1, abs_tol=1e-9)
        assert not shares or {part.modality for part in stage.data.mixture} == {name for name, _ in shares}
        assert all(f"`{part.name}`" in guide or part.name == "own" for part in stage.data.mixture)


def test_tables_of_the_guide_are_the_recipes():
    """Shares of the parts in percent, and the rows of steps and rates."""
    stages = [make() for make in (recipes.s0, recipes.s1, recipes.s2, recipes.s3)]
    guide = (ROOT / "docs/curriculum.md").read_text()
    rows = {cells[0]: cells[1:] for line in guide.splitlines() if (cells := [c.strip() for c in line.split("|")[1:-1]])}
    for name in recipes.MODALITIES:
        assert rows[f"`{name}`"][1:] == [share_of(name, stage) for stage in stages], name
    sft = [recipes.sft(), recipes.sft_long()]
    assert rows["steps"] == [f"{stage.steps:,}" for stage in stages] + [", ".join(f"{s.steps:,}" for s in sft)]
    peaks = [float(rate) for rate in rows["peak rate, decoder"][1:]]
    assert peaks == [stage.optimizer.learning_rate for stage in (*stages[1:], sft[0])]
    assert [int(c.replace(",", "")) for c in rows["image, tokens at most"][:4]] == [
        stage.data.max_image_tokens for stage in stages
    ]


def share_of(name: str, stage: StageConfig) -> str:
    weights = {part.name: part.weight for part in stage.data.mixture if part.modality == recipes.MODALITIES[name]}
    if name not in weights:
        return ""
    share = dict(stage.data.modality_weights)[recipes.MODALITIES[name]]
    return f"{round(100 * share * weights[name] / sum(weights.values()), 1):g} %"


def test_the_chain_carries_the_optimizer_where_the_same_weights_learn():
    stages = recipes.curriculum()
    assert [stage.carry_optimizer for stage in stages] == [False, False, True, True]
    assert not any(make().carry_optimizer for make in (recipes.s0, recipes.s1, recipes.s2, recipes.s3))


@pytest.mark.parametrize("length", ["32k", "256k"])
def test_lora_is_the_full_run_with_adapters(length):
    full, lora = (load_config_file(shipped()[f"sft-{kind}_{length}"])[0] for kind in ("full", "lora"))
    before = dict(flat(full))
    assert {name for name, value in flat(lora) if before[name] != value} == {
        "adapter.rank",
        "adapter.alpha",
        "stages.0.trainable",
        "stages.0.optimizer.learning_rate",
    }


def test_commands_in_the_docstrings_are_those_of_the_files():
    for path in shipped().values():
        assert re.search(rf"qwenvl-jax train {path.relative_to(ROOT)}", path.read_text()), path


def test_the_data_root_is_the_variable_or_a_setting(monkeypatch):
    monkeypatch.delenv(recipes.DATA_VARIABLE, raising=False)
    assert recipes.s0().data.parts[0].source == "data/captions"
    monkeypatch.setenv(recipes.DATA_VARIABLE, "/somewhere")
    config = recipes.pretraining(recipes.s0(), recipes.s1())
    assert {part.source for part in config.stages[0].data.parts} == {
        f"/somewhere/{n}" for n in ("captions", "ocr", "knowledge")
    }
    config = apply_overrides(config, ["--data.root", "x", "--stages.s1.data.mixture.ocr.source", "/y/z"])
    assert [part.source for part in config.stages[1].data.parts[:2]] == ["x/captions", "/y/z"]


def test_a_root_holds_every_kind_of_source():
    items = [{"messages": []}]
    parts = (MixturePart("a", ("b", "/c")), MixturePart("d", items))
    stage = StageConfig("s", 1, DataConfig(items, root="/r"), validation=ValidationConfig((MixturePart("held", "h"),)))
    with pytest.raises(DataError, match="1 of 1 data sets are missing: /r/h;"):
        recipes.check_data(TrainConfig("m", (stage,)))
    assert [part.source for part in DataConfig(mixture=parts, root="r").parts] == [("r/b", "/c"), items]
    assert DataConfig(source="", root="r").parts[0].source == ""


def test_missing_data_is_told_all_at_once(tmp_path, capsys):
    (tmp_path / "ocr").mkdir()
    for name in ("s0", "curriculum"):
        arguments = ["train", str(shipped()[f"pretrain-{name}"]), "--data.root", str(tmp_path), "--out", str(tmp_path)]
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert f"{tmp_path / 'captions'}, {tmp_path / 'knowledge'}" in told and str(tmp_path / "ocr") not in told
        assert ("2 of 3" in told) == (name == "s0") and "qwenvl-jax data build" in told and "QWENVL_DATA" in told
    assert "10 of 11" in told


def test_buckets_are_to_be_mounted():
    with pytest.raises(DataError, match="gs://bucket/captions cannot be one; mount"):
        recipes.check_data(apply_overrides(recipes.pretraining(recipes.s0()), ["--data.root", "gs://bucket"]))


def test_parts_of_a_model_are_those_of_its_weights():
    """The first names of the weights of a model, in `PARTS` and in what the recipes freeze."""
    assert sorted(name for names in PARTS.values() for name in names) == ["deepstack", "merger", "text", "vision"]
    frozen = re.compile(recipes.sft().trainable)
    assert [name for name in ("vision.a", "merger.a", "deepstack.a", "text.a") if frozen.search(name)] == [
        "merger.a",
        "deepstack.a",
        "text.a",
    ]


def test_a_run_of_no_files_needs_no_folder():
    recipes.check_data(TrainConfig("m", (StageConfig("s", 1, DataConfig(source=[{"messages": []}])),)))
