"""One host of several that read the same data: a process that `test_hosts.py` starts.

    python -m tests.data.host FOLDER HOST HOSTS STEPS [PORT]

prints a line of JSON for each step: the hashes of its rows; with a port also, of the batch that the hosts put on their
common mesh, sums that every row and every patch enters.
"""

import json
import sys

import jax
import jax.numpy as jnp

from qwenvl_jax.data.pipeline import BatchLoader, batches
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.parallel.mesh import make_mesh
from qwenvl_jax.parallel.placement import shard_batch
from qwenvl_jax.train.config import TrainConfig
from qwenvl_jax.train.curriculum import prepare_stages
from tests.data.mixed import mixed_config


def main(folder: str, host: str, hosts: str, steps: str, port: str = "") -> None:
    if port:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", int(hosts), int(host))
    config = mixed_config(folder)
    loader = loader_of(config, int(host), int(hosts))
    mesh = make_mesh() if port else None
    for planned in batches(loader, int(steps), threads=2):
        line: dict = {"rows": planned.row_hashes, "failed": [failure.sample for failure in planned.failed]}
        if mesh is not None:
            batch = shard_batch(planned.batch, mesh)
            line["sums"] = [int(value) for value in jax.jit(_sums)(batch)]
            line["shape"] = [list(batch.tokens.shape), list(batch.vision[0].patches.shape)]
        print(json.dumps(line), flush=True)


def loader_of(config: TrainConfig, host: int = 0, hosts: int = 1) -> BatchLoader:
    """The loader of the first stage of a config for one host."""
    assert config.processor is not None
    processor = Processor.from_pretrained(config.processor)
    (stage,) = prepare_stages(config, processor, lambda line: None)
    return BatchLoader(stage.loader.plan, stage.loader.samples, processor, host=host, hosts=hosts)


def _sums(batch):
    """Sums of the whole batch in which each place counts differently, mod 2**32."""

    def of(array):
        flat = array.astype(jnp.uint32).reshape(-1)
        return (flat * (jnp.arange(flat.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1))).sum()

    return of(batch.tokens), of(batch.vision[0].patches), of(batch.vision_index + 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
