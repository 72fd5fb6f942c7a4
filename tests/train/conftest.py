"""For tests that take optimizer steps in this process, and of several processes."""

import concurrent.futures

import jax
import pytest

from qwenvl_jax.train.processes import Processes
from tests.train.several import free_port


@pytest.fixture
def promotion_as_usual():
    """Optax leaves dtypes and ranks to promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def three():
    """Three processes as threads, over a real coordination service."""
    from jax._src.lib import _jax

    address = f"localhost:{free_port()}"
    service = _jax.get_distributed_runtime_service(address, 3)
    clients = [_jax.get_distributed_runtime_client(address, index, init_timeout=30) for index in range(3)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda client: client.connect(), clients))
        yield pool, [Processes(index, 3, client) for index, client in enumerate(clients)]
        list(pool.map(lambda client: client.shutdown(), clients))
    service.shutdown()
