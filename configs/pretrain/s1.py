"""S1: S0 with everything learning, 1T tokens in rows of 8,192.

    qwenvl-jax train configs/pretrain/s1.py --model qwen3_vl_4b --init runs/pretrain/s0/model --data.root DATA

Data sets lie in the folders of `--data.root DIR` (or QWENVL_DATA), one for each part of the mixture;
docs/curriculum.md tells what they hold.
"""

from qwenvl_jax.train.recipes import check_data as prepare  # noqa: F401
from qwenvl_jax.train.recipes import pretraining, s1


def get_config():
    """The settings of the run."""
    return pretraining(s1())
