"""Settings from the command line, and config files."""

import dataclasses

import pytest

from qwenvl_jax.config import MoeConfig, QwenVLConfig, TextConfig, VisionConfig
from qwenvl_jax.data.mixture import MixturePart
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train.config import (
    EXECUTION_FIELDS,
    RUNTIME_FIELDS,
    DataConfig,
    StageConfig,
    TrainConfig,
    ValidationConfig,
    execution_settings,
    fingerprint,
    flat,
)
from qwenvl_jax.train.config_file import load_config_file, prepared_config
from qwenvl_jax.train.overrides import apply_overrides

MODEL = QwenVLConfig(
    text=TextConfig(100, 64, 64, 2, 2, 1),
    vision=VisionConfig(2, 32, 32, 2, 64, (0,)),
)
RATES = (("vision", 0.5), ("mergers", 2.0))
CONFIG = TrainConfig(
    model=MODEL,
    processor="somewhere",
    stages=(StageConfig("s0", 3, DataConfig("a.jsonl")), StageConfig("s1", 5, DataConfig("b.jsonl"))),
)


def changed(*arguments: str) -> dict:
    """What differs from CONFIG."""
    before = dict(flat(CONFIG))
    return {name: value for name, value in flat(apply_overrides(CONFIG, arguments)) if before.get(name) != value}


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ("--seed 3", {"seed": 3}),
        ("--seed=3 --checkpoint-every 7", {"seed": 3, "checkpoint_every": 7}),
        ("--stages.s1.steps 9", {"stages.1.steps": 9}),
        ("--stages.0.optimizer.learning_rate 1e-2", {"stages.0.optimizer.learning_rate": 0.01}),
        ("--steps 9", {"stages.0.steps": 9, "stages.1.steps": 9}),
        ("--optimizer.name muon --stages.s0.optimizer.name adamw", {"stages.1.optimizer.name": "muon"}),
        ("--remat full", {"stages.0.remat": "full", "stages.1.remat": "full"}),
        ("--stages.s0.batch.vision 2 24 1 96", {"stages.0.batch.vision": ((2, 24), (1, 96))}),
        ("--stages.s0.data.source x.jsonl", {"stages.0.data.source": "x.jsonl"}),
        ("--stages.s0.data.source x.jsonl y.jsonl", {"stages.0.data.source": ("x.jsonl", "y.jsonl")}),
        ("--stages.s0.data.cache_dir here", {"stages.0.data.cache_dir": "here"}),
        ("--init None", {}),
        ("--model.text.intermediate_size 32", {"model.text.intermediate_size": 32}),
        ("--seed 4294967295", {"seed": 2**32 - 1}),
        ("--stages.s0.optimizer.rates vision 0.5 mergers 2", {"stages.0.optimizer.rates": RATES}),
    ],
)
def test_overrides(arguments, difference):
    assert changed(*arguments.split()) == difference


