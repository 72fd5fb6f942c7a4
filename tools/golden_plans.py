"""Writes what small stages take on small slices, as the compiler has it, into tests/golden/plan.

    .venv/bin/python -m tools.golden_plans [NAME ...]

`tests/plan/test_golden.py` compares; after a change that is meant, this writes the new figures. It needs libtpu.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from qwenvl_jax.config import MoeConfig, QwenVLConfig
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.plan.assumed import assume
from qwenvl_jax.plan.compiling import Request, compile_step
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train import recipes
from qwenvl_jax.train.config import DataConfig, MeshConfig

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "plan"
# Name to slice, mesh, and whether the decoder has experts.
CELLS: dict[str, tuple[str, MeshConfig, bool]] = {
    "dense-fsdp": ("v5e:2x2", MeshConfig(fsdp=4), False),
    "dense-context-tensor": ("v5p:2x2x2", MeshConfig(fsdp=2, context=2, tensor=2, rules="zero"), False),
    "experts": ("v5e:2x2", MeshConfig(fsdp=2, expert=2, rules="zero"), True),
}


def small_model(experts: bool = False) -> QwenVLConfig:
    """The 2B with two narrow layers, and eight experts if asked for."""
    model = PRESETS["qwen3_vl_2b"]
    text = dataclasses.replace(
        model.text,
        num_hidden_layers=2,
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        moe=MoeConfig(8, 2, 256) if experts else None,
        tie_word_embeddings=not experts,
    )
    vision = dataclasses.replace(
        model.vision,
        depth=2,
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        out_hidden_size=256,
        deepstack_visual_indexes=(0,),
    )
    return dataclasses.replace(
        model, text=text, vision=vision, model_type="qwen3_vl_moe" if experts else model.model_type
    )


def measured(name: str, *, quick: bool = True) -> dict[str, Any]:
    """What the compiler says of a cell: bytes of a device; `quick` as of `qwenvl_jax.plan.compiling.compile_step`."""
    topology, mesh, experts = CELLS[name]
    model = small_model(experts)
    batch = BatchShape(rows=4, length=1024, groups=4, vision=((4, 512),))
    stage = dataclasses.replace(recipes.s1(), batch=batch)
    assumed = assume(stage, model, multiple=mesh.context * mesh.tensor)
    stage = dataclasses.replace(stage, data=DataConfig())
    config = dataclasses.replace(recipes.pretraining(stage), model=model, mesh=mesh)
    found = compile_step(Request(config, assumed, topology), quick=quick)
    return {
        "topology": topology,
        "mesh": dataclasses.asdict(mesh),
        "arguments": found.arguments,
        "temporaries": found.temporaries,
        "flops": found.flops,
        "sent": found.sent,
    }


def main(names: list[str]) -> None:
    """Writes the cells of these names, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or CELLS:
        text = json.dumps(measured(name), indent=2)
        (FOLDER / f"{name}.json").write_text(text + "\n")
        print(FOLDER / f"{name}.json", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
