"""Times the attention of packed rows on the accelerator of this machine, and compares its values with plain f32.

    python -m tools.bench_attention [--lengths 8192 16384] [--heads 32 8] [--width 128]

A row is one sample, or packed with samples of many lengths. TFLOP/s count what the model needs, as
`qwenvl_jax.flops` does: 4 E FLOPs for each query head and pair of a query and a key that it sees, forward; 2.5 times as
many more backward, where the scores are made again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.ops.attention import attention
from qwenvl_jax.ops.packed_attention import most_segments, packed_attention, starts_of

BACKWARD = 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384], help="slots; default: 8192 16384")
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), help="of queries and keys; default: 32 8")
    parser.add_argument("--width", type=int, default=128, help="of a head; default: %(default)s")
    parser.add_argument("--full", action="store_true", help="not causal, as in the vision tower")
    parser.add_argument("--most", type=int, nargs="*", default=[], help="segments that rows may have, to compare")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure; default: %(default)s")
    parser.add_argument("--out", type=Path, help="a .jsonl file to which each result is added")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}; jax {jax.__version__}; {time.strftime('%Y-%m-%d')}")
    compared(*options.heads, options.width, causal=not options.full)
    for length in options.lengths:
        for samples in (1, 16):
            for kind in options.kinds:
                # With room for fewer segments than there are, the kernel would leave some out.
                room = [most for most in options.most if most >= samples]
                for most in [*room, 0] if kind == "packed" else [0]:
                    result = timed(kind, length, samples, most, options)
                    print(line_of(result), flush=True)
                    if options.out:
                        with options.out.open("a") as file:
                            file.write(json.dumps(result) + "\n")


def by_packed(q, k, v, segments, causal: bool, most: int):
    """The kernel that is told where segments start."""
    B, T, N, E = q.shape
    starts = starts_of(segments)
    return packed_attention(q, k, v, starts, causal=causal, most=most or most_segments(B, T, N, E, causal=causal))


def by_masks(q, k, v, segments, causal: bool, most: int):
    """The kernel that is told by masks."""
    return attention(q, k, v, q_segments_BT=segments, kv_segments_BS=segments, causal=causal, cudnn=True)


def by_xla(q, k, v, segments, causal: bool, most: int):
    """Plain attention."""
    return attention(q, k, v, q_segments_BT=segments, kv_segments_BS=segments, causal=causal)


def by_jax(q, k, v, segments, causal: bool, most: int):
    """JAX's own call of cuDNN, blind to segments: a bound for rows of one sample."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


KINDS: dict[str, Callable] = {"packed": by_packed, "masks": by_masks, "plain": by_xla, "blind": by_jax}


def compared(N: int, K: int, E: int, *, causal: bool) -> None:
    """Prints how far values and gradients are from plain attention in f32: two rows, odd lengths, padding."""
    T = 301
    q, k, v, g = _inputs(2, T, N, K, E)
    segments = np.zeros((2, T), np.int32)
    for row, stops in enumerate(((17, 18, 100, 230, 281), (T,))):
        start = 0
        for number, stop in enumerate(stops, 1):
            segments[row, start:stop] = number
            start = stop

    def outcome(attend, dtype):
        def summed(q, k, v, segments):
            y = attend(*(x.astype(dtype) for x in (q, k, v)), segments, causal, 0).astype(jnp.float32)
            # What stands at padding is of no use to anyone.
            y = y * (segments > 0)[:, :, None, None].astype(jnp.float32)
            return jnp.sum(y * g.astype(jnp.float32)), y

        with jax.default_matmul_precision("highest"):
            (_, y), gradients = jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2), has_aux=True))(q, k, v, segments)
        return [np.asarray(x, np.float32) for x in (y, *gradients)]

    wanted = outcome(by_xla, jnp.float32)
    for kind in ("packed", "masks"):
        found = outcome(KINDS[kind], jnp.bfloat16)
        far = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, wanted, strict=True)]
        print(f"{kind:>7}, E {E}: relative differences of y, dq, dk, dv: {', '.join(f'{x:.1e}' for x in far)}")


def timed(kind: str, T: int, samples: int, most: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a forward pass, and of one with its gradients."""
    (N, K), E, causal = options.heads, options.width, not options.full
    q, k, v, g = _inputs(1, T, N, K, E)
    sizes = np.random.default_rng(1).lognormal(0, 0.8, samples)
    stops = np.round(np.cumsum(sizes) / sizes.sum() * T).astype(int)
    segments = jnp.asarray(np.searchsorted(stops, np.arange(T), side="right")[None] + 1, jnp.int32)
    lengths = np.diff([0, *stops]).astype(np.int64)
    pairs = int((lengths * (lengths + 1) // 2 if causal else lengths**2).sum())

    def forward(q, k, v, segments):
        return KINDS[kind](q, k, v, segments, causal, most)

    def both(q, k, v, segments, g):
        y, back = jax.vjp(lambda *qkv: forward(*qkv, segments), q, k, v)
        return y, *back(g)

    flops = 4 * E * N * pairs
    result: dict[str, Any] = {"kind": kind, "T": T, "samples": samples, "most": most, "heads": [N, K], "width": E}
    result |= {"causal": causal, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for name, function, inputs, share in (
        ("forward", forward, (q, k, v, segments), 1),
        ("both", both, (q, k, v, segments, g), 1 + BACKWARD),
    ):
        begun = time.perf_counter()
        try:
            run = jax.jit(function).lower(*inputs).compile()
            jax.block_until_ready(run(*inputs))
        except Exception as error:  # a kind that a GPU does not have, or has no memory for
            result[name] = {"error": str(error).splitlines()[0][:160]}
            continue
        compiled, seconds = time.perf_counter() - begun, []
        until = time.perf_counter() + options.seconds
        while len(seconds) < 3 or time.perf_counter() < until:
            start = time.perf_counter()
            for _ in range(10):
                last = run(*inputs)
            jax.block_until_ready(last)
            seconds.append((time.perf_counter() - start) / 10)
        median = statistics.median(seconds)
        result[name] = {"seconds": median, "tflops": flops * share / median / 1e12, "compile_seconds": compiled}
    return result


def line_of(result: dict[str, Any]) -> str:
    """A result, for people."""
    parts = [f"{result['kind']:>7} {result['T']:>6} slots, {result['samples']:>2} samples, most {result['most']:>3}:"]
    for name in ("forward", "both"):
        one = result[name]
        if "error" in one:
            parts.append(f"{name} {one['error']};")
        else:
            parts.append(f"{name} {one['seconds'] * 1e3:.2f} ms, {one['tflops']:.0f} TFLOP/s;")
    return " ".join(parts)


def _inputs(B: int, T: int, N: int, K: int, E: int):
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(
        jax.random.normal(key, (B, T, heads, E), jnp.bfloat16) for key, heads in zip(keys, (N, K, K, N), strict=True)
    )


if __name__ == "__main__":
    main()