def test_names_with_dashes():
    """Dashes stand for underscores, but stages and data sets are called as they are called."""
    judged = ValidationConfig(data=(MixturePart("held-out", "a.jsonl"),))
    stages = (StageConfig("warm-up", 3, validation=judged), StageConfig("warm_down", 5, validation=judged))
    config = dataclasses.replace(CONFIG, stages=stages)
    told = ["--validation.data.held-out.max-samples", "7", "--stages.warm-up.loss-chunk=9", "--checkpoint-every", "4"]
    first, second = (given := apply_overrides(config, [*told, "--stages.warm-down.steps", "8"])).stages
    assert [stage.validation.data[0].max_samples for stage in (first, second)] == [7, 7]
    assert (first.loss_chunk, second.steps, given.checkpoint_every) == (9, 8, 4)
    with pytest.raises(ConfigError, match=r"unknown setting --stages\.warm-up\.stepps; did you mean --stages\.warm-up"):
        apply_overrides(config, ["--stages.warm-up.stepps", "8"])
    # Two that differ in nothing else are told apart by what they are called.
    alike = dataclasses.replace(config, stages=(stages[0], dataclasses.replace(stages[1], name="warm_up")))
    assert [s.steps for s in apply_overrides(alike, ["--stages.warm_up.steps", "8"]).stages] == [3, 8]
    assert [s.steps for s in apply_overrides(alike, ["--stages.warm-up.steps", "8"]).stages] == [8, 5]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: StageConfig("s", 1, loss="token_mean"),
            "stage s: loss='token_mean' is not one of token, sample, sqrt",
        ),
        (lambda: DataConfig(weigh_by="token"), "data.weigh_by='token' is not one of samples, tokens"),
        (lambda: dataclasses.replace(CONFIG, dtype="bf16"), "dtype='bf16' is not one of float32, bfloat16"),
        (lambda: dataclasses.replace(CONFIG, param_dtype="half"), "param_dtype='half' is not one of float32, bfloat16"),
    ],
)
def test_words_of_a_config_file_are_checked(make, told):
    with pytest.raises(ConfigError, match=told):
        make()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--sed 3", "unknown setting --sed; did you mean --seed"),
        ("--optimizer.learning_rat 3", "did you mean --optimizer.learning_rate"),
        ("--stages.s0.stepps 3", r"did you mean --stages\.s0\.steps"),
        ("--stages.s7.steps 3", r"did you mean --stages\.s[01]\.steps"),
        ("--validation.data a/x.jsonl b/x.jsonl", "b/x.jsonl: expected paths of data sets, no two of the same"),
        ("--data.mixture x.jsonl", "in a mixture each part has its own"),
        ("--validation.data", "--validation.data needs a value"),
        ("--seed many", "--seed many: expected a value of type int"),
        ("--seed 1 2", "--seed 1 2: expected a value of type int"),
        ("--seed", "--seed needs a value"),
        ("--stages.s0.loss mean", "--stages.s0.loss mean: expected"),
        ("--optimizer 3", "unknown setting --optimizer"),
        ("seed 3", "unexpected argument 'seed'"),
        ("--seed -1", "seed=-1 must be from 0 to 4294967295"),
        ("--seed 4294967296", "seed=4294967296 must be from 0 to 4294967295"),
        ("--checkpoint_every 0", "checkpoint_every=0 must be at least 1"),
        ("--keep_every 150", "keep_every=150 must be a multiple of checkpoint_every=100"),
        ("--steps 0", "steps=0 must be at least 1"),
        ("--model.text.num_key_value_heads 3", "must be a multiple"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, told, capsys):
    with pytest.raises(ConfigError, match=told) as error:
        apply_overrides(CONFIG, arguments.split())
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_settings_that_go_together_may_come_in_any_order():
    """Each alone would be refused: 2 rows in 8 groups, 4 groups of 1 row."""
    eight = apply_overrides(CONFIG, ["--batch.rows", "8", "--batch.groups", "8"])
    for arguments in ("--batch.rows 2 --batch.groups 1", "--batch.groups 1 --batch.rows 2"):
        (first, _) = apply_overrides(eight, arguments.split()).stages
        assert (first.batch.rows, first.batch.groups) == (2, 1)
    with pytest.raises(ConfigError, match=r"batch\.rows=2 must be a multiple of batch\.groups=8"):
        apply_overrides(eight, ["--batch.rows", "2"])
    assert apply_overrides(CONFIG, ["--seed", "1", "--seed", "2"]).seed == 2


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("held.jsonl", (MixturePart("", "held.jsonl"),)),
        ("a/held.jsonl b/words.jsonl", (MixturePart("held", "a/held.jsonl"), MixturePart("words", "b/words.jsonl"))),
    ],
)
def test_paths_make_data_sets(arguments, parts):
    """Of those that a stage is judged by, and of a mixture, where there were none."""
    first, second = apply_overrides(CONFIG, ["--stages.s1.validation.data", *arguments.split()]).stages
    assert (first.validation.data, second.validation.data) == ((), parts)
    assert [s.validation.data for s in apply_overrides(CONFIG, ["--validation.data", *arguments.split()]).stages] == [
        parts
    ] * 2
    emptied = ["--data.source", "", "--data.mixture", *arguments.split()]
    assert [stage.data.mixture for stage in apply_overrides(CONFIG, emptied).stages] == [parts] * 2


