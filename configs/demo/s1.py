"""S1 of the demo: everything learns, on clips of up to 9 seconds.

    qwenvl-jax train configs/demo/s1.py --out runs/demo/s1

Starts from random weights; `--init DIR` goes on from those of another run (its `model` folder). The clips are made on
first use.
"""

from qwenvl_jax.demo.curriculum import prepare_single as prepare  # noqa: F401
from qwenvl_jax.demo.curriculum import single_stage


def get_config():
    """The settings of the run."""
    return single_stage("s1")
