"""Plans of answers: what is compiled is what `generate` runs, what follows from it, and mistakes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax import cli
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.flops import step_flops
from qwenvl_jax.generate import LENGTH_STEP, Sampling, read_prompts, read_token
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.parallel.mesh import make_mesh
from qwenvl_jax.parallel.placement import Execution
from qwenvl_jax.parallel.rules import make_rules, param_shardings
from qwenvl_jax.plan import serving as plans
from qwenvl_jax.plan import show_serving
from qwenvl_jax.plan.compiling import Compiled, ServeRequest
from qwenvl_jax.plan.programs import traced_answer
from qwenvl_jax.plan.serving import (
    Answering,
    contexts_of,
    make_answering,
    make_serving,
    prompt_bounds,
    read_serving,
    token_bounds,
)
from qwenvl_jax.plan.topology import Topology
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train import program
from qwenvl_jax.train.config import MeshConfig
from tests.parallel.meshed import even_config
from tests.parallel.test_compiled import needs_libtpu
from tests.plan.test_plan import SMALL

GIB = 2**30


def compiled(**changes) -> Compiled:
    facts = {
        "parameters": 9 * 10**9,
        "learning": 0,
        "state": {"decoder": 4 * GIB, "experts": 0, "tower": GIB, "table": 0, "cache": 2 * GIB, "batch": 1 << 20},
        "arguments": 5 * GIB,
        "temporaries": GIB,
        "outputs": 2 * GIB,
        "aliased": 0,
        "host": 0,
        "needed": None,
        "flops": 10**15,
        "again": 0,
        "sent": {"tensor all-reduce": 10 * GIB},
        "across": 0,
        "unknown_loops": 0,
        "seconds": 3.0,
    }
    return Compiled(**facts | changes)


def answering(name: str = "qwen3_vl_8b", topology: str = "v5e:2x4", prompt=None, token=None) -> Answering:
    held = {"decoder": 4 * GIB, "experts": 0, "tower": GIB, "table": 0, "cache": 2 * GIB, "batch": 0}
    token = token or compiled(state=held, arguments=6 * GIB, aliased=2 * GIB, temporaries=0, flops=10**10, sent={})
    serving = make_serving(name, PRESETS[name], Topology.named(topology))
    return Answering(serving, 8192, 30, prompt or compiled(), token)


@pytest.mark.parametrize("generation", ["qwen3_vl", "qwen3_vl_moe"])
def test_what_is_planned_is_what_generate_runs(generation):
    """The jaxprs, and where the cache lies."""
    config = even_config(generation)
    sizes = {"data": 2, "expert": 2 if config.text.moe else 1, "tensor": 2}
    mesh_config = MeshConfig(**{"fsdp": 1, **sizes}, rules="replicated")
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    rows = sizes["data"] * sizes["expert"]
    asked = {"model": config, "mesh": mesh_config, "topology": "cpu", "rows": rows, "groups": rows, "context": 256}
    requests = [ServeRequest(**asked, frames=2, patches=16, phase=phase, flops=0) for phase in ("prompt", "token")]
    mesh, rules = make_mesh(devices, **sizes), make_rules("replicated")
    model = QwenVL(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model.execution = Execution(mesh, rules)
    graph, weights = nnx.split(model)
    weights = jax.device_put(weights, param_shardings(weights, mesh, rules))
    shape = BatchShape(rows, 256 - LENGTH_STEP, rows, ((2, 16),))
    shapes = program.abstract_batch(config, shape, model.execution, classes=False)
    batch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)
    planned, facts = traced_answer(requests[0], devices)
    arguments = graph, weights, batch, np.uint32(0), 256, Sampling()
    assert str(planned.jaxpr) == str(read_prompts.trace(*arguments).jaxpr)
    tokens, cache = read_prompts(*arguments)
    held = sum(kept.addressable_shards[0].data.nbytes for kept in (cache.keys, cache.values))
    assert facts["state"]["cache"] == held
    planned, facts = traced_answer(requests[1], devices)
    run = read_token.trace(graph, weights, tokens, cache, np.uint32(0), np.int32(1), Sampling())
    assert str(planned.jaxpr) == str(run.jaxpr)
    assert planned.lower().as_text() == run.lower().as_text()
    assert facts["state"]["cache"] == held and facts["state"]["batch"] == 0
    # Tower and mergers are read for no token, nor is a table that is not the output projection too.
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(weights)[0]]

    def held_by(picked):
        return sum(leaf.addressable_shards[0].data.nbytes for name, leaf in leaves if picked(name))

    assert facts["state"]["tower"] == held_by(lambda name: "text" not in name)
    apart = not config.text.tie_word_embeddings
    assert facts["state"]["table"] == held_by(lambda name: apart and "text" in name and "embed" in name)
    assert (facts["state"]["experts"] > 0) == (config.text.moe is not None)


@pytest.mark.parametrize(
    ("name", "topology", "mesh"),
    [
        ("qwen3_vl_8b", "v5e:2x4", {"tensor": 8}),
        ("qwen3_vl_2b", "v5e:4x4", {"data": 2, "tensor": 8}),
        ("qwen3_vl_30b_a3b", "v5e:4x4", {"expert": 4, "tensor": 4}),
        ("qwen3_vl_235b_a22b", "v5p:4x4x4", {"data": 2, "expert": 8, "tensor": 4}),
        # 470 GB in 32 parts are more than a device has.
        ("qwen3_vl_235b_a22b", "v5e:16x16", {"data": 4, "expert": 16, "tensor": 4}),
        ("qwen2_vl_2b", "v5e:2x2", {"data": 2, "tensor": 2}),
    ],
)
def test_the_mesh_is_chosen_by_heads_and_experts(name, topology, mesh):
    serving = make_serving(name, PRESETS[name], Topology.named(topology))
    chosen = {axis: getattr(serving.mesh, axis) for axis in ("data", "fsdp", "expert", "context", "tensor")}
    assert {axis: size for axis, size in chosen.items() if size > 1} == mesh
    assert serving.rows == serving.shares == mesh.get("data", 1) * mesh.get("expert", 1)


def test_bounds():
    """Of a token: the decoder's weights and the cache, once; of experts those of one token."""
    found = answering()
    reading, telling = prompt_bounds(found), token_bounds(found)
    assert reading["compute"] == 10**15 / (8 * 197e12) and reading["ici"] == 10 * GIB / 200e9
    assert reading["hbm"] == (5 + 2 + 2 * 1) * GIB / 819e9
    assert telling["hbm"] == 6 * GIB / 819e9 and telling["ici"] == 0
    state = {"decoder": GIB, "experts": 8 * GIB, "tower": GIB, "table": 0, "cache": GIB, "batch": 0}
    experts = answering("qwen3_vl_30b_a3b", token=compiled(state=state))
    assert token_bounds(experts)["hbm"] == (2 * GIB + 8 * GIB * 8 // 128) / 819e9
    # What devices hold parts of is read whole by each.
    mesh = MeshConfig(fsdp=8, rules="fsdp_tensor")
    split = dataclasses.replace(experts, serving=dataclasses.replace(experts.serving, mesh=mesh))
    assert token_bounds(split)["hbm"] == (8 * GIB + GIB + 8 * 8 * GIB * 8 // 128) / 819e9


def test_facts_and_table():
    found = answering()
    facts = show_serving.facts(found.serving, [found])
    assert facts["rows"] == 1 and facts["mesh"]["tensor"] == 8 and facts["parameters"] == 9 * 10**9
    one = facts["contexts"]["8192"]
    assert one["fits"] and one["hbm"]["weights"] == 5 * GIB and one["hbm"]["cache"] == 2 * GIB
    assert one["hbm"]["total"] == {"prompt": 8 * GIB, "token": 7 * GIB}
    assert one["video"]["tokens"] == 30 * 256 and one["video"]["patches"] == 30 * 1024
    assert one["video"]["flops"] == step_flops(PRESETS["qwen3_vl_8b"], found.video, ()).total
    assert one["next_token"]["seconds"] == one["next_token"]["bounds"]["hbm"]
    assert one["next_token"]["bytes"] == 4 * GIB + 2 * GIB  # the decoder's weights and the cache
    assert one["first_token"]["bytes"] == 5 * GIB + 2 * GIB + 2 * GIB  # what is given, comes out, and is made between
    json.dumps(facts)
    text = "\n".join(show_serving._lines(found))
    for words in (
        "8,192 tokens of context, 7,680 of a video of 60 frames",
        "fits         yes",
        "from the frames of the video to tokens, at least 0.0201 s (compute 0.0201 s, HBM ",
        "between tokens 1.000e+10 FLOPs of all rows together, at least 6.00 GiB read and written by a device",
    ):
        assert words in text, text


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (compiled(arguments=16 * GIB, state=compiled().state | {"decoder": 15 * GIB}), "the weights alone"),
        (compiled(arguments=16 * GIB, state=compiled().state | {"cache": 10 * GIB}), "weights and cache alone"),
        (compiled(temporaries=8 * GIB), "a smaller --context"),
        (compiled(arguments=None, temporaries=None, needed=40 * GIB), "a smaller --context"),
    ],
)
def test_what_does_not_fit_says_by_how_much_and_what_to_change(token, words):
    found = answering(token=token)
    assert not found.fits and not found.facts()["fits"]
    text = "\n".join(show_serving._lines(found))
    assert "NO, by" in text and words in text, text


