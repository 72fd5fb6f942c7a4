"""S0 of the demo: only the mergers learn, on clips of up to 9 seconds.

    qwenvl-jax train configs/demo/s0.py --out runs/demo/s0

Starts from random weights; `--init DIR` goes on from those of another run (its `model` folder). The clips are made on
first use.
"""

from qwenvl_jax.demo.curriculum import prepare_single as prepare  # noqa: F401
from qwenvl_jax.demo.curriculum import single_stage


def get_config():
    """The settings of the run."""
    return single_stage("s0")
