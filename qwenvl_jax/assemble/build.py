"""The beginning of S0: an untrained Qwen3-VL out of a SigLIP 2 tower, a Qwen3 decoder, and fresh mergers.

Tensors stream from the sources to the result, and the folder appears when it is complete. Memory is twice that of one
file of the result (the tensors, and the bytes they are written as) and that of the mergers. Everything that can be
wrong with the sources is found in their headers, before anything is written.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.assemble import decoder, texts, tower
from qwenvl_jax.assemble.ingredient import Dropped, Ingredient, Piece, number
from qwenvl_jax.assemble.tower import Tower
from qwenvl_jax.checkpoint import hf, hf_config, tensors
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.models.merger import Merger

DTYPES = ("bfloat16", "float32")
SIDE = 48
MAX_SHARD_BYTES = 2 * 10**9


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came from where.

    Attributes:
      folder: of the result.
      config: its shape.
      dtype: of its weights.
      seed: of its mergers.
      vision, text: the sources.
      tower: what was read of the former.
      weights: parameters by part: "tower", "mergers", "decoder".
      dropped: tensors of each source without a place in the result.
    """

    folder: Path
    config: QwenVLConfig
    dtype: str
    seed: int
    vision: Ingredient
    text: Ingredient
    tower: Tower
    weights: dict[str, int]
    dropped: tuple[tuple[Ingredient, tuple[Dropped, ...]], ...]

    def __str__(self) -> str:
        """A table, with the next command."""
        v, t, side = self.config.vision, self.config.text, math.isqrt(self.config.vision.num_position_embeddings)
        resized = self.tower.side != side
        feed = f"ffn {t.intermediate_size}"
        if t.moe is not None:
            feed = f"{t.moe.num_experts} experts of {t.moe.moe_intermediate_size}, {t.moe.num_experts_per_tok} a token"
        taps, share = ", ".join(map(str, v.deepstack_visual_indexes)), 1 / tower.TEMPORAL
        notes = {
            "tower": (
                self.vision.name,
                f"depth {v.depth}, width {v.hidden_size}, heads {v.num_heads}, patch {v.patch_size}",
                f"patch kernel: over {tower.TEMPORAL} frames, {share:g} of it to each",
                f"position table: {self.tower.side}x{self.tower.side}"
                + (f" resized to {side}x{side}, bilinear, corners aligned" if resized else ", as it is"),
                "q, k, v: joined",
            ),
            "mergers": (
                f"fresh, seed {self.seed}",
                f"main, and DeepStack after blocks {taps}" if taps else "main",
                f"{v.spatial_merge_size**2} x {v.hidden_size} to {v.out_hidden_size}",
            ),
            "decoder": (
                self.text.name,
                f"layers {t.num_hidden_layers}, width {t.hidden_size}, {feed}, "
                f"{'tied' if t.tie_word_embeddings else 'untied'}",
                f"rope: theta {t.rope.theta:g}, sections {list(t.rope.mrope_section)}, interleaved; "
                f"positions up to {t.max_position_embeddings}",
            ),
        }
        lines = [f"{self.folder}: {sum(self.weights.values()):,} parameters in {self.dtype}", ""]
        lines.append(f"{'part':8} {'parameters':>15}  from")
        for part, (first, *rest) in notes.items():
            lines.append(f"{part:8} {self.weights[part]:>15,}  {first}")
            lines += [f"{'':26}{line}" for line in rest]
        for source, groups in self.dropped:
            for group in groups:
                name = f"{group.name} of {source.name}"
                some = "1 tensor" if group.tensors == 1 else f"{group.tensors} tensors"
                lines.append(f"{'dropped':8} {group.weights:>15,}  {name}, {some}")
        lines += ["", f"next: qwenvl-jax train CONFIG --model {shlex.quote(str(self.folder))} --trainable mergers"]
        return "\n".join(lines)


