"""Plans: facts, tables, mistakes, and steps compiled for slices."""

import dataclasses
import json
import os
import shlex
from typing import get_args

import jax
import pytest

from qwenvl_jax import cli
from qwenvl_jax.checkpoint import folder as folders
from qwenvl_jax.checkpoint.hf import parameter_count
from qwenvl_jax.checkpoint.hf_config import config_to_json
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.parallel.placement import Execution, Remat
from qwenvl_jax.plan import compiling, show
from qwenvl_jax.plan.assumed import assume
from qwenvl_jax.plan.bounds import bounds, by_axis, memory
from qwenvl_jax.plan.compiling import Compiled, Request, check_libtpu, needed_bytes
from qwenvl_jax.plan.plan import Plan, layout_of, read_cells, request_of
from qwenvl_jax.plan.programs import traced_step
from qwenvl_jax.plan.search import candidates, rank
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train.config import AdapterConfig, DataConfig, MeshConfig, OptimizerConfig
from qwenvl_jax.train.config_file import load_config_file
from qwenvl_jax.train.overrides import apply_overrides
from tests.parallel.test_compiled import needs_libtpu

GIB = 2**30
S1 = "configs/pretrain/s1.py"

# A model of few weights in the ids and the form of Qwen3-VL, for compilers.
SMALL = """\
import dataclasses

from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train import recipes


def get_config():
    config = recipes.pretraining(recipes.s1())
    model = PRESETS["qwen3_vl_2b"]
    text = dataclasses.replace(model.text, num_hidden_layers=2, vocab_size=4096, hidden_size=256, intermediate_size=512)
    vision = dataclasses.replace(
        model.vision, depth=2, hidden_size=256, intermediate_size=512, num_heads=4, out_hidden_size=256,
        deepstack_visual_indexes=(0,),
    )
    return dataclasses.replace(config, model=dataclasses.replace(model, text=text, vision=vision))
"""
BATCH = ["--batch.rows", "4", "--batch.groups", "4", "--batch.length", "1024"]

BATCH8 = ["--batch.rows", "8", "--batch.groups", "8", "--batch.length", "1024"]


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return str(path)


def compiled(**changes) -> Compiled:
    """What the compiler might say of S1 of the 8B."""
    state = {"weights": 64 << 20, "frozen": 0, "optimizer": 128 << 20, "batch": 1 << 20}
    facts = {
        "parameters": 8_767_123_696,
        "learning": 8_767_123_696,
        "state": state,
        "arguments": 193 << 20,
        "temporaries": 10 * GIB,
        "outputs": 192 << 20,
        "aliased": 191 << 20,
        "host": 0,
        "needed": None,
        "flops": 459 * 10**17,
        "again": 153 * 10**17,
        "sent": {"fsdp+context all-gather": 60 * GIB, "context all-gather": 2 * GIB, "context reduce-scatter": GIB},
        "across": 0,
        "unknown_loops": 0,
        "seconds": 30.0,
    }
    return Compiled(**facts | changes)


def plan_of(found: Compiled, topology: str = "v5p:8x8x8") -> Plan:
    (cell,) = read_cells(S1, [], topology=topology, model="qwen3_vl_8b")
    layout, by_rule = layout_of(cell)
    assumed = assume(cell.stage, cell.model)
    return Plan(
        cell, layout, by_rule, False, assumed, found, memory(found, cell.topology), bounds(found, cell.topology)
    )


