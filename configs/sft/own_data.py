"""Fine-tuning on data of your own, as docs/fine-tune.md goes through it.

    qwenvl-jax train configs/sft/own_data.py --model Qwen/Qwen3-VL-4B-Instruct --data.mixture.own.source FOLDER

FOLDER is what `qwenvl-jax data build` made, or a JSONL file.
"""

from qwenvl_jax.train.recipes import check_data as prepare  # noqa: F401
from qwenvl_jax.train.recipes import fine_tuning, own_data


def get_config():
    """The settings of the run."""
    return fine_tuning(own_data())
