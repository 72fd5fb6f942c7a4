"""For tests that take optimizer steps in this process."""

import jax
import pytest


@pytest.fixture
def promotion_as_usual():
    """Optax leaves dtypes and ranks to promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