def test_facts():
    facts = plan_of(compiled()).facts()
    assert list(facts) == [
        "config", "model", "topology", "devices", "mesh", "fits", "hbm", "parameters", "flops_per_step",
        "flops_per_token", "collective_bytes", "bounds", "days", "compile_seconds",
    ]  # fmt: skip
    temporaries = 10 * GIB + (1 << 20)  # what of the outputs does not lie where arguments lay is apart
    limit = int(95.73 * GIB)
    assert facts["hbm"] == {
        "limit": limit,
        "arguments": 193 << 20,
        "temporaries": temporaries,
        "total": temporaries + (193 << 20),
    }
    assert facts["fits"] and facts["devices"] == 512
    assert facts["mesh"] == {
        "data": 4, "fsdp": 64, "expert": 1, "context": 2, "tensor": 1, "rules": "zero", "microbatches": 1,
        "remat": "full",
    }  # fmt: skip
    assert facts["collective_bytes"] == {"fsdp+context": 60 * GIB, "context": 3 * GIB}
    assert facts["bounds"]["compute"] == pytest.approx(459e17 / 512 / 459e12)
    assert facts["bounds"]["hbm"] == pytest.approx((385 * 2**20 + 20 * GIB) / 2765e9)
    assert facts["bounds"]["ici"] == pytest.approx(63 * GIB / 600e9)
    assert facts["bounds"]["dcn"] is None
    assert facts["days"] == pytest.approx(119_209 * 459e17 / 512 / 459e12 / 86400)
    assert facts["flops_per_token"] == 459e17 / (1024 * 8192)
    json.dumps(facts)


def test_a_table_tells_all_of_it():
    text = show.table(plan_of(compiled()))
    for words in (
        "data 4, fsdp 64, context 2, rules zero, 1 microbatches, remat full; by the rule:",
        "each row is one sample of 8,192 tokens",
        "batch.vision=((6, 1024), (9, 10240))",
        "8,767,123,696, all learn",
        "weights 64.00 MiB",
        "33% more for what --remat full makes again",
        "60.00 GiB   all-gather over fsdp+context",
        "one slice: nothing leaves it",
        "119,209 steps",
        "qwenvl-jax train configs/pretrain/s1.py --model qwen3_vl_8b --mesh.data 4 --mesh.fsdp 64 --mesh.context 2",
    ):
        assert words in text, text
    assert "2 loops of unknown length" in show.table(plan_of(compiled(unknown_loops=2)))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (compiled(temporaries=20 * GIB), ["NO, by 6.01 GiB too many", "--microbatches"]),
        # 14 of 15.75 GiB are within the limit, and beyond what a step may take of it.
        (compiled(temporaries=14 * GIB), ["NO, by 14.80 MiB too many"]),
        (
            compiled(
                arguments=None, temporaries=None, outputs=None, aliased=None, host=None, sent=None, needed=40 * GIB
            ),
            ["NO, by 25.83 GiB too many", "not counted", "not known, since nothing was compiled"],
        ),
        (
            compiled(temporaries=20 * GIB, state={"weights": 9 * GIB, "frozen": 0, "optimizer": 0, "batch": 0}),
            ["a larger slice: weights and optimizer alone"],
        ),
        (
            compiled(temporaries=20 * GIB, state={"weights": 0, "frozen": 0, "optimizer": 0, "batch": 9 * GIB}),
            ["fewer batch.rows: the batch alone"],
        ),
    ],
)
def test_what_does_not_fit_says_by_how_much_and_what_to_change(found, words):
    plan = plan_of(found, "v5e:16x16")
    assert not plan.memory.fits and not plan.facts()["fits"]
    text = show.table(plan)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("arguments", "words", "others"),
    [
        (
            ["--mesh.data", "256", "--mesh.fsdp", "1"],
            ["less of mesh.data, more of mesh.fsdp: weights"],
            ["larger", "zero"],
        ),
        (["--mesh.fsdp", "64", "--mesh.context", "4"], ["a larger slice: weights", "--mesh.rules zero"], ["mesh.data"]),
    ],
)
def test_what_is_advised_would_help(arguments, words, others):
    """Along `data` are copies, which a larger slice has more of; `zero` splits over `expert` and `context`."""
    (cell,) = read_cells(S1, arguments, topology="v5e:16x16", model="qwen3_vl_8b")
    state = {"weights": 9 * GIB, "frozen": 0, "optimizer": 9 * GIB, "batch": 0}
    plan = dataclasses.replace(plan_of(compiled(temporaries=20 * GIB, state=state), "v5e:16x16"), cell=cell)
    advice = show.advice(dataclasses.replace(plan, layout=layout_of(cell)[0], by_rule=False))
    assert all(word in advice for word in words), advice
    assert not any(word in advice for word in others), advice


