"""S3: S2 in rows of 262,144, 100B tokens, the learning rate coming down.

    qwenvl-jax train configs/pretrain/s3.py --model qwen3_vl_4b --init runs/pretrain/s2/model --data.root DATA

Data sets lie in the folders of `--data.root DIR` (or QWENVL_DATA), one for each part of the mixture;
docs/curriculum.md tells what they hold.
"""

from qwenvl_jax.train.recipes import check_data as prepare  # noqa: F401
from qwenvl_jax.train.recipes import pretraining, s3


def get_config():
    """The settings of the run."""
    return pretraining(s3())
