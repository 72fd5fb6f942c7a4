"""SFT in rows of 32,768: mergers and decoder learn.

    qwenvl-jax train configs/sft/full_32k.py --model Qwen/Qwen3-VL-4B-Instruct --data.root DATA

Data sets lie in the folders of `--data.root DIR` (or QWENVL_DATA), one for each part of the mixture;
docs/curriculum.md tells what they hold.
"""

from qwenvl_jax.train.recipes import check_data as prepare  # noqa: F401
from qwenvl_jax.train.recipes import fine_tuning, sft


def get_config():
    """The settings of the run."""
    return fine_tuning(sft())
