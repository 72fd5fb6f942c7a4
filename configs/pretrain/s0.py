"""S0: the mergers alone, 67B tokens in rows of 8,192.

    qwenvl-jax train configs/pretrain/s0.py --model qwen3_vl_4b --init models/s0-4b --data.root DATA

`models/s0-4b` is what `qwenvl-jax assemble` made of a SigLIP 2 and a Qwen3 of that size. Data sets lie in the folders
of `--data.root DIR` (or QWENVL_DATA), one for each part of the mixture; docs/curriculum.md tells what they hold.
"""

from qwenvl_jax.train.recipes import check_data as prepare  # noqa: F401
from qwenvl_jax.train.recipes import pretraining, s0


def get_config():
    """The settings of the run."""
    return pretraining(s0())
