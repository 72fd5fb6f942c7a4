"""S2: S1 in rows of 32,768, 1T tokens.

    qwenvl-jax train configs/pretrain/s2.py --model qwen3_vl_4b --init runs/pretrain/s1/model --data.root DATA

Data sets lie in the folders of `--data.root DIR` (or QWENVL_DATA), one for each part of the mixture;
docs/curriculum.md tells what they hold.
"""

from qwenvl_jax.train.recipes import check_data as prepare  # noqa: F401
from qwenvl_jax.train.recipes import pretraining, s2


def get_config():
    """The settings of the run."""
    return pretraining(s2())