@pytest.mark.parametrize(
    ("name", "topology", "state", "words"),
    [
        # Rows are one a share and heads of keys are all apart: neither fewer rows nor a larger slice would help.
        ("qwen3_vl_32b", "v5e:2x4", {"cache": 8 * GIB, "decoder": 9 * GIB},
         "a smaller --context or on a slice of 16 devices --mesh.fsdp 2 --mesh.tensor 8 --mesh.rules fsdp_tensor: we"),
        ("qwen3_vl_32b", "v5e:2x4", {"cache": 16 * GIB}, "many: a smaller --context: weights and cache alone"),
        ("qwen3_vl_32b", "v5e:2x2", {"cache": 16 * GIB}, "a smaller --context or a larger slice: weights and cache"),
        ("qwen3_vl_32b", "v5e:4x4", {"decoder": 16 * GIB},
         "many: --mesh.fsdp 2 --mesh.tensor 8 --mesh.rules fsdp_tensor: the weights alone"),
        ("qwen3_vl_30b_a3b", "v5e:4x4", {"experts": 16 * GIB},
         "many: on a slice of 32 devices --mesh.fsdp 2 --mesh.expert 4 --mesh.tensor 4 --mesh.rules fsdp_tensor: the"),
    ],
)  # fmt: skip
def test_what_is_advised_would_help(name, topology, state, words):
    held = compiled().state | {"cache": 2 * GIB} | state
    found = answering(name, topology, token=compiled(arguments=30 * GIB, state=held))
    text = "\n".join(show_serving._lines(found))
    assert words in text, text


