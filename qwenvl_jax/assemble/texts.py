"""The small files of the result: tokenizer of the language model, chat template and pixel settings of Qwen3-VL."""

import dataclasses
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qwenvl_jax.checkpoint.sections import read_json
from qwenvl_jax.errors import CheckpointError

TOKENIZER = "tokenizer.json"
# Copied where they are there: forms of the same vocabulary that other tools read.
_COPIED = (TOKENIZER, "vocab.json", "merges.txt")
_VISION = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_TURN_START, _TURN_END, _PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Marks:
    """Ids of the marks in the tokenizer.

    Attributes:
      vision: by the name that config.json has for them.
      turn_end: of the token that ends a turn, and with it an answer.
      pad: of the token that pads, and ends a text.
    """

    vision: dict[str, int]
    turn_end: int
    pad: int


def read_marks(folder: Path, vocab_size: int) -> Marks:
    """Finds the marks of vision and of turns in a language model's tokenizer.

    Args:
      folder: of the language model.
      vocab_size: rows of its embedding.

    Raises:
      CheckpointError: no tokenizer.json, one that cannot be read, or one that lacks a mark; or a mark that the
        embedding has no row for.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {TOKENIZER}; copy it from the model, or download the model again.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every failure
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}); copy it again.") from error
    marks = (*_VISION.values(), _TURN_START, _TURN_END, _PAD)
    ids = {token: found for token in marks if (found := tokenizer.token_to_id(token)) is not None}
    missing = [token for token in marks if token not in ids]
    if missing:
        raise CheckpointError(
            f"{path} has no {', '.join(missing)}; give --text a Qwen3 whose vocabulary holds the marks of vision, as "
            "the public ones do."
        )
    highest = max(ids, key=ids.__getitem__)
    if ids[highest] >= vocab_size:
        raise CheckpointError(
            f"{path}: {highest} is {ids[highest]}, but config.json has vocab_size={vocab_size}; take both files from "
            "one model."
        )
    vision = {key: ids[token] for key, token in _VISION.items()}
    return Marks(vision, turn_end=ids[_TURN_END], pad=ids[_PAD])


def write_texts(folder: Path, out: Path) -> None:
    """Copies the tokenizer of `folder` and writes the chat template into `out`.

    Raises:
      OSError: a file cannot be read or written.
    """
    for name in _COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    template = resources.files("qwenvl_jax.assemble").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def json_files(folder: Path, marks: Marks, patch: int) -> dict[str, dict[str, Any]]:
    """Contents of the JSON files beside config.json, by name.

    The tokenizer's settings are those of `folder`, but for the chat template, which is replaced, and for the tokens
    that end and pad: a turn ends an answer, also where the language model, a base one, named the end of a text. Bounds
    of pixels and frames are those of the public Qwen3-VL, whatever side a patch has.

    Args:
      folder: of the language model.
      marks: its marks.
      patch: side of a patch in pixels.

    Raises:
      CheckpointError: tokenizer_config.json cannot be read.
    """
    settings = {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "errors": "replace"}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json")
    settings.pop("chat_template", None)
    settings |= {"eos_token": _TURN_END, "pad_token": _PAD, "processor_class": "Qwen3VLProcessor"}
    pixels = {
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    return {
        "generation_config.json": {"eos_token_id": [marks.turn_end, marks.pad], "pad_token_id": marks.pad},
        "tokenizer_config.json": settings,
        "preprocessor_config.json": {
            "size": {"shortest_edge": 65536, "longest_edge": 16777216},
            "image_processor_type": "Qwen2VLImageProcessorFast",
            **pixels,
        },
        "video_preprocessor_config.json": {
            "size": {"shortest_edge": 4096, "longest_edge": 25165824},
            "fps": 2,
            "min_frames": 4,
            "max_frames": 768,
            "video_processor_type": "Qwen3VLVideoProcessor",
            **pixels,
        },
    }