def test_a_validation_without_data_is_told():
    data = ("--stages.s1.validation.data", "held.jsonl")
    for arguments in (["--validation.every", "50"], [*data, "--stages.s0.validation.answers", "2"]):
        name = arguments[-2]
        with pytest.raises(ConfigError, match=rf"^{name} does nothing without data .* add --.*\.data held-out"):
            apply_overrides(CONFIG, arguments)
    # One that is heard in a stage may be given for all.
    judged = apply_overrides(CONFIG, ["--validation.every", "50", *data]).stages[1].validation
    assert (judged.every, [part.source for part in judged.data]) == (50, ["held.jsonl"])


def test_every_setting_is_in_the_fingerprint_but_those_that_change_nothing():
    skipped = RUNTIME_FIELDS | {"source", "root", "checkpoint_every", "mesh"} | set(EXECUTION_FIELDS)
    names = {name: set(name.split(".")) & skipped for name, _ in flat(CONFIG)}
    assert set(fingerprint(CONFIG)) == {name for name, of in names.items() if not of}
    assert set().union(*names.values()) == skipped


def test_a_run_that_left_out_too_many_steps_may_be_given_a_higher_bound():
    assert fingerprint(apply_overrides(CONFIG, ["--guard.abort_after", "99"])) == fingerprint(CONFIG)
    assert fingerprint(apply_overrides(CONFIG, ["--guard.max_loss", "99"])) != fingerprint(CONFIG)


def test_configs_that_cannot_be():
    with pytest.raises(ConfigError, match="each with a name of its own"):
        TrainConfig(model=MODEL, processor="x", stages=(StageConfig("a", 1), StageConfig("a", 1)))
    with pytest.raises(ConfigError, match="processor is not set"):
        TrainConfig(model=MODEL, stages=(StageConfig("a", 1),))


def test_a_model_of_the_command_line_brings_its_processor(tmp_path, capsys):
    """Unless another one is named; a preset has none. What the config needs is prepared for what comes out."""
    file = tmp_path / "c.py"
    file.write_text(
        "from tests.train.test_overrides import CONFIG\n\n\ndef get_config():\n    return CONFIG\n\n\n"
        "def prepare(config):\n    print(config.model if isinstance(config.model, str) else 'shape')\n"
    )

    def models(model=None, *overrides):
        config = prepared_config(file, overrides, model)
        assert capsys.readouterr().out == f"{config.model if isinstance(config.model, str) else 'shape'}\n"
        return config.model, config.processor

    assert models() == (MODEL, "somewhere")
    assert models("./mine") == ("./mine", None)
    assert models("./mine", "--processor", "./other") == ("./mine", "./other")
    assert models("qwen3_vl_2b") == (PRESETS["qwen3_vl_2b"], "somewhere")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, r"config file .*c\.py does not exist"),
        ("x = 1", r"c\.py has no get_config"),
        ("def get_config():\n    return 3", r"must return a TrainConfig; got int"),
        ("def get_config():\n    return 1 / 0", r"c\.py:2: ZeroDivisionError"),
        ("import nothing_of_this_name", r"c\.py:1: ModuleNotFoundError"),
        ("def get_config(:", r"c\.py:1: SyntaxError"),
    ],
)
def test_config_files_that_are_none(tmp_path, text, told):
    if text is not None:
        (tmp_path / "c.py").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_config_file(tmp_path / "c.py")


def test_microbatches_may_change_where_no_router_s_balance_is_theirs():
    """The loss is that of the whole batch, but the load balance of experts is that of each microbatch."""
    moe = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    model = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, moe=moe))
    experts = dataclasses.replace(CONFIG, model=model)
    for config, settings, free in (
        (CONFIG, (), True),
        (CONFIG, ("--router_balance", "0.1"), True),
        (experts, (), True),
        (experts, ("--router_balance", "0.1"), False),
        (experts, ("--router_z", "0.1"), True),  # over all tokens alike
    ):
        config = apply_overrides(config, settings)
        other = apply_overrides(config, ["--stages.s1.microbatches", "2"])
        assert (fingerprint(other) == fingerprint(config)) == free
        assert (execution_settings(other) != execution_settings(config)) == free
    other = apply_overrides(CONFIG, ["--stages.s1.remat", "full"])
    assert fingerprint(other) == fingerprint(CONFIG)
    assert execution_settings(other)["stages.1.remat"] == "'full'"