def test_of_a_curriculum_a_stage_has_settings_of_its_own():
    """Unprefixed they would be those of all stages, whose batches they do not divide."""
    cells = read_cells("configs/pretrain/curriculum.py", [], topology="v5e:16x16", model="qwen3_vl_8b", stage="s1")
    plan = dataclasses.replace(plan_of(compiled()), cell=cells[0], layout=layout_of(cells[0])[0], by_rule=True)
    _, _, told = show.command(plan).partition(" --model qwen3_vl_8b ")
    assert told in show.ranking([plan])
    changed = apply_overrides(cells[0].config, shlex.split(told))
    found = {stage.name: (stage.microbatches, stage.remat) for stage in changed.stages}
    written = {stage.name: (stage.microbatches, stage.remat) for stage in cells[0].config.stages}
    assert plan.layout.microbatches > 1
    assert found == written | {"s1": (plan.layout.microbatches, plan.layout.remat)}


def test_what_a_run_would_say_of_its_attention_is_told(small, monkeypatch, optax_promotes):
    """That rows do not suit the kernel of TPUs, which devices here take themselves for."""
    monkeypatch.setattr(Execution, "backend", "splash")
    for length, told in ((1088, 1), (1024, 0)):
        given = ["--batch.rows", "4", "--batch.groups", "4", "--batch.length", str(length), "--mesh.context", "4"]
        (cell,) = read_cells(small, given, topology="v5e:2x2")
        layout, _ = layout_of(cell)
        request = request_of(cell, layout, assume(cell.stage, cell.model, multiple=4))
        facts = traced_step(request, jax.devices()[:4])[1]
        assert len(facts["notes"]) == told
    found = compiled(notes=["stage s1: plain attention"])
    assert "  beware         stage s1: plain attention\n" in show.table(plan_of(found))


def test_what_crosses_between_slices_has_a_bound_of_its_own():
    (cell,) = read_cells(S1, [], topology="v5p:8x8x8", slices=2, model="qwen3_vl_8b")
    layout, _ = layout_of(cell)
    assert cell.topology.devices == 1024 and (layout.mesh.data, layout.mesh.rules) == (8, "zero")
    found = bounds(compiled(across=3 * GIB), cell.topology)
    assert found["dcn"] == 3 * GIB / (50e9 / 8) and found["ici"] == 60 * GIB / 600e9
    plan = dataclasses.replace(plan_of(compiled()), cell=cell, layout=layout, bounds=found)
    assert plan.facts()["mesh"]["slices"] == 2 and plan.facts()["devices"] == 1024
    text = show.table(plan)
    assert "2 slices of v5p:8x8x8, 1024 devices" in text and "DCN (between slices)" in text
    with pytest.raises(ConfigError, match="data or fsdp must be a multiple of 3"):
        layout_of(read_cells(S1, ["--mesh.context", "3", "--mesh.fsdp", "4"], topology="v5e:2x2", slices=3)[0])
    with pytest.raises(ConfigError, match="--slices 0"):
        read_cells(S1, [], topology="v5p:8x8x8", slices=0)