def assemble(
    vision: str | Path,
    text: str | Path,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    deepstack: tuple[int, ...] | None = None,
    side: int = SIDE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Summary:
    """Writes an untrained Qwen3-VL (or Qwen3-VL-MoE) in the public layout.

    Args:
      vision: folder or hub id of a SigLIP 2, a whole model or an image tower alone, of fixed resolution or NaFlex.
      text: folder or hub id of a Qwen3 or Qwen3-MoE with its tokenizer.
      out: folder to make; one that is there must be empty.
      dtype: of the weights written, "bfloat16" or "float32".
      seed: of the mergers, which begin as `qwenvl_jax.models.merger.Merger` does.
      deepstack: tower blocks, from 0, that go to DeepStack mergers; by default as `tower.deepstack_indexes` says.
      side: of the square position table of the result.
      max_shard_bytes: above this the weights go to several files with an index.

    Raises:
      CheckpointError: a source is incomplete, damaged or of another kind, its tensors do not fit its config.json, its
        tokenizer lacks the marks of vision, or the folder cannot be written.
      ConfigError: a dtype, seed or DeepStack blocks that do not exist, or shapes that do not go together.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed must be from 0 to {2**32 - 1}, got {seed}.")
    out = Path(out).expanduser()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise CheckpointError(f"{out} is there and is not an empty folder; name a new one.")
    eyes, words = Ingredient(vision), Ingredient(text)
    shape = tower.read_tower(eyes)
    model_type = decoder.result_type(words)
    vocabulary = number(words.config, "vocab_size", 151936, words.where)
    marks = texts.read_marks(words.folder, vocabulary)
    width = number(words.config, "hidden_size", 4096, words.where)
    text_config = decoder.text_config(words)
    values = {
        "model_type": model_type,
        "tie_word_embeddings": text_config.pop("tie_word_embeddings", False),
        **marks.vision,
        "text_config": text_config,
        "vision_config": {
            **tower.vision_config(shape, side=side, out=width, deepstack=deepstack),
            "model_type": f"{model_type}_vision",
        },
    }
    config = hf_config.config_from_json(values, f"{eyes.where} and {words.where}")
    tower_pieces, tower_dropped = tower.tower_pieces(eyes, shape, side)
    decoder_pieces, decoder_dropped = decoder.decoder_pieces(words, config)
    pieces = {"tower": tower_pieces, "mergers": merger_pieces(config, seed), "decoder": decoder_pieces}
    files = texts.json_files(words.folder, marks, shape.patch)
    files["config.json"] = hf_config.config_to_json(config, dtype)
    with _new_folder(out) as making:
        texts.write_texts(words.folder, making)
        _write(making, [piece for part in pieces.values() for piece in part], files, dtype, max_shard_bytes)
    return Summary(
        folder=out,
        config=config,
        dtype=dtype,
        seed=seed,
        vision=eyes,
        text=words,
        tower=shape,
        weights={part: sum(math.prod(piece.shape) for piece in found) for part, found in pieces.items()},
        dropped=((eyes, tuple(tower_dropped)), (words, tuple(decoder_dropped))),
    )


def merger_pieces(config: QwenVLConfig, seed: int) -> list[Piece]:
    """Fresh mergers: weights normal with deviation 1 / sqrt(fan-in), biases 0, norms 1, as `Merger` begins."""
    make = {"rngs": nnx.Rngs(seed), "dtype": jnp.float32}
    mergers = {"merger.": Merger(config.vision, norm_after_join=False, **make)}
    if taps := len(config.vision.deepstack_visual_indexes):
        mergers["deepstack."] = Merger(config.vision, norm_after_join=True, stack=taps, **make)
    values = {
        prefix + ".".join(map(str, key)): np.asarray(variable.get_value())
        for prefix, merger in mergers.items()
        for key, variable in nnx.to_flat_state(nnx.state(merger, nnx.Param))
    }
    pieces = []
    for entry in hf.tensor_table(config):
        if not entry.path.startswith(tuple(mergers)):
            continue
        for layer, name in enumerate(entry.names()):
            value = values[entry.path] if entry.layers is None else values[entry.path][layer]
            pieces.append(Piece(name, entry.shape, functools.partial(entry.to_public, value)))
    return pieces


def _write(out: Path, pieces: list[Piece], files: dict[str, dict], dtype: str, max_shard_bytes: int) -> None:
    by_name = {piece.name: piece for piece in pieces}
    target = jnp.dtype(dtype)

    def read(name: str) -> np.ndarray:
        return by_name[name].make().astype(target, copy=False)

    specs = {piece.name: (target, piece.shape) for piece in pieces}
    tensors.write(out, specs, read, files, max_shard_bytes)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Gives a folder beside `out` to fill, which takes its place when all went well and is removed otherwise.

    Raises:
      CheckpointError: the place cannot be written.
    """
    making = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        making.chmod(0o755)
        yield making
        os.replace(making, out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error}); nothing was made, choose another place.") from error
    finally:
        if making is not None:
            shutil.rmtree(making, ignore_errors=True)
