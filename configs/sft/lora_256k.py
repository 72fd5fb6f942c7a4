"""SFT in rows of 262,144 with LoRA on the decoder; all else is frozen.

    qwenvl-jax train configs/sft/lora_256k.py --model runs/sft/lora_32k/model --data.root DATA

`--adapter.quantize nf4` holds the frozen kernels in four bits (QLoRA). Data sets lie in the folders of `--data.root
DIR` (or QWENVL_DATA), one for each part of the mixture; docs/curriculum.md tells what they hold.
"""

from qwenvl_jax.train.recipes import check_data as prepare  # noqa: F401
from qwenvl_jax.train.recipes import fine_tuning, sft_long, with_lora


def get_config():
    """The settings of the run."""
    return with_lora(fine_tuning(sft_long()))