def test_a_mesh_by_hand_is_advised_to_split_heads():
    """A larger slice would have more copies of what does not fit."""
    serving = read_serving("qwen3_vl_32b", ["--mesh.tensor", "2"], topology="v5e:2x4")
    held = compiled().state | {"decoder": 33 * GIB}
    found = dataclasses.replace(answering(token=compiled(arguments=40 * GIB, state=held)), serving=serving)
    assert show_serving.advice(found).startswith("--mesh.tensor 4 or ")


def test_settings_of_rules_are_told(capsys):
    serving = read_serving("qwen3_vl_8b", ["--mesh.tensor", "4", "--mesh.override", "kv_heads="], topology="v5e:2x4")
    found = dataclasses.replace(answering(), serving=serving)
    assert show_serving.facts(serving, [found])["mesh"]["override"] == ["kv_heads="]
    assert "rules replicated, override kv_heads=" in "\n".join(show_serving._head(serving))


def test_of_a_prompt_one_token_has_logits(monkeypatch):
    """The work of a prompt: its tokens, its video, and logits of the last token alone."""
    requests = []

    def asked(request, quick):
        requests.append(request)
        return compiled()

    monkeypatch.setattr(plans, "compile_step", asked)
    model = PRESETS["qwen3_vl_8b"]
    serving = make_serving("qwen3_vl_8b", model, Topology.named("v5e:4x4"), rows=4)
    found = make_answering(serving, 8192)
    prompt, token = requests
    assert (prompt.phase, token.phase, prompt.rows, prompt.groups) == ("prompt", "token", 4, 2)
    assert found.frames == (8192 - 128 - 256) // 256 == 30
    assert prompt.frames == 2 * 30 + 4 and prompt.patches == 1024  # a multiple of tensor = 8
    text, length = model.text, 8064
    head = 2 * text.hidden_size * text.vocab_size
    per_layer = 2 * text.hidden_size * (2 * 32 * 128 + 2 * 8 * 128) + 6 * text.hidden_size * text.intermediate_size
    pairs = 4 * 32 * 128 * length * (length + 1) // 2
    decoder = 4 * (length * 36 * per_layer + 36 * pairs + head)
    assert prompt.flops == decoder + step_flops(model, found.video, ()).total
    assert token.flops == 4 * (36 * per_layer + 36 * 4 * 32 * 128 * 8192 + head)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["qwen3_vl_5b", "--topology", "v5e:2x4"], ["qwen3_vl_5b"]),
        (["qwen3_vl_8b", "--topology", "v5e:3x4"], ["'v5e:3x4'", "2x4"]),
        (
            ["qwen3_vl_8b", "--topology", "v5e:2x4", "--mesh.tensor", "3"],
            ["mesh.tensor=3 does not divide the 8 devices", "these do: 1, 2, 4, 8."],
        ),
        (["qwen3_vl_8b", "--topology", "v5e:2x4", "--mesh.data", "2"], ["has 2 devices, but v5e:2x4 has 8"]),
        (["qwen3_vl_8b", "--topology", "v5e:2x4", "--mesh.tensor", "0"], ["mesh.tensor=0 must be at least 1"]),
        (["qwen3_vl_8b", "--topology", "v5e:2x4", "--steps", "3"], ["--steps", "--mesh.tensor"]),
        (
            ["qwen3_vl_8b", "--topology", "v5e:2x4", "--rows", "3", "--mesh.data", "2", "--mesh.tensor", "4"],
            ["multiple of 2"],
        ),
        (["qwen3_vl_8b", "--topology", "v5e:2x4", "--context", "1000"], ["1000", "multiple of 128"]),
        (["qwen3_vl_8b", "--topology", "v5e:2x4", "--context", "1048576"], ["1048576", "262144"]),
        (["qwen3_vl_8b", "--topology", "v5e:2x4", "--search", "3"], ["--search"]),
        (
            ["qwen3_vl_8b", "--topology", "v5e:16x16", "--mesh.context", "256", "--context", "8192"],
            ["8064 of them are the prompt's", "the 256 devices of mesh.context", "could: 1, 2, 4, 8, 16, 32, 64, 128."],
        ),
        (["qwen3_vl_8b", "--topology", "v5e:2x4", "--context", "8192", "1000"], ["1000", "multiple of 128"]),
        (["qwen3_vl_8b", "--topology", "v5e:2x4", "--rows", "-8"], ["--rows -8", "at least 1"]),
        (["qwen3_vl_8b", "--topology", "v5e:2x4", "--model", "qwen3_vl_2b"], ["qwen3_vl_8b", "qwen3_vl_2b", "two"]),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(show_serving, "check_libtpu", lambda: None)
    assert cli.main(["plan", "--serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_settings_of_answers_belong_to_serve(capsys):
    assert cli.main(["plan", "configs/pretrain/s1.py", "--topology", "v5e:2x4", "--context", "8192"]) == 2
    assert "--serve" in capsys.readouterr().err


def test_a_config_or_its_replacement_names_the_model():
    topology = "v5e:2x4"
    assert read_serving("configs/pretrain/s1.py", [], topology=topology, model="qwen3_vl_4b").name == "qwen3_vl_4b"
    given = read_serving("qwen3_vl_4b", ["--mesh.data", "2", "--mesh.tensor", "4"], topology=topology)
    assert (given.mesh.data, given.mesh.fsdp, given.mesh.tensor, given.rows) == (2, 1, 4, 2)
    assert given.mesh.rules == "replicated"
    with pytest.raises(ConfigError, match="a multiple of 128 from 640"):
        make_answering(given, 100)


def test_a_mesh_by_hand_has_shares_for_the_devices_that_are_left():
    def sizes(*overrides):
        mesh = read_serving("qwen3_vl_4b", overrides, topology="v5e:4x4").mesh
        return mesh.data, mesh.fsdp, mesh.tensor, mesh.rules

    assert sizes("--mesh.tensor", "4") == (4, 1, 4, "replicated")
    assert sizes("--mesh.fsdp", "8", "--mesh.rules", "fsdp_tensor") == (2, 8, 1, "fsdp_tensor")
    with pytest.raises(ConfigError, match="has 4 devices, but v5e:4x4 has 16"):
        sizes("--mesh.data", "1", "--mesh.tensor", "4")


def test_contexts():
    """Those that a model reads, or the longest; what is left out of the usual ones is said."""
    assert contexts_of(PRESETS["qwen3_vl_8b"]) == (8192, 32_768, 262_144)
    assert contexts_of(PRESETS["qwen2_vl_2b"]) == (8192, 32_768)
    text = dataclasses.replace(PRESETS["qwen3_vl_2b"].text, max_position_embeddings=1100)
    assert contexts_of(dataclasses.replace(PRESETS["qwen3_vl_2b"], text=text)) == (1024,)


def test_usual_contexts_that_are_left_out_are_said(capsys, monkeypatch):
    monkeypatch.setattr(show_serving, "check_libtpu", lambda: None)
    monkeypatch.setattr(show_serving, "make_answering", lambda serving, context, quick: answering())
    assert cli.main(["plan", "qwen2_vl_2b", "--serve", "--topology", "v5e:2x2"]) == 0
    assert "left out: 262,144 tokens, more than the 32,768 that qwen2_vl_2b reads" in capsys.readouterr().err


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh", "heads"),
    [
        ("v6e:2x2", {}, 2),
        ("v5e:2x2", {"data": 2, "tensor": 2}, 4),
        ("v5e:2x4", {}, 1),
    ],
)
def test_answers_compiled_for_a_slice(tmp_path, capsys, topology, mesh, heads):
    """With as many heads of keys on a device, for each of which a compiler may lay out the cache in its own way.

    The cache is larger than the memory beside the cores, where a copy would not be seen in figures of HBM.
    """
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    sizes = [part for axis, size in mesh.items() for part in (f"--mesh.{axis}", str(size))]
    asked = ["--serve", "--topology", topology, *sizes, "--context", "65536", "--json", "--quick"]
    assert cli.main(["plan", str(path), *asked]) == 0
    facts = json.loads(capsys.readouterr().out)
    one, text = facts["contexts"]["65536"], PRESETS["qwen3_vl_2b"].text
    assert facts["mesh"]["tensor"] == text.num_key_value_heads // heads and facts["rows"] == mesh.get("data", 1)
    assert one["hbm"]["cache"] == 2 * 2 * 65_536 * heads * text.head_dim * 2
    assert 0 < one["hbm"]["weights"] < one["hbm"]["total"]["token"] <= one["hbm"]["total"]["prompt"] < 4 * GIB
    # A token is written into the cache where it lies: there is no second one, not even of one layer.
    assert one["hbm"]["temporaries"]["token"] < one["hbm"]["cache"] // 4
    # A token's products are summed along `tensor` in each layer.
    assert one["next_token"]["collective_bytes"]["tensor"] > 0
