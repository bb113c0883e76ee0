"""Log-probabilities on every path against the float64 oracle, on one device and on eight."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from agentx_kernels import reference
from agentx_kernels.hardware import hardware
from agentx_kernels.logits import LogitBlocks
from agentx_kernels.logprob import VocabularySplit, token_logprobs

SPLIT = VocabularySplit(("data",), "context", "tensor", embed=("data", "context"))

# How each path is run here: with several blocks of tokens and columns, and tails of both.
PATHS = {
    "xla": {"hardware": hardware("cpu"), "blocks": LogitBlocks(24, 20)},
    "tpu": {
        "hardware": hardware("v5p"),
        "blocks": LogitBlocks(128, 128),
        "interpret": True,
    },
}
# Rows, tokens a row, D and V.
SHAPES = {"xla": (4, 21, 8, 48), "tpu": (2, 100, 64, 300)}
ON_CPU = {"hardware": hardware("cpu")}


def inputs(shape, dtype=np.float32, seed=0):
    """hidden, embedding, targets and the log-probabilities' cotangent."""
    batch, length, size, vocab = shape
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((batch, length, size), dtype=np.float32)
    embedding = rng.standard_normal((vocab, size), dtype=np.float32) * math.sqrt(8 / size)
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(embedding, dtype),
        rng.integers(0, vocab, (batch, length), np.int32),
        rng.standard_normal((batch, length), dtype=np.float32),
    )


def temperatures(shape, seed=1):
    """One a token, f32[B, S]."""
    return np.random.default_rng(seed).uniform(0.3, 3.0, shape[:2]).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("function", "given"))
def _with_gradients(hidden, embedding, targets, cotangent, temperature, function, given):
    def run(hidden, embedding):
        return function(hidden, embedding, targets, temperature=temperature, **dict(given))

    (logprob, entropy), vjp = jax.vjp(run, hidden, embedding)
    return logprob, entropy, *vjp((cotangent, jnp.zeros_like(entropy)))


def with_gradients(*arrays, function=token_logprobs, temperature=1.0, **given):
    """logprob, entropy, and the gradients of hidden and embedding. A temperature is traced."""
    return _with_gradients(*arrays, temperature, function, tuple(given.items()))


def oracle(hidden, embedding, targets, cotangent, **given):
    """The float64 answer."""
    with jax.enable_x64(True):
        arrays = [np.asarray(x, np.float64) for x in (hidden, embedding)]
        cotangent = np.asarray(cotangent, np.float64)
        answer = with_gradients(
            *arrays, targets, cotangent, function=reference.token_logprobs, **given
        )
        return [np.asarray(x) for x in answer]


def assert_close(got, want, tolerance=2e-6):
    names = ("logprob", "entropy", "dhidden", "dembedding")
    for name, x, y in zip(names, got, want, strict=True):
        scale = max(1.0, np.abs(y).max())
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y, rtol=0, atol=tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, "one a token"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_and_gradients_match_the_float64_oracle(path, temperature, softcap):
    arrays = inputs(SHAPES[path])
    if temperature == "one a token":
        temperature = temperatures(SHAPES[path])
    given_ = {"temperature": temperature, "softcap": softcap}
    assert_close(with_gradients(*arrays, **PATHS[path], **given_), oracle(*arrays, **given_))


@pytest.mark.parametrize(
    ("path", "blocks"),
    [("xla", (1, 1)), ("xla", (24, 24)), ("xla", (4096, 4096)), ("tpu", (256, 384)), ("tpu", None)],
)
def test_no_block_changes_the_answer(path, blocks):
    arrays = inputs(SHAPES[path])
    chosen = PATHS[path] | {"blocks": blocks and LogitBlocks(*blocks)}
    assert_close(with_gradients(*arrays, **chosen), oracle(*arrays))


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_inputs_give_float32_log_probabilities(path):
    hidden, embedding, targets, cotangent = inputs(SHAPES[path], jnp.bfloat16)
    given_ = {"softcap": 5.0, "temperature": temperatures(SHAPES[path])}
    got = with_gradients(hidden, embedding, targets, cotangent, **PATHS[path], **given_)
    assert [x.dtype for x in got] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    want = oracle(hidden, embedding, targets, cotangent, **given_)
    # The inputs are exact in f64 too, so the values are as good as f32's; gradients are rounded.
    assert_close(got[:2] + tuple(want[2:]), want)
    assert_close(got, want, tolerance=1e-2)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_numbers_of_tokens_and_columns_match_the_oracle(path, data):
    lengths, vocabs = {
        "xla": (st.integers(1, 30), st.integers(1, 50)),
        "tpu": (st.sampled_from([1, 127, 129]), st.sampled_from([1, 127, 128, 129, 257])),
    }[path]
    shape = 1, data.draw(lengths, "tokens"), 8, data.draw(vocabs, "vocabulary")
    arrays = inputs(shape, seed=data.draw(st.integers(0, 99), "seed"))
    assert_close(with_gradients(*arrays, **PATHS[path]), oracle(*arrays))


