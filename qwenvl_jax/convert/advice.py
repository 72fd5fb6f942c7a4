"""How another tool serves an exported model, and what it will do differently from this package.

The differences are those of the two dialects: `official`, the form in which Qwen released its models, and
`transformers`, what transformers 5 makes of the same conversation.
"""

import shlex
from pathlib import Path

from qwenvl_jax.checkpoint.sections import read_json
from qwenvl_jax.errors import CheckpointError

DIALECT_FILE = "qwenvl_jax.json"  # as `qwenvl_jax.data.settings` writes it
_PROCESSOR = ("tokenizer.json", "preprocessor_config.json")

# What differs in conversations that hold a video, by model type; images and text agree in every tool.
_QWEN3 = {
    "official": (
        "transformers 5 and a vLLM built on it keep one more <|vision_start|> and <|vision_end|> around each video "
        "than this model is used to; transformers 4.57 and the vLLM releases built on it give it what it knows."
    ),
    "transformers": (
        "transformers 4.57 and the vLLM releases built on it drop the <|vision_start|> and <|vision_end|> around each "
        "video that this model is used to; transformers 5 gives it what it knows."
    ),
}
_QWEN2_5 = {
    "official": (
        "transformers 5 numbers what follows a video from the start of the video plus its longer side in merged tokens "
        "on, where this model is used to one more than the video's last position; transformers 4.49 to 4.57 and vLLM "
        "give it what it knows. Of a video file transformers 5 takes every frame unless do_sample_frames is set, and "
        "then steps from the first frame on, truncated, where this model is used to frames from the first to the last, "
        "rounded, as qwen-vl-utils takes them."
    ),
    "transformers": (
        "vLLM and transformers 4.49 to 4.57 number what follows a video from one more than the video's last position "
        "on, where this model is used to the start of the video plus its longer side in merged tokens; transformers 5 "
        "gives it what it knows. Of a video file transformers 5 takes every frame unless do_sample_frames is set; then "
        "it takes those that this model is used to, steps from the first frame on, truncated, and qwen-vl-utils "
        "others, from the first to the last, rounded."
    ),
}
_DIFFERENCES = {
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen2_5_vl": _QWEN2_5,
    "qwen2_vl": _QWEN2_5,
}


def advice(folder: Path) -> str:
    """Lines for the person who exported `folder`: the commands that serve it, and what to know of them.

    Raises:
      CheckpointError: config.json or the file of the dialect cannot be read.
    """
    place = shlex.quote(str(folder))
    lines = [
        f"The model is in {folder}. To serve it with another tool:",
        f"  vllm serve {place}",
        f"  transformers serve {place}",
    ]
    missing = [name for name in _PROCESSOR if not (folder / name).is_file()]
    if missing:
        lines.append(f"Both need {' and '.join(missing)} too, which the source did not have; copy what belongs to it.")
    dialect = "official"
    if (folder / DIALECT_FILE).is_file():
        dialect = read_json(folder / DIALECT_FILE).get("dialect", dialect)
    difference = _DIFFERENCES.get(str(read_json(folder / "config.json").get("model_type")), {}).get(dialect)
    if difference is None:
        raise CheckpointError(f"{folder / DIALECT_FILE} has dialect {dialect!r}; it must be official or transformers.")
    lines.append(f"Its dialect is {dialect}. With videos, {difference}")
    return "\n".join(lines)
