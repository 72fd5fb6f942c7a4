"""The ingredients, each written once, and a result."""

import pytest

from qwenvl_jax.assemble.build import assemble
from tests.assemble.ingredients import SIGLIP_KINDS, write_qwen3, write_siglip


@pytest.fixture(scope="session")
def ingredients(tmp_path_factory):
    """Folder and model of each ingredient by its kind; not to be changed."""
    root = tmp_path_factory.mktemp("ingredients")
    found = {kind: (root / kind, write_siglip(root / kind, kind)) for kind in SIGLIP_KINDS}
    for kind, settings in {"untied": {}, "tied": {"tied": True}, "moe": {"moe": True}}.items():
        found[kind] = (root / kind, write_qwen3(root / kind, **settings))
    return found


@pytest.fixture(scope="session")
def assembled(ingredients, tmp_path_factory):
    """(folder, summary) of the whole SigLIP of fixed resolution and the untied Qwen3 in float32; not to be changed."""
    out = tmp_path_factory.mktemp("assembled") / "model"
    summary = assemble(ingredients["siglip"][0], ingredients["untied"][0], out, dtype="float32", side=7)
    return out, summary
