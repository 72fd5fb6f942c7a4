"""S0 to S3 as one run, weights and from S1 on the moments of the optimizer carried along.

    qwenvl-jax train configs/pretrain/curriculum.py --model qwen3_vl_4b --init models/s0-4b --data.root DATA

A setting of one stage is `--stages.s2.NAME`, of all `--NAME`. Data sets lie in the folders of `--data.root DIR` (or
QWENVL_DATA), one for each part of the mixture; docs/curriculum.md tells what they hold.
"""

from qwenvl_jax.train.recipes import check_data as prepare  # noqa: F401
from qwenvl_jax.train.recipes import curriculum, pretraining


def get_config():
    """The settings of the run."""
    return pretraining(*curriculum())
