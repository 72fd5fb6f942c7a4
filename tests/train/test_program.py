"""The program of a stage: the same from arrays, as a run has them, and from shapes alone, as a plan has them."""

import dataclasses

import jax
import pytest

from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.flops import Work
from qwenvl_jax.plan.assumed import Assumed
from qwenvl_jax.plan.compiling import Request
from qwenvl_jax.plan.programs import traced_step
from qwenvl_jax.train import program
from qwenvl_jax.train.config import AdapterConfig, MeshConfig
from qwenvl_jax.train.loop import train
from tests.train.tiny_run import tiny_config, write_tiny_run

pytestmark = pytest.mark.usefixtures("promotion_as_usual")


@pytest.mark.parametrize(
    ("changes", "mesh", "adapter"),
    [
        (
            {"microbatches": 2, "remat": "full", "batch": BatchShape(rows=4, length=160, groups=4, vision=((8, 24),))},
            MeshConfig(fsdp=2),
            AdapterConfig(),
        ),
        pytest.param({}, MeshConfig(fsdp=1), AdapterConfig(rank=2), marks=pytest.mark.slow),
    ],
)
def test_a_run_jits_what_a_plan_lowers(tmp_path, clip, monkeypatch, changes, mesh, adapter):
    """Each as its own code traces it: the jaxpr, what is donated and where results lie."""
    write_tiny_run(tmp_path, clip)
    config = tiny_config(tmp_path)
    stage = dataclasses.replace(config.stages[1], steps=1, **changes)
    config = dataclasses.replace(config, stages=(stage,), mesh=mesh, adapter=adapter)
    traced, classes = [], []

    def recorded(*arguments, **options):
        traced.append(trace_step(*arguments, **options))
        classes.append(options["classes"])
        return traced[-1]

    trace_step = program.trace_step
    monkeypatch.setattr(program, "trace_step", recorded)
    train(config, tmp_path / "out")
    assert len(traced) == 1
    request = Request(config, Assumed(stage.batch, Work(), classes[0], ()), "cpu")
    planned, _ = traced_step(request, jax.devices())
    assert len(traced) == 2 and planned is traced[1]
    assert str(planned.jaxpr) == str(traced[0].jaxpr)
    assert planned.lower().as_text() == traced[0].lower().as_text()
