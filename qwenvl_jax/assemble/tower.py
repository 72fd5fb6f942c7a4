"""A SigLIP 2 image tower as the vision tower of a Qwen3-VL.

What becomes of each part:

    patch embedding     its kernel is spread over the two frames of a temporal patch, half to each
    position table      resized to the side that Qwen3-VL has, unless it has it
    q, k, v projections joined in this order
    norms, output projection, feed-forward   as they are
    last norm, pooling head                  dropped: mergers read the last block itself

The result is a start, not the same function: Qwen3-VL turns queries and keys by two-dimensional rotary positions, which
SigLIP does not have, and training has to make the tower used to them. Source: Qwen3-VL technical report, section 2; the
reference's `SiglipVisionModel`, `Siglip2VisionModel` and `Qwen3VLVisionModel`.
"""

import dataclasses
import functools
import math

import numpy as np

from qwenvl_jax.assemble.ingredient import Dropped, Ingredient, Piece, number, only
from qwenvl_jax.checkpoint.hf import PREFIXES
from qwenvl_jax.errors import CheckpointError, ConfigError

# Whether the patch embedding is a convolution (fixed resolution) or a product with flattened patches (NaFlex).
_WHOLE = {"siglip": True, "siglip2": False}
_ALONE = {"siglip_vision_model": True, "siglip2_vision_model": False}
_PREFIX = "vision_model."
# What Qwen3-VL computes and does not ask its config about. The first is meant where the file says nothing.
_ONLY = {"num_channels": (3,), "layer_norm_eps": (1e-6,), "attention_dropout": (0,)}
_ACTIVATIONS = {"hidden_act": ("gelu_pytorch_tanh", "gelu", "silu")}
_PUBLIC_TAPS = {24: (5, 11, 17), 27: (8, 16, 24)}  # by depth
_TAPS = 3
TEMPORAL = 2
VISION = PREFIXES["qwen3_vl"].vision  # that of qwen3_vl_moe too


@dataclasses.dataclass(frozen=True)
class Tower:
    """What a SigLIP folder says of its image tower.

    Attributes:
      model_type: of the folder.
      depth, width, heads, ffn: its blocks.
      patch: side of a patch in pixels.
      side: of its square position table.
      hidden_act: activation of its feed-forward layers.
      is_conv: whether the patch embedding is stored as a convolution's.
      prefix: of its tensors' names, "vision_model." or nothing.
    """

    model_type: str
    depth: int
    width: int
    heads: int
    ffn: int
    patch: int
    side: int
    hidden_act: str
    is_conv: bool
    prefix: str


def read_tower(source: Ingredient) -> Tower:
    """Reads the shape of the tower; what a file leaves out is the default of its class in the reference.

    Raises:
      CheckpointError: another kind of model, or a setting that Qwen3-VL has no place for.
    """
    model_type, values, where = source.config.get("model_type"), source.config, source.where
    if model_type in _WHOLE:
        section = source.config.get("vision_config")
        if not isinstance(section, dict):
            raise CheckpointError(f"{where}: vision_config is missing; fetch the file again.")
        values = section
    elif model_type not in _ALONE:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is no SigLIP 2 tower ({', '.join([*_WHOLE, *_ALONE])}); give --vision "
            "such a folder, as google/siglip2-so400m-patch16-384."
        )
    only(values, {**_ONLY, **_ACTIVATIONS}, where)
    is_conv = {**_WHOLE, **_ALONE}[model_type]
    patch = number(values, "patch_size", 16, where)
    if is_conv:
        side = number(values, "image_size", 224, where) // patch
    else:
        patches = number(values, "num_patches", 256, where)
        side = math.isqrt(patches)
        if side * side != patches:
            raise CheckpointError(f"{where}: num_patches must be a square, but is {patches}; mend the file.")
    if side < 1:
        raise CheckpointError(f"{where}: image_size is smaller than patch_size={patch}; mend the file.")
    tower = Tower(
        model_type=model_type,
        depth=number(values, "num_hidden_layers", 12, where),
        width=number(values, "hidden_size", 768, where),
        heads=number(values, "num_attention_heads", 12, where),
        ffn=number(values, "intermediate_size", 3072, where),
        patch=patch,
        side=side,
        hidden_act=values.get("hidden_act") or _ACTIVATIONS["hidden_act"][0],
        is_conv=is_conv,
        prefix=_PREFIX if any(name.startswith(_PREFIX) for name in source.files.headers) else "",
    )
    source.check_count(tower.depth, "layers")
    return tower


