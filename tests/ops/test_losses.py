"""The chunked loss against the plain one, in value, gradient and memory."""

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.ops.losses import chunked_cross_entropy

B, T, H, V = 3, 50, 16, 97


def inputs():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, T, H)).astype(np.float32), rng.normal(size=(H, V)).astype(np.float32)
    return hidden, head, rng.integers(0, V, (B, T), dtype=np.int32), rng.uniform(size=(B, T)).astype(np.float32)


def plain(hidden, head, targets, weights):
    logits = jax.nn.log_softmax(hidden @ head)
    return -jnp.sum(jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] * weights)


def test_value_and_gradients_do_not_depend_on_the_chunk():
    hidden, head, targets, weights = inputs()
    with jax.numpy_rank_promotion("allow"):
        wanted = jax.value_and_grad(plain, (0, 1))(hidden, head, targets, weights)
    for chunk in (7, 64, 1000):  # 150 tokens: a last chunk that is short, and a chunk larger than all
        got = jax.value_and_grad(chunked_cross_entropy, (0, 1))(hidden, head, targets, weights, chunk)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, wanted)


def test_memory_holds_a_chunk_of_logits_and_not_all():
    tokens, vocabulary, chunk = 4096, 32_000, 256
    arguments = (
        jax.ShapeDtypeStruct((1, tokens, H), jnp.float32),
        jax.ShapeDtypeStruct((H, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens), jnp.float32),
    )
    step = jax.jit(jax.grad(lambda *a: chunked_cross_entropy(*a, chunk), (0, 1)))
    temporaries = step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    # A few arrays of a chunk's logits; all logits at once would be 16 chunks' worth each.
    assert temporaries < 6 * chunk * vocabulary * 4