@pytest.mark.parametrize("path", PATHS)
def test_targets_on_both_sides_of_every_border_are_found(path):
    batch, length, _, vocab = shape = SHAPES[path]
    width = PATHS[path]["blocks"].columns
    borders = {x for x in range(0, vocab, width) for x in (x - 1, x) if x >= 0}
    borders |= {vocab - 1, vocab - vocab % width, max(0, vocab - width)}
    hidden, embedding, _, cotangent = inputs(shape)
    targets = np.resize(np.array(sorted(borders), np.int32), (batch, length))
    arrays = hidden, embedding, targets, cotangent
    assert_close(with_gradients(*arrays, **PATHS[path]), oracle(*arrays))


@pytest.mark.parametrize("path", PATHS)
def test_equal_logits_give_every_target_the_same_share(path):
    hidden, embedding = jnp.zeros((1, 3, 2)), jnp.ones((500, 2))
    logprob, entropy = token_logprobs(hidden, embedding, jnp.array([[0, 2, 499]]), **PATHS[path])
    np.testing.assert_allclose(logprob, np.full((1, 3), -math.log(500)), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.full((1, 3), math.log(500)), rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_large_logits_neither_overflow_nor_vanish(path):
    """Of 200 columns the highest logit comes last, and two of them share it in the second row."""
    hidden = jnp.array([[[1e4], [-1e4]]])
    embedding = jnp.linspace(-1, 1, 201)[:, None].at[1].set(-1.0)
    targets = np.array([[200, 0]], np.int32)
    arrays = hidden, embedding, targets, np.array([[1.0, 1.0]], np.float32)
    got = with_gradients(*arrays, **PATHS[path])
    np.testing.assert_allclose(got[0], [[0.0, -math.log(2)]], atol=1e-6)
    np.testing.assert_allclose(got[1], [[0.0, math.log(2)]], atol=1e-6)
    assert_close(got, oracle(*arrays))
    for target, want in ((100, -1e4), (0, -2e4)):
        logprob, _ = token_logprobs(hidden, embedding, jnp.full((1, 2), target), **PATHS[path])
        np.testing.assert_allclose(logprob[0, 0], want)


@pytest.mark.parametrize("path", PATHS)
def test_no_gradient_passes_through_the_entropy(path):
    hidden, embedding, targets, _ = inputs(SHAPES[path])
    gradients = jax.grad(
        lambda h, e: token_logprobs(h, e, targets, **PATHS[path])[1].sum(), argnums=(0, 1)
    )(hidden, embedding)
    for x in gradients:
        np.testing.assert_array_equal(x, np.zeros_like(x))


@pytest.mark.parametrize("path", PATHS)
def test_no_gradient_passes_through_the_temperature(path):
    hidden, embedding, targets, _ = inputs(SHAPES[path])
    gradient = jax.grad(
        lambda t: sum(
            x.sum()
            for x in token_logprobs(hidden, embedding, targets, temperature=t, **PATHS[path])
        )
    )(jnp.asarray(temperatures(SHAPES[path])))
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("path", PATHS)
def test_a_number_is_that_temperature_for_every_token(path):
    arrays = inputs(SHAPES[path])
    run = functools.partial(token_logprobs, *arrays[:3], softcap=2.0, **PATHS[path])
    every = np.full(SHAPES[path][:2], 0.7, np.float32)
    for got, want in zip(run(temperature=0.7), run(temperature=every), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("path", PATHS)
def test_a_target_outside_the_vocabulary_has_no_probability(path):
    hidden, embedding, targets, _ = inputs(SHAPES[path])
    targets[0, :2] = len(embedding), -1
    logprob, _ = token_logprobs(hidden, embedding, targets, **PATHS[path])
    assert (logprob[0, :2] == -jnp.inf).all()
    assert np.isfinite(logprob[0, 2:]).all()


def placed(mesh, split, hidden, embedding, targets, cotangent):
    def place(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return (
        place(hidden, "data", "context"),
        place(embedding, "tensor", split.embed),
        place(targets, "data", "context"),
        place(cotangent, "data", "context"),
    )


def mesh_of(*sizes):
    names = ("data", "context", "tensor")
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("path", "sizes", "embed"),
    [
        ("xla", (2, 2, 2), ("data", "context")),
        ("xla", (2, 2, 2), ("data",)),
        ("xla", (1, 4, 2), ("context",)),
        ("xla", (1, 1, 8), ()),
        ("xla", (4, 2, 1), ("data", "context")),
        ("tpu", (2, 2, 2), ("data", "context")),
    ],
)
def test_eight_devices_give_what_one_gives(path, sizes, embed):
    mesh, split = mesh_of(*sizes), dataclasses.replace(SPLIT, embed=embed)
    batch, length, size, vocab = {"xla": (4, 20, 8, 48), "tpu": (2, 60, 64, 304)}[path]
    arrays = inputs((batch, length, size, vocab))
    # Of the first device of the vocabulary, of the last, and on the border between two.
    arrays[2][0, :4] = 0, vocab - 1, vocab // 2 - 1, vocab // 2
    given_ = {"softcap": 3.0, "temperature": temperatures((batch, length))}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        got = with_gradients(*placed(mesh, split, *arrays), **PATHS[path], **given_, split=split)
    assert_close(got, oracle(*arrays, **given_))
    assert got[3].sharding.is_equivalent_to(
        NamedSharding(mesh, PartitionSpec("tensor", embed)), ndim=2
    )


@pytest.mark.parametrize("embed", [("data", "context"), ("data",), ("context",)])
def test_a_gradient_that_is_summed_in_pieces_is_that_of_one(embed):
    """Two axes to sum over, so two pieces a part; the last part has one."""
    mesh, split = mesh_of(2, 2, 2), dataclasses.replace(SPLIT, embed=embed)
    arrays = inputs((2, 60, 8, 2 * 9 * 256 + 2 * 256 // 2))
    chosen = PATHS["tpu"] | {"softcap": 3.0}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        given_ = placed(mesh, split, *arrays)
        program = str(
            jax.make_jaxpr(functools.partial(with_gradients, **chosen, split=split))(*given_)
        )
        got = with_gradients(*given_, **chosen, split=split)
    assert program.count("name=logprob_of_embedding") == 10
    assert_close(got, oracle(*arrays, softcap=3.0))


def test_over_a_mesh_only_the_embedding_is_gathered_and_gradients_go_over_it_once():
    mesh = mesh_of(2, 2, 2)
    arrays = placed(mesh, SPLIT, *inputs((4, 2048, 16, 4096)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = _with_gradients.lower(
            *arrays, 1.0, token_logprobs, (*PATHS["xla"].items(), ("split", SPLIT))
        ).compile()
    text = compiled.as_text()
    gathered = re.findall(r" = (\S+)\{\S* all-gather\(", text)
    # Over one axis of the mesh, then over the other; and once more for the gradients.
    assert set(gathered) == {"f32[2048,8]", "f32[2048,16]"}, gathered
    assert " while(" in text
    bodies = text.split("ENTRY")[0]
    assert not any(f" {name}(" in bodies for name in ("all-reduce", "reduce-scatter"))


def test_memory_does_not_grow_with_the_vocabulary_but_for_the_embedding_and_its_gradient():
    def temporary(vocab):
        shapes = (
            jax.ShapeDtypeStruct((4, 2048, 16), jnp.float32),
            jax.ShapeDtypeStruct((vocab, 16), jnp.float32),
            jax.ShapeDtypeStruct((4, 2048), jnp.int32),
            jax.ShapeDtypeStruct((4, 2048), jnp.float32),
        )
        given_ = (*ON_CPU.items(), ("blocks", LogitBlocks(64, 512)))
        compiled = _with_gradients.lower(*shapes, 1.0, token_logprobs, given_).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = 4096, 65536
    of_embedding = (large - small) * 16 * 4
    assert temporary(large) - temporary(small) <= 2 * of_embedding
    assert temporary(small) < 4 * 2048 * small * 4 / 16


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden": jnp.zeros((21, 8))}, r"hidden must be \[B, S, D\]"),
        ({"embedding": jnp.zeros((8, 48))}, r"embedding \[V, D\]"),
        ({"embedding": jnp.zeros((0, 8))}, "no dim of hidden and embedding may be 0"),
        ({"targets": jnp.zeros((4, 20), int)}, r"targets must be integers \(4, 21\)"),
        ({"targets": jnp.zeros((4, 21))}, "targets must be integers"),
        ({"embedding": jnp.zeros((48, 8), jnp.bfloat16)}, "one floating-point type.*cast"),
        ({"hardware": "cpu"}, "hardware is 'cpu'; give a Hardware"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": np.ones(21)}, r"a number, or \(4, 21\) like the tokens.*not \(21,\)"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be above 0, or None for none"),
        ({"blocks": LogitBlocks(0, 8)}, "each must be 1 or more"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_sentence(change, sentence):
    hidden, embedding, targets, _ = inputs(SHAPES["xla"])
    arguments = {"hidden": hidden, "embedding": embedding, "targets": targets, **ON_CPU}
    with pytest.raises(ValueError, match=sentence):
        token_logprobs(**(arguments | change))


def test_what_the_kernels_for_tpu_lack_is_refused_in_one_sentence():
    hidden, embedding, targets, _ = inputs(SHAPES["xla"])
    chip = {"hardware": hardware("v5p"), "interpret": True}
    with pytest.raises(ValueError, match="blocks that 128 divides"):
        token_logprobs(hidden, embedding, targets, **chip, blocks=LogitBlocks(128, 100))
    half = hidden.astype(jnp.float16), embedding.astype(jnp.float16)
    with pytest.raises(ValueError, match="takes float32 and bfloat16, not float16: cast"):
        token_logprobs(*half, targets, **chip)
    wide = jnp.zeros((1, 1, 1 << 17)), jnp.zeros((8, 1 << 17)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"no block fits into .* bytes of VMEM: use a smaller D"):
        token_logprobs(*wide, **chip)


def test_an_embedding_split_over_other_axes_than_the_rows_is_refused():
    with pytest.raises(ValueError, match="must be among the axes of the rows and tokens"):
        VocabularySplit(("data",), "context", "tensor", embed=("expert",))