def deepstack_indexes(depth: int) -> tuple[int, ...]:
    """The blocks whose outputs go to DeepStack mergers, from 0: those of the public sizes for depth 24 and 27.

    For another depth three blocks that end its first, second and third quarter, fewer in a tower that has fewer.
    """
    spread = {max(0, depth * (k + 1) // (_TAPS + 1) - 1) for k in range(_TAPS)}
    return _PUBLIC_TAPS.get(depth, tuple(sorted(spread)))


def vision_config(tower: Tower, *, side: int, out: int, deepstack: tuple[int, ...] | None) -> dict:
    """The vision_config of the result, but for its model type.

    Args:
      tower: the source.
      side: of the result's position table.
      out: width of the decoder.
      deepstack: blocks to tap; None takes `deepstack_indexes`.

    Raises:
      ConfigError: blocks that do not exist, or are not increasing.
    """
    taps = deepstack_indexes(tower.depth) if deepstack is None else tuple(deepstack)
    if list(taps) != sorted(set(taps)) or any(not 0 <= i < tower.depth for i in taps):
        raise ConfigError(
            f"deepstack must be increasing blocks from 0 to {tower.depth - 1}, got {','.join(map(str, taps))}; the "
            f"default is {','.join(map(str, deepstack_indexes(tower.depth)))}."
        )
    if side < 1:
        raise ConfigError(f"the position table's side must be at least 1, got {side}; 48 is the public one.")
    return {
        "depth": tower.depth,
        "hidden_size": tower.width,
        "intermediate_size": tower.ffn,
        "num_heads": tower.heads,
        "out_hidden_size": out,
        "deepstack_visual_indexes": list(taps),
        "num_position_embeddings": side * side,
        "patch_size": tower.patch,
        "temporal_patch_size": TEMPORAL,
        "spatial_merge_size": 2,
        "in_channels": 3,
        "hidden_act": tower.hidden_act,
    }


def inflate(kernel: np.ndarray) -> np.ndarray:
    """Spreads a patch kernel over the frames of a temporal patch: [D, 3, P, P] to [D, 3, 2, P, P], in float32.

    Each frame gets an equal share, so that two equal frames (as an image is shown) give what the image gave before.
    Half a number is exact in binary, so this adds no rounding to that of a later cast.
    """
    share = kernel.astype(np.float32) / np.float32(TEMPORAL)
    return np.repeat(share[:, :, None], TEMPORAL, axis=2)


def kernel_of_linear(weight: np.ndarray, patch: int) -> np.ndarray:
    """A NaFlex patch embedding [D, P * P * 3], its inputs ordered (row, column, channel), as a kernel [D, 3, P, P]."""
    return weight.reshape(len(weight), patch, patch, 3).transpose(0, 3, 1, 2)


def resize_positions(table: np.ndarray, side: int) -> np.ndarray:
    """Resizes a square position table, row after row, to another side: f32[side * side, D].

    Bilinear with corners aligned, since Qwen3-VL's tower reads the table in that way at every frame, the table's
    corners at the frame's corners: the vectors at the corners of a picture stay those that SigLIP learnt for them, and
    places between them keep their share of the way. (NaFlex towers read theirs with pixel centres aligned and smoothed,
    which a table that is read by corners cannot give back.) A table of that side is returned as it is.
    """
    before = math.isqrt(len(table))
    table = table.astype(np.float32)
    if before == side:
        return table
    at = np.arange(side) * (before - 1) / max(side - 1, 1)
    low = np.minimum(np.floor(at).astype(int), before - 1)
    high, part = np.minimum(low + 1, before - 1), (at - low).astype(np.float32)[:, None]
    grid = table.reshape(before, before, -1)
    rows = grid[low] * (1 - part[..., None]) + grid[high] * part[..., None]
    both = rows[:, low] * (1 - part) + rows[:, high] * part
    return both.reshape(side * side, -1)


def tower_pieces(source: Ingredient, tower: Tower, side: int) -> tuple[list[Piece], list[Dropped]]:
    """The tensors of the result's tower, and what of the source has no place in it.

    Raises:
      CheckpointError: the source's tensors do not fit its config.json.
    """
    D, F, P = tower.width, tower.ffn, tower.patch
    wanted: dict[str, tuple[int, ...]] = {}

    def take(name: str, *shape: int):
        """A source tensor of that shape, and a way to read it."""
        wanted[tower.prefix + name] = shape
        return functools.partial(source.read, tower.prefix + name)

    def same(ours: str, theirs: str, *shape: int) -> Piece:
        return Piece(VISION + ours, shape, take(theirs, *shape))

    embed = "embeddings.patch_embedding"
    kernel = take(f"{embed}.weight", *((D, 3, P, P) if tower.is_conv else (D, 3 * P * P)))
    table = take("embeddings.position_embedding.weight", tower.side**2, D)

    def patch_kernel() -> np.ndarray:
        return inflate(kernel() if tower.is_conv else kernel_of_linear(kernel(), P))

    pieces = [
        Piece(f"{VISION}patch_embed.proj.weight", (D, 3, TEMPORAL, P, P), patch_kernel),
        same("patch_embed.proj.bias", f"{embed}.bias", D),
        Piece(f"{VISION}pos_embed.weight", (side * side, D), lambda: resize_positions(table(), side)),
    ]
    for i in range(tower.depth):
        ours, theirs = f"blocks.{i}.", f"encoder.layers.{i}."
        for kind, shape in (("weight", (D,)), ("bias", (D,))):
            pieces.append(same(f"{ours}norm1.{kind}", f"{theirs}layer_norm1.{kind}", *shape))
            pieces.append(same(f"{ours}norm2.{kind}", f"{theirs}layer_norm2.{kind}", *shape))
        square: tuple[tuple[str, tuple[int, ...]], ...] = (("weight", (D, D)), ("bias", (D,)))
        for kind, sizes in square:
            parts = [take(f"{theirs}self_attn.{name}_proj.{kind}", *sizes) for name in "qkv"]
            joined = functools.partial(_joined, parts)
            pieces.append(Piece(f"{VISION}{ours}attn.qkv.{kind}", (3 * D, *sizes[1:]), joined))
            pieces.append(same(f"{ours}attn.proj.{kind}", f"{theirs}self_attn.out_proj.{kind}", *sizes))
        for kind, up, down in (("weight", (F, D), (D, F)), ("bias", (F,), (D,))):
            pieces.append(same(f"{ours}mlp.linear_fc1.{kind}", f"{theirs}mlp.fc1.{kind}", *up))
            pieces.append(same(f"{ours}mlp.linear_fc2.{kind}", f"{theirs}mlp.fc2.{kind}", *down))
    return pieces, source.match(wanted, functools.partial(_drop, tower))


def _joined(parts) -> np.ndarray:
    return np.concatenate([part() for part in parts])


def _drop(tower: Tower, name: str) -> str | None:
    """The group with which a tensor of the source is dropped: its head, last norm, and all beside the tower."""
    if tower.prefix and not name.startswith(tower.prefix):
        first = name.partition(".")[0]
        return first if first in ("text_model", "logit_scale", "logit_bias") else None
    inner = name.removeprefix(tower.prefix)
    for group in ("post_layernorm", "head", "embeddings.position_ids"):
        if inner == group or inner.startswith(f"{group}."):
            return tower.prefix + group
    return None