def test_bytes_by_axis():
    assert by_axis({"fsdp all-gather": 3, "fsdp reduce-scatter": 4, "fsdp+tensor all-reduce": 5}) == {
        "fsdp": 7,
        "fsdp+tensor": 5,
    }
    assert by_axis(None) is None


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("the total memory required for HLO temporaries (600.00G) exceeds available HBM (15.75G)", 603 * GIB),
        (
            "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            20.5 * GIB,
        ),
        ("something else", None),
    ],
)
def test_what_the_compiler_says_of_memory(message, size):
    """One message is of temporaries alone: the arguments, 3 GiB here, come on top."""
    assert needed_bytes(message, 3 * GIB) == size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v5p:7x7x7"], ["'v5p:7x7x7'", "4x4x4"]),
        (["--topology", "v5p:8x8x8", "--stage", "s7"], ["'s7'", "s1"]),
        (["--topology", "v5p:8x8x8", "--mesh.tensor", "3"], ["mesh.tensor=3", "1, 2, 4, 8"]),
        (["--topology", "v5p:8x8x8", "--mesh.tonsor", "4"], ["--mesh.tonsor", "--mesh.tensor"]),
        (["--topology", "v5p:8x8x8", "--model", "qwen3_vl_5b"], ["qwen3_vl_5b"]),
        ([], ["--topology"]),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(compiling, "check_libtpu", lambda: None)
    monkeypatch.setattr(show, "check_libtpu", lambda: None)
    assert cli.main(["plan", S1, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(word in err for word in words), err


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'qwenvl_jax\[tpu\]'"):
        check_libtpu()


def test_weights_are_not_fetched(monkeypatch, tmp_path):
    """Of a model on a hub its shape is all that a plan takes."""
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(PRESETS["qwen3_vl_2b"], "bfloat16")))
    asked = []
    monkeypatch.setattr(folders, "resolve", lambda name, **options: asked.append((name, options)) or tmp_path)
    (cell,) = read_cells("configs/sft/lora_32k.py", [], topology="v6e:2x2")
    assert asked == [("Qwen/Qwen3-VL-4B-Instruct", {"weights": False})]
    assert cell.model.text == PRESETS["qwen3_vl_2b"].text


def test_a_search_without_a_number_tries_eight(monkeypatch):
    seen = []
    monkeypatch.setattr(show, "plan_command", lambda *arguments, **options: seen.append(options["tries"]) or 0)
    for given in (["--search", "--json"], ["--search"], ["--search", "3"], []):
        assert cli.main(["plan", S1, "--topology", "v5e:2x2", *given]) == 0
    assert seen == [8, 8, 3, 0]


def test_quantized_weights_are_counted_as_weights(small, optax_promotes):
    """Two of them are in a byte, and scales are none."""
    counts = []
    for quantize in ("none", "nf4", "int8"):
        config = load_config_file(small)[0]
        adapter = AdapterConfig(rank=2, quantize=quantize, tile_size=32)
        stage = dataclasses.replace(
            config.stages[0],
            batch=BatchShape(2, 512, 2, ((2, 1024),)),
            data=DataConfig(),
            optimizer=OptimizerConfig(),
        )
        config = dataclasses.replace(config, adapter=adapter, stages=(stage,), mesh=MeshConfig(fsdp=1))
        _, facts = traced_step(Request(config, assume(stage, config.model), "cpu"), jax.devices())
        counts.append((facts["parameters"], facts["learning"]))
    total = parameter_count(config.model)[0]
    assert len(set(counts)) == 1 and counts[0][0] == total + counts[0][1] > total


def test_a_mesh_of_the_run_is_kept():
    (cell,) = read_cells(S1, ["--mesh.fsdp", "64", "--mesh.context", "8", "--microbatches", "2"], topology="v5p:8x8x8")
    layout, by_rule = layout_of(cell)
    assert not by_rule and (layout.mesh.fsdp, layout.mesh.context, layout.microbatches) == (64, 8, 2)
    assert layout.mesh.rules == "fsdp_tensor"


def test_a_search_tries_the_first_layout_first_and_each_once():
    (cell,) = read_cells(S1, [], topology="v5e:16x16", model="qwen3_vl_8b")
    first, _ = layout_of(cell)
    found = candidates(cell, first)
    assert found[0] == first and len(set(found)) == len(found) > 20
    assert {layout.remat for layout in found} == set(get_args(Remat))
    for layout in found:  # the command of each is all of it, whatever mesh the config has
        (again,) = read_cells(S1, shlex.split(layout.arguments(cell.config.mesh)), topology="v5e:16x16")
        assert layout_of(again)[0] == layout


def test_a_search_keeps_the_overrides_of_a_config():
    """In its commands, too: they name those that a layout has beside them, and none is taken back."""
    given = ["--mesh.override", "kv_heads=", "vision_embed="]
    (cell,) = read_cells(S1, given, topology="v5e:16x16", model="qwen3_vl_8b")
    found = candidates(cell, layout_of(cell)[0])[1:]
    assert all("kv_heads=" in layout.mesh.override for layout in found)
    assert {len(layout.mesh.override) for layout in found} == {2}
    for layout in found[:20]:
        arguments = [*given, *shlex.split(layout.arguments(cell.config.mesh))]
        (again,) = read_cells(S1, arguments, topology="v5e:16x16", model="qwen3_vl_8b")
        assert again.config.mesh == layout.mesh


