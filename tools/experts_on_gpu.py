"""What a layer of experts takes of the memory of an NVIDIA GPU that need not be there, forward and for its gradients.

    JAX_PLATFORMS=cpu python -m tools.experts_on_gpu --model qwen3_vl_30b_a3b --tokens 8192 --compile-for h200

Both products of `qwenvl_jax.ops.experts` are compiled: in blocks, as it is on such GPUs, and XLA's ragged product.
"""

import argparse

import jax
import jax.numpy as jnp

from qwenvl_jax.ops import experts
from qwenvl_jax.presets import PRESETS
from tools.absent_gpu import GPUS, absent_gpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, config in PRESETS.items() if config.text.moe]
    parser.add_argument("--model", default="qwen3_vl_30b_a3b", choices=names, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--compile-for", default="h200", choices=list(GPUS), help="default: %(default)s")
    options = parser.parse_args()
    placed = {"sharding": jax.sharding.SingleDeviceSharding(absent_gpu(options.compile_for))}
    text, N = PRESETS[options.model].text, options.tokens
    assert text.moe is not None  # as the choices have it
    H, X, F, k = text.hidden_size, text.moe.num_experts, text.moe.moe_intermediate_size, text.moe.num_experts_per_tok

    def bf16(*shape: int):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, **placed)

    chosen = jax.ShapeDtypeStruct((N, k), jnp.int32, **placed)
    inputs = bf16(N, H), bf16(N, k), chosen, bf16(X, H, 2, F), bf16(X, F, H)

    blocks = experts.grouped_product
    for name, product in (("in blocks", blocks), ("ragged product", jax.lax.ragged_dot)):
        experts.grouped_product = product

        def total(*inputs):  # a new one for each, as JAX remembers what it traced
            return jnp.sum(experts.experts_mlp(*inputs).astype(jnp.float32))

        for kind, function in (("forward", total), ("gradients", jax.grad(total, (0, 1, 3, 4)))):
            held = jax.jit(function).lower(*inputs).compile().memory_analysis()
            given, made = (size / 2**30 for size in (held.argument_size_in_bytes, held.temp_size_in_bytes))
            print(f"{name}, {kind}: {given:.1f} GiB of tokens and weights + {made:.1f} of temporaries")
    experts.grouped_product = blocks


if __name__ == "__main__":
    main()
