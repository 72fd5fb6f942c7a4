"""A checkpoint written or read by the processes of a run: what `test_processes.py` starts.

    python -m tests.train.restored save|load FOLDER

prints, as JSON, the mesh and the sha256 of each array as the processes together hold it.
"""

import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.checkpoint.store import CheckpointStore
from qwenvl_jax.parallel.mesh import make_mesh
from qwenvl_jax.train.processes import join

PLACE = {"stage": 1, "plan": "{...}"}


def tree(mesh):
    """Arrays of several types and layouts, whose values are pseudorandom bits; NaNs of all kinds among them."""
    split, whole = NamedSharding(mesh, PartitionSpec(None, "fsdp")), NamedSharding(mesh, PartitionSpec())

    def make():
        bits = jax.random.bits(jax.random.key(7), (3, 64), jnp.uint32)
        halves = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
        return {
            "params": {"w": jax.lax.bitcast_convert_type(bits, jnp.float32)},
            "moments": {"w": halves},
            "rng": bits[0, :2],
            "step": jnp.int32(3),
        }

    shardings = {"params": {"w": split}, "moments": {"w": split}, "rng": whole, "step": whole}
    return jax.jit(make, out_shardings=shardings)()


def main(what: str, folder: str) -> None:
    join()
    mesh = make_mesh()
    arrays = tree(mesh)
    with CheckpointStore(folder, fingerprint={"seed": "0"}) as store:
        if what == "save":
            store.save(3, arrays, PLACE)
            store.wait()
        else:
            place = store.progress()
            assert place is not None and {**PLACE, "step": 3}.items() <= place.items()
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
            arrays = store.restore(abstract)
    hashes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        values = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        hashes[jax.tree_util.keystr(path)] = hashlib.sha256(values.tobytes()).hexdigest()
    print(json.dumps({"devices": mesh.shape["fsdp"], "hashes": hashes}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
