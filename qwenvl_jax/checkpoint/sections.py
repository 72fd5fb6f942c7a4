"""A JSON object of a public file whose keys are accounted for: read, held to a value, or known not to matter."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvl_jax.errors import CheckpointError

# Keys of the whole ecosystem that change no number a model computes: provenance, training and sampling defaults.
_NEUTRAL = {
    "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "name_or_path", "_name_or_path",
    "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "initializer_range",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "torchscript",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "id2label", "label2id",
    "num_labels", "problem_type", "chunk_size_feed_forward", "tie_encoder_decoder", "cross_attention_hidden_size",
    "is_decoder", "add_cross_attention", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix",
    "pruned_heads", "prune_heads", "use_bfloat16", "tf_legacy_loss", "remove_invalid_values",
    "exponential_decay_length_penalty",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "sliding_window",
    "max_window_layers", "vision_token_id", "base_model_tp_plan", "base_model_ep_plan", "router_aux_loss_coef",
    "in_chans", "spatial_patch_size",
}  # fmt: skip
# (`sliding_window` and `max_window_layers` act only through `use_sliding_window` and `layer_types`, which are checked;
# `in_chans` and `spatial_patch_size`, of hub files, are read by nobody: `in_channels` and `patch_size` count.)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      CheckpointError: the file is missing, is no JSON, or holds something else than an object.
    """
    if not file.is_file():
        raise CheckpointError(f"{file.parent} has no {file.name}; give a folder in the public Hugging Face layout.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); fetch the file again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{file} holds a JSON {type(values).__name__} where an object is expected; fetch it again."
        )
    return values


class Section:
    """An object of the file whose keys are ticked off as they are read, so that the rest can be judged at the end."""

    def __init__(self, values: Mapping[str, Any], where: str, name: str):
        self.values, self.where, self.name = values, where, name
        self.read: set[str] = set()

    def get(self, key: str, kind: type, *default):
        """The value of a key as a `kind`; without a default it must be there. null counts as absent."""
        self.read.add(key)
        value = self.values.get(key)
        if value is None:
            if not default:
                raise CheckpointError(f"{self.where}: {self.name}{key} is missing; fetch the file again.")
            return default[0]
        if kind is float and is_int(value):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and not is_int(value)):
            kinds = {int: "an integer", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
            raise self.error(key, kinds.get(kind, "a string"), value)
        return value

    def square(self, key: str, default: int) -> int:
        """A number that may be spelled as a list of two equal ones."""
        value = self.values.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1] and is_int(value[0]):
            self.read.add(key)
            return value[0]
        return self.get(key, int, default)

    def check_positive(self, numbers: Mapping[str, int]) -> None:
        """Refuses the first number below 1."""
        for key, value in numbers.items():
            if value < 1:
                raise self.error(key, "a positive integer", value)

    def section(self, key: str) -> "Section":
        """The object under a key."""
        return Section(self.get(key, dict), self.where, f"{self.name}{key}.")

    def error(self, key: str, expected: str, got: Any) -> CheckpointError:
        """The error of a value that cannot be used."""
        return CheckpointError(f"{self.where}: {self.name}{key} must be {expected}, but is {json.dumps(got)}.")

    def finish(self, only: Mapping[str, tuple]) -> None:
        """Refuses keys that hold another value than `only` allows, and keys that nothing is known about."""
        for key, value in self.values.items():
            if key in only:
                if value is not None and value not in only[key]:
                    allowed = " or ".join(json.dumps(v) for v in only[key])
                    raise CheckpointError(
                        f"{self.where}: {self.name}{key} = {json.dumps(value)} is not supported, only {allowed}; "
                        "use a checkpoint without it."
                    )
            elif key not in self.read | _NEUTRAL and value is not None:
                near = difflib.get_close_matches(key, self.read | set(only), n=1)
                hint = (
                    f"did you mean {near[0]}?" if near else "remove it if it does not change what the model computes."
                )
                raise CheckpointError(f"{self.where}: {self.name}{key} is not a key that is known here; {hint}")


def is_int(value: Any) -> bool:
    """Whether a JSON value is a whole number; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)
