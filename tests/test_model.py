"""The decoder against its own definition: full forward, decoding over a cache, packing, types.

Legend as in agentx/model. Parity with other libraries' models is tests/test_interop.py's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agentx.model import (
    KVCache,
    ModelConfig,
    Transformer,
    abstract_transformer,
    fork,
    init_cache,
    write,
)
from agentx.model.parts import RMSNorm, parameter, project, rotate, rotation
from agentx.model.sizes import num_params, train_flops_per_token
from agentx_kernels.layout import causal, packed

TINY = ModelConfig(
    vocab_size=61,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    rope_theta=1e4,
    max_length=64,
)


@functools.cache
def tiny() -> Transformer:
    return Transformer(TINY, nnx.Rngs(0))


@nnx.jit
def forward(model, tokens, layout):
    return model(tokens, layout).hidden


@nnx.jit
def decode(model, tokens, cache: KVCache, new_lengths):
    """One call of `decode` and the write that follows it."""
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    hidden, new_kv, _ = model.decode(tokens, positions, cache.k, cache.v, cache.lengths)
    return hidden, write(cache, *new_kv, new_lengths)


def random_tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (batch, length), np.int32)


@pytest.mark.parametrize("qk_norm", ["head", "none"])
@pytest.mark.parametrize("tied", [True, False])
def test_num_params_counts_what_the_model_holds(qk_norm, tied):
    config = dataclasses.replace(TINY, qk_norm=qk_norm, tie_embeddings=tied)
    leaves = jax.tree.leaves(nnx.state(abstract_transformer(config)))
    assert sum(leaf.size for leaf in leaves) == num_params(config)


def test_train_flops_of_one_token_are_six_a_weight_and_attention_over_half_a_row():
    config = ModelConfig(
        vocab_size=10, d_model=4, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=2, d_ff=8
    )
    # Weights of a layer: q and o 4 * 4 each, k and v 4 * 2 each, three of 4 * 8. And 10 * 4.
    assert train_flops_per_token(config, 7) == 6 * (3 * (16 + 16 + 8 + 8 + 96) + 40) + (
        12 * 3 * 2 * 2 * 4
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"head_dim": 7}, "head_dim is 7; the rotation needs an even one"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"remat": "some"}, "remat is 'some'"),
        ({"norm_eps": 0.0}, r"norm_eps is 0\.0; it must be above 0"),
        ({"logit_softcap": 0.0}, r"logit_softcap is 0\.0; it must be above 0"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


def test_rotation_turns_the_pairs_of_the_two_halves_of_a_head():
    config = dataclasses.replace(TINY, head_dim=4, rope_theta=100.0)
    turn = rotation(jnp.array([[0, 3]]), config)
    x_BSNH = jnp.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4).repeat(2, axis=1)
    expected = [
        [1, 1, 0, 0],
        [np.cos(3.0), np.cos(0.3), np.sin(3.0), np.sin(0.3)],
    ]
    np.testing.assert_allclose(rotate(x_BSNH, turn)[0, :, 0], expected, atol=1e-6)


def test_norm_of_bfloat16_is_computed_in_float32():
    norm = RMSNorm(nnx.Rngs(0), TINY, embed=4)
    x = jnp.array([[300.0, 1.0, 2.0, 3.0]])
    exact = norm(x)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x.astype(jnp.bfloat16)), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("x_shape", "sizes", "num_inputs", "subscripts"),
    [
        ((2, 3, 4), {"embed": 4, "heads": 6, "head_dim": 5}, 1, "bsd,dnh->bsnh"),
        ((2, 3, 6, 5), {"heads": 6, "head_dim": 5, "embed": 4}, 2, "bsnh,nhd->bsd"),
        ((2, 3, 4), {"embed": 4, "mlp": 2}, 1, "bsd,df->bsf"),
    ],
)
def test_project_and_its_gradients_are_einsum_s(x_shape, sizes, num_inputs, subscripts):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], x_shape)
    w = parameter(nnx.Rngs(0), jax.nn.initializers.normal(1.0), TINY, num_inputs, **sizes)
    y, vjp = jax.vjp(lambda x, value: project(x, w.replace(value)), x, w[...])
    expected, expected_vjp = jax.vjp(lambda x, w: jnp.einsum(subscripts, x, w), x, w[...])
    dy = jax.random.normal(keys[1], y.shape)
    for actual, wanted in zip((y, *vjp(dy)), (expected, *expected_vjp(dy)), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


def test_decoding_over_a_cache_equals_the_full_forward():
    tokens = random_tokens(3, 14)
    full = forward(tiny(), tokens, causal(3, 14))
    prompts = np.array([6, 1, 4])  # prefilled together, padded to 6
    hidden, cache = decode(tiny(), tokens[:, :6], init_cache(TINY, 3, 14), jnp.array(prompts))
    for row, length in enumerate(prompts):
        np.testing.assert_allclose(hidden[row, :length], full[row, :length], atol=1e-5)
    # Then one token at a time, and nothing more for a row that has reached its end.
    for _ in range(13):
        lengths = np.asarray(cache.lengths)
        next_token = tokens[np.arange(3), np.minimum(lengths, 13)][:, None]
        hidden, cache = decode(tiny(), next_token, cache, jnp.array(lengths < 14, jnp.int32))
        for row in np.flatnonzero(lengths < 14):
            np.testing.assert_allclose(hidden[row, 0], full[row, lengths[row]], atol=1e-5)
    assert cache.lengths.tolist() == [14, 14, 14]


def test_a_later_turn_of_several_tokens_sees_the_cache_and_itself_causally():
    tokens = random_tokens(2, 10, seed=1)
    full = forward(tiny(), tokens, causal(2, 10))
    _, cache = decode(tiny(), tokens[:, :5], init_cache(TINY, 2, 12), jnp.array([5, 5]))
    hidden, _ = decode(tiny(), tokens[:, 5:], cache, jnp.array([5, 5]))
    np.testing.assert_allclose(hidden, full[:, 5:], atol=1e-5)


def test_write_appends_at_each_row_s_own_length_and_drops_what_does_not_fit():
    config = dataclasses.replace(TINY, num_layers=1, num_kv_heads=1, num_heads=1, head_dim=2)
    cache = init_cache(config, 3, 4)._replace(lengths=jnp.array([0, 2, 3]))
    new = jnp.arange(1.0, 10.0).reshape(1, 3, 1, 3, 1).repeat(2, axis=-1)
    cache = write(cache, [new], [-new], jnp.array([2, 0, 3]))
    assert cache.k[0][0, :, 0, :, 0].tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 7]]
    np.testing.assert_array_equal(cache.v[0], -cache.k[0])
    assert cache.lengths.tolist() == [2, 2, 4]


def test_fork_copies_rows_of_the_cache():
    cache = init_cache(TINY, 2, 3)
    cache = cache._replace(k=[cache.k[0].at[:, 1].set(5.0)], lengths=jnp.array([1, 3]))
    forked = fork(cache, jnp.array([1, 0, 1]))
    assert forked.k[0][0, :, 0, 0, 0].tolist() == [5, 0, 5]
    assert forked.v[0].shape == (2, 3, 2, 3, 8)
    assert forked.lengths.tolist() == [3, 1, 3]


def test_writing_a_donated_cache_makes_no_copy_of_it():
    cache = init_cache(TINY, 8, 512)
    new = [jnp.zeros((2, 8, 2, 1, 8))]
    compiled = jax.jit(write, donate_argnums=0).lower(cache, new, new, jnp.ones(8, jnp.int32))
    memory = compiled.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.k[0].nbytes + cache.v[0].nbytes
    assert memory.temp_size_in_bytes < cache.k[0].nbytes / 4


def test_documents_of_a_packed_row_do_not_see_each_other():
    tokens = random_tokens(1, 12)
    together = forward(tiny(), tokens, packed([[7, 4]], 12))
    first = forward(tiny(), tokens[:, :7], causal(1, 7))
    second = forward(tiny(), tokens[:, 7:11], causal(1, 4))
    np.testing.assert_allclose(together[:, :7], first, atol=1e-5)
    np.testing.assert_allclose(together[:, 7:11], second, atol=1e-5)


def gradients(config):
    model = Transformer(config, nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    tokens = random_tokens(2, 16)

    def loss(params):
        hidden = nnx.merge(graphdef, params)(tokens, causal(2, 16)).hidden
        return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))

    return loss, params


@pytest.mark.parametrize("remat", ["none", "full"])
def test_what_is_computed_again_does_not_change_gradients(remat):
    expected, params = gradients(TINY)
    loss, _ = gradients(dataclasses.replace(TINY, remat=remat))
    for a, b in zip(
        jax.tree.leaves(jax.jit(jax.grad(loss))(params)),
        jax.tree.leaves(jax.jit(jax.grad(expected))(params)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_full_remat_saves_less_than_dots_and_dots_less_than_none():
    def saved_bytes(remat):
        loss, params = gradients(dataclasses.replace(TINY, remat=remat, num_layers=1))
        _, vjp = jax.eval_shape(lambda params: jax.vjp(loss, params), params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(vjp))

    assert saved_bytes("full") < saved_bytes("dots") < saved_bytes("none")


def test_the_program_does_not_grow_with_depth():
    def size(num_layers):
        loss, params = gradients(dataclasses.replace(TINY, num_layers=num_layers))
        return len(str(jax.make_jaxpr(jax.grad(loss))(params)).splitlines())

    assert size(2) == size(7)


def test_bfloat16_activations_stay_near_float32_ones():
    tokens = random_tokens(2, 16)
    config = dataclasses.replace(TINY, dtype="bfloat16")
    hidden = forward(Transformer(config, nnx.Rngs(0)), tokens, causal(2, 16))
    exact = forward(tiny(), tokens, causal(2, 16))
    assert hidden.dtype == jnp.bfloat16
    assert jnp.abs(hidden.astype(jnp.float32) - exact).mean() < 0.02


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_model_drawn_to_copy_marks_tokens_and_then_repeats_them(kv_heads):
    config = dataclasses.replace(TINY, num_layers=3, num_kv_heads=kv_heads, init="copy")
    attention = nnx.state(Transformer(config, nnx.Rngs(0)))["layers"][0]["attention"]
    w_v_LDKH, w_o_LNHD = np.asarray(attention["w_v"][...]), np.asarray(attention["w_o"][...])

    # Each head of the last layer repeats the values that it reads, and all heads alike.
    w_v_LDNH = np.repeat(w_v_LDKH, 4 // kv_heads, axis=2)
    gain = np.linalg.norm(w_o_LNHD[-1]) / np.linalg.norm(w_v_LDNH[-1])
    assert gain > 1
    np.testing.assert_allclose(w_o_LNHD[-1], gain * w_v_LDNH[-1].transpose(1, 2, 0), rtol=1e-5)
    # Those before add a vector about as long as an embedding, which has nothing to do with it.
    normed_D = np.random.default_rng(0).standard_normal(32)
    added_LD = np.einsum("d,ldnh,lnhe->le", normed_D, w_v_LDNH, w_o_LNHD)[:-1]
    assert np.all(np.abs(np.linalg.norm(added_LD, axis=1) - 1) < 0.5)
    cosines = added_LD @ normed_D / np.linalg.norm(added_LD, axis=1) / np.linalg.norm(normed_D)
    assert np.abs(cosines).max() < 0.5


def test_a_model_drawn_to_copy_knows_at_once_which_tokens_it_has_seen():
    def seen_above_unseen(init):
        config = dataclasses.replace(TINY, vocab_size=512, d_model=128, head_dim=32, init=init)
        model = Transformer(dataclasses.replace(config, num_kv_heads=4), nnx.Rngs(0))
        tokens = np.random.default_rng(0).choice(512, (8, 8), replace=False).astype(np.int32)
        logits = np.asarray(forward(model, tokens, causal(8, 8))[:, -1] @ model.unembedding().T)
        # The last token is no news: every fresh model with tied embeddings predicts it.
        seen = np.take_along_axis(logits, tokens[:, :-1], 1).mean()
        return (seen - logits.mean()) / logits.std()

    assert seen_above_unseen("copy") > 0.25
    assert abs(seen_above_unseen("normal")) < 0.25


def test_embeddings_share_a_direction_only_where_a_model_is_drawn_to_copy():
    def shared(init):
        model = Transformer(dataclasses.replace(TINY, vocab_size=999, init=init), nnx.Rngs(0))
        return float(jnp.linalg.norm(model.embed[...].mean(0)))

    assert shared("normal") < 0.1
    assert 0.5 < shared("copy") < 1.5
