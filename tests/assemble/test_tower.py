"""The tower of a result against the SigLIP it came from, run by the reference."""

import types

import numpy as np
import pytest
import torch

from qwenvl_jax.assemble import tower
from qwenvl_jax.assemble.build import assemble
from tests.assemble.ingredients import DEPTH, PATCH, SIDE, SIGLIP_KINDS, WIDTH, load_reference, load_tensors
from tests.parity.reference import transformers


@pytest.fixture(scope="module", params=SIGLIP_KINDS)
def pair(request, ingredients, tmp_path_factory):
    """(the SigLIP's image tower, the tower of the result as the reference loads it), the table's side kept."""
    folder, siglip = ingredients[request.param]
    out = tmp_path_factory.mktemp(request.param) / "model"
    assemble(folder, ingredients["tied"][0], out, dtype="float32", side=SIDE)
    return siglip, load_reference(out).model.visual


def _embedded(siglip, picture):
    """The SigLIP's patch embeddings of [3, h, w], row after row, without positions."""
    embed = siglip.embeddings.patch_embedding
    if isinstance(embed, torch.nn.Conv2d):
        return embed(picture[None]).flatten(2)[0].T
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    return embed(convert_image_to_patches(picture, PATCH))


def test_two_equal_frames_are_the_picture(pair):
    """Through the reference's Conv3d, and shown by both kinds of source."""
    siglip, visual = pair
    rows, columns = 3, 4
    picture = torch.randn(3, rows * PATCH, columns * PATCH, generator=torch.Generator().manual_seed(0))
    frames = torch.stack([picture, picture])  # [2, 3, h, w]
    patches = frames.reshape(2, 3, rows, PATCH, columns, PATCH).permute(2, 4, 1, 0, 3, 5).reshape(rows * columns, -1)
    with torch.no_grad():
        expected, got = _embedded(siglip, picture), visual.patch_embed(patches)
    assert got.shape == (rows * columns, WIDTH) and expected.abs().max() > 0.5
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_weights_of_the_blocks_are_bit_equal(pair):
    siglip, visual = pair
    ours, theirs = visual.state_dict(), siglip.state_dict()
    seen = {name for name in ours if name.startswith(("merger.", "deepstack_merger_list."))}
    same = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    same |= {"mlp.linear_fc1": "mlp.fc1", "mlp.linear_fc2": "mlp.fc2"}
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            for our, their in same.items():
                name = f"blocks.{i}.{our}.{kind}"
                assert torch.equal(ours[name], theirs[f"encoder.layers.{i}.{their}.{kind}"])
                seen.add(name)
            parts = [theirs[f"encoder.layers.{i}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            name = f"blocks.{i}.attn.qkv.{kind}"
            assert torch.equal(ours[name], torch.cat(parts))
            seen.add(name)
    assert torch.equal(ours["pos_embed.weight"], theirs["embeddings.position_embedding.weight"])
    assert torch.equal(ours["patch_embed.proj.bias"], theirs["embeddings.patch_embedding.bias"])
    assert seen | {"pos_embed.weight", "patch_embed.proj.bias", "patch_embed.proj.weight"} == set(ours)


def test_fused_projection_is_read_in_that_order(pair):
    """The reference splits the fused product into the q, k and v that the SigLIP's three layers give."""
    siglip, visual = pair
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))
    theirs, ours = siglip.encoder.layers[1].self_attn, visual.blocks[1].attn
    with torch.no_grad():
        q, k, v = ours.qkv(x).reshape(6, 3, -1).unbind(1)
        for got, name in ((q, "q_proj"), (k, "k_proj"), (v, "v_proj")):
            torch.testing.assert_close(got, getattr(theirs, name)(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(5, 7), (7, 5), (24, 48), (16, 48), (1, 3), (3, 1), (48, 48)])
def test_resized_positions(before, after):
    table = np.random.default_rng(0).standard_normal((before * before, 6)).astype(np.float32)
    got = tower.resize_positions(table, after)
    # In float64: torch's float32 places of pixels are off by more than 1e-6 in large tables.
    grid = torch.from_numpy(table).double().reshape(before, before, 6).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(grid, size=(after, after), mode="bilinear", align_corners=True)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected[0].flatten(1).T.numpy(), rtol=0, atol=1e-6)
    if after > 1:
        a, b = got.reshape(after, after, 6), table.reshape(before, before, 6)
        assert all(np.array_equal(a[i, j], b[i, j]) for i in (0, -1) for j in (0, -1))
    if before == after:
        assert np.array_equal(got, table)


def test_resized_table_is_stored(assembled, ingredients):
    stored = load_tensors(assembled[0])["model.visual.pos_embed.weight"]
    table = ingredients["siglip"][1].embeddings.position_embedding.weight.detach().numpy()
    assert stored.shape == (49, WIDTH)
    np.testing.assert_array_equal(stored, tower.resize_positions(table, 7))


@pytest.mark.parametrize(
    ("depth", "indexes"),
    [(24, (5, 11, 17)), (27, (8, 16, 24)), (12, (2, 5, 8)), (40, (9, 19, 29)), (4, (0, 1, 2)), (2, (0,)), (1, (0,))],
)
def test_deepstack_indexes(depth, indexes):
    assert tower.deepstack_indexes(depth) == indexes


class _Told:
    """A source of which only config.json and the names of tensors are told."""

    where = "config.json"

    def __init__(self, config, *names):
        self.config, self.files = config, types.SimpleNamespace(headers=dict.fromkeys(names))

    def check_count(self, count, what):
        pass


def test_public_sizes_have_the_public_configs():
    """The towers of SigLIP 2 so400m and large, as their public config.json say them, give the towers of the presets."""
    from qwenvl_jax.presets import preset

    so400m = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    for values, model_type, size, side, name in (
        (so400m, "siglip", {"image_size": 384}, 24, "qwen3_vl_8b"),
        (so400m, "siglip2", {}, 16, "qwen3_vl_8b"),
        (large, "siglip", {"image_size": 512}, 32, "qwen3_vl_2b"),
    ):
        found = tower.read_tower(
            _Told({"model_type": model_type, "vision_config": {**values, **size}}, "vision_model.x")
        )
        assert (found.side, found.prefix) == (side, "vision_model.")
        wanted = preset(name).vision
        config = tower.vision_config(found, side=48, out=wanted.out_hidden_size, deepstack=None)
        config["deepstack_visual_indexes"] = tuple(config["deepstack_visual_indexes"])
        assert type(wanted)(**config) == wanted


def test_defaults_of_what_a_file_leaves_out():
    """They are those of the reference's classes, which write only what differs from them in older releases."""
    for name in ("Siglip", "Siglip2"):
        config = getattr(transformers, f"{name}VisionConfig")()
        found = tower.read_tower(_Told({"model_type": config.model_type}))
        assert (found.depth, found.width, found.heads) == (
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
        )
        assert (found.ffn, found.patch, found.hidden_act) == (
            config.intermediate_size,
            config.patch_size,
            config.hidden_act,
        )
        patches = (config.image_size // config.patch_size) ** 2 if name == "Siglip" else config.num_patches
        assert found.side**2 == patches
