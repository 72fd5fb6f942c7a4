"""The demo's whole curriculum as one run: a text warm-up, then S0, S1, S2 and S3.

qwenvl-jax train configs/demo/curriculum.py --out runs/demo/curriculum
"""

from qwenvl_jax.demo.curriculum import prepare_single as prepare  # noqa: F401
from qwenvl_jax.demo.curriculum import whole_curriculum as get_config  # noqa: F401
