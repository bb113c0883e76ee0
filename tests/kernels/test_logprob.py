import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from agentx_kernels import reference
from agentx_kernels.logprob import token_logprobs

BATCH, LENGTH, MODEL, VOCAB = 4, 21, 8, 48


def inputs(seed=0):
    """hidden, embedding, targets and the log-probabilities' cotangent."""
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((BATCH, LENGTH, MODEL), dtype=np.float32),
        rng.standard_normal((VOCAB, MODEL), dtype=np.float32),
        rng.integers(0, VOCAB, (BATCH, LENGTH), np.int32),
        rng.standard_normal((BATCH, LENGTH), dtype=np.float32),
    )


@functools.partial(jax.jit, static_argnames=("function", "temperature", "block_size"))
def with_gradients(hidden, embedding, targets, cotangent, function=token_logprobs, **options):
    """logprob, entropy, and the gradients of hidden and embedding."""

    def run(hidden, embedding):
        return function(hidden, embedding, targets, **options)

    (logprob, entropy), vjp = jax.vjp(run, hidden, embedding)
    return logprob, entropy, *vjp((cotangent, jnp.zeros_like(entropy)))


def oracle(hidden, embedding, targets, cotangent, **options):
    """The float64 answer."""
    with jax.enable_x64(True):
        arrays = (np.asarray(x, np.float64) for x in (hidden, embedding))
        answer = with_gradients(
            *arrays,
            targets,
            np.asarray(cotangent, np.float64),
            function=reference.token_logprobs,
            **options,
        )
        return [np.asarray(x) for x in answer]


def assert_close(got, want, tolerance=2e-6):
    names = ("logprob", "entropy", "dhidden", "dembedding")
    for name, x, y in zip(names, got, want, strict=True):
        scale = max(1.0, np.abs(y).max())
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y, rtol=0, atol=tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize("block_size", [1, 12, 28, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_match_the_float64_oracle(block_size, temperature):
    got = with_gradients(*inputs(), temperature=temperature, block_size=block_size)
    assert_close(got, oracle(*inputs(), temperature=temperature))


def test_equal_logits_give_every_target_the_same_share():
    hidden, embedding = jnp.zeros((1, 3, 2)), jnp.ones((5, 2))
    logprob, entropy = token_logprobs(hidden, embedding, jnp.array([[0, 2, 4]]), block_size=2)
    np.testing.assert_allclose(logprob, np.full((1, 3), -math.log(5)), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.full((1, 3), math.log(5)), rtol=1e-6)


def test_large_logits_neither_overflow_nor_vanish():
    hidden = jnp.full((1, 1, 1), 1000.0)
    embedding = jnp.array([[1.0], [0.0], [-1.0]])
    for target, want in ((0, 0.0), (1, -1000.0), (2, -2000.0)):
        logprob, entropy = token_logprobs(hidden, embedding, jnp.array([[target]]))
        np.testing.assert_allclose(logprob, [[want]])
        np.testing.assert_allclose(entropy, [[0.0]])


def test_no_gradient_passes_through_the_entropy():
    hidden, embedding, targets, _ = inputs()
    gradients = jax.grad(
        lambda h, e: token_logprobs(h, e, targets, block_size=28)[1].sum(), argnums=(0, 1)
    )(hidden, embedding)
    for x in gradients:
        np.testing.assert_array_equal(x, np.zeros_like(x))


def test_a_target_outside_the_vocabulary_has_no_probability():
    hidden, embedding, targets, _ = inputs()
    targets[0, 0] = VOCAB
    logprob, _ = token_logprobs(hidden, embedding, targets)
    assert logprob[0, 0] == -jnp.inf
    assert np.isfinite(logprob[0, 1:]).all()


def test_bfloat16_inputs_give_float32_log_probabilities():
    hidden, embedding, targets, cotangent = inputs()
    hidden, embedding = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, embedding))
    got = with_gradients(hidden, embedding, targets, cotangent, block_size=28)
    assert [x.dtype for x in got] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    want = oracle(hidden, embedding, targets, cotangent)
    # The inputs are exact in f64 too, so the values are as good as f32's; gradients are rounded.
    assert_close(got[:2] + tuple(want[2:]), want)
    assert_close(got, want, tolerance=1e-2)


def test_a_sharded_batch_and_vocabulary_give_the_same_and_are_never_gathered():
    axes = ("data", "context", "tensor")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3)

    def place(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    hidden, embedding, targets, cotangent = inputs()
    hidden, targets, cotangent = (x[:, :20] for x in (hidden, targets, cotangent))
    sharded = (
        place(hidden, "data", "context"),
        place(embedding, "tensor"),
        place(targets, "data", "context"),
        place(cotangent, "data", "context"),
    )
    compiled = with_gradients.lower(*sharded, block_size=16).compile()
    assert "all-gather" not in compiled.as_text()
    assert_close(
        with_gradients(*sharded, block_size=16),
        oracle(hidden, embedding, targets, cotangent),
    )


def test_the_logits_of_a_whole_batch_never_exist():
    batch, length, vocab = 4, 2048, 4096
    shapes = (
        jax.ShapeDtypeStruct((batch, length, 16), jnp.float32),
        jax.ShapeDtypeStruct((vocab, 16), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    )
    compiled = with_gradients.lower(*shapes, block_size=64).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < batch * length * vocab * 4 / 16


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden": jnp.zeros((LENGTH, MODEL))}, r"hidden must be \[B, S, D\]"),
        ({"embedding": jnp.zeros((MODEL, VOCAB))}, r"embedding \[V, D\]"),
        ({"targets": jnp.zeros((BATCH, LENGTH - 1), int)}, r"targets must be integers \(4, 21\)"),
        ({"targets": jnp.zeros((BATCH, LENGTH))}, "targets must be integers"),
        ({"embedding": jnp.zeros((VOCAB, MODEL), jnp.bfloat16)}, "one floating-point type.*cast"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"block_size": 0}, "block_size is 0; it must be 1 or more"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_sentence(change, sentence):
    hidden, embedding, targets, _ = inputs()
    arguments = {"hidden": hidden, "embedding": embedding, "targets": targets}
    with pytest.raises(ValueError, match=sentence):
        token_logprobs(**(arguments | change))