def test_of_two_alike_the_one_that_leaves_the_host_alone_comes_first():
    plain, offloaded = plan_of(compiled()), plan_of(compiled())
    layout = dataclasses.replace(offloaded.layout, remat="offload")
    offloaded = dataclasses.replace(offloaded, layout=layout)
    assert sorted([offloaded, plain], key=rank) == [plain, offloaded]


def test_what_fits_ranks_by_its_bounds_and_what_does_not_by_its_excess():
    quick, slow = compiled(again=0), compiled(again=10**19)
    large, larger = compiled(temporaries=90 * GIB), compiled(temporaries=91 * GIB)
    plans = [plan_of(found) for found in (larger, slow, large, quick)]
    assert sorted(plans, key=rank) == [plans[3], plans[1], plans[2], plans[0]]
    lines = show.ranking([plans[3], plans[2]]).splitlines()
    assert " yes " in lines[2] and "--mesh.data 4 --mesh.fsdp 64" in lines[2]
    assert f" no, {plans[2].memory.excess / GIB:.2f} GiB too many " in lines[3]
    lines = show.ranking([plans[2], plans[0]]).splitlines()
    assert lines[4].startswith("  none fits; ") and "--search" not in lines[4] and "a larger slice" in lines[4]


@needs_libtpu
@pytest.mark.slow
def test_a_small_stage_compiled_for_a_slice(small, capsys, monkeypatch):
    """As on the command line, with the environment of this process untouched."""
    before = dict(os.environ)
    assert cli.main(["plan", small, "--topology", "v5e:2x2", "--json", "--quick", *BATCH]) == 0
    assert dict(os.environ) == before
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"] and facts["devices"] == 4 and facts["topology"] == "v5e:2x2"
    (cell,) = read_cells(small, BATCH, topology="v5e:2x2")
    layout, _ = layout_of(cell)
    assert facts["mesh"]["fsdp"] == layout.mesh.fsdp == 4
    # Weights and two moments in f32, in four parts, and the batch.
    held = 12 * facts["parameters"] / 4
    assert held < facts["hbm"]["arguments"] < 1.5 * held + (8 << 20)
    # Gradients are summed along fsdp, and weights gathered in bf16 forward and backward.
    assert facts["collective_bytes"]["fsdp"] > 2 * 2 * facts["parameters"] * 3 / 4 / 2
    assert facts["bounds"]["ici"] == sum(facts["collective_bytes"].values()) / 200e9


@needs_libtpu
@pytest.mark.slow
def test_an_oversized_stage_does_not_fit(small, capsys):
    """67 million tokens, with pictures, on one chip."""
    batch = ["--batch.rows", "65536", "--batch.groups", "1", "--batch.length", "1024"]
    assert cli.main(["plan", small, "--topology", "v5e:1x1", *batch]) == 1
    out = capsys.readouterr().out
    assert "NO, by " in out and "of which a step may take 90%" in out


@needs_libtpu
@pytest.mark.slow
def test_a_search_ranks_what_fits(small, capsys):
    assert cli.main(["plan", small, "--topology", "v5e:2x2", "--search", "2", "--quick", "--json", *BATCH]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["fits"] and first["mesh"] != second["mesh"]


@needs_libtpu
@pytest.mark.slow
def test_two_slices_exchange_gradients_alone(small, capsys):
    """Half of the weights' gradients, which each slice has summed among its devices, cross for each device of four."""
    assert cli.main(["plan", small, "--topology", "v5e:2x2", "--slices", "2", "--json", "--quick", *BATCH8]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["devices"] == 8 and facts["mesh"]["data"] == 2 and facts["mesh"]["fsdp"] == 4
    crossed = facts["bounds"]["dcn"] * 6.4e12 / 8 / 256
    share = 4 * facts["parameters"] / 4  # a quarter of the gradients, in f32
    assert 0.4 * share < crossed < 2.5 * share
