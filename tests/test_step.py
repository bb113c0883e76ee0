"""The train step: however a batch is cut, packed or sharded, the update is the same.

Gradients are read off an update by plain gradient descent at rate 1: parameters before less after.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from agentx.batch import Batch
from agentx.losses import NextTokenLoss, PolicyGradientLoss
from agentx.model import ModelConfig, abstract_transformer
from agentx.optim import Optimizer, OptimizerConfig, make_optimizer, make_schedule
from agentx.sharding import MeshConfig, make_mesh, tree_shardings
from agentx.step import TrainState, init_state, make_score_step, make_train_step
from agentx_kernels.layout import ROOT, packed, prefix_tree

TINY = ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48
)
SGD = Optimizer(optax.sgd(1.0), lambda step: jnp.float32(1.0))


@functools.cache
def mesh(num_devices=1, **sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:num_devices])


@functools.cache
def step_of(loss, mesh, num_micro_batches=1):
    return make_train_step(
        abstract_transformer(TINY), loss, SGD, mesh, num_micro_batches=num_micro_batches
    )


@functools.cache
def initial_params():
    state = init_state(abstract_transformer(TINY), SGD, mesh(), jax.random.key(0))
    return jax.device_get(state.params)


def initial_state(mesh):
    """The same parameters every time, laid out over the mesh."""
    params = initial_params()
    params = jax.tree.map(jnp.array, params)  # the step donates what it is given
    opt_state = SGD.transform.init(params)
    state = TrainState(jnp.int32(0), params, opt_state)
    return jax.device_put(state, tree_shardings(state, mesh))


def update(loss, batch, mesh, num_micro_batches=1):
    """(metrics, gradients) of one step from the same parameters, on the host."""
    state, metrics = step_of(loss, mesh, num_micro_batches)(initial_state(mesh), batch)
    gradients = jax.tree.map(np.subtract, initial_params(), jax.device_get(state.params))
    return {name: float(value) for name, value in metrics.items()}, gradients


def assert_same(actual, expected, tolerance=1e-5):
    assert actual[0]["loss"] == pytest.approx(expected[0]["loss"], abs=tolerance)
    pairs = zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=tolerance)
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected[1])) > 100 * tolerance


def random_batch(rows=8, length=16, seed=0):
    """Data and rollouts mixed, two documents a row, weights of all sizes."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, TINY.vocab_size, (rows, length), np.int32)
    return Batch(
        tokens,
        np.roll(tokens, -1, 1),
        (rng.random((rows, length)) * (rng.random((rows, length)) < 0.7)).astype(np.float32),
        packed([[length // 2, length // 4]] * rows, length),
        from_policy=(rng.random((rows, length)) < 0.5).astype(np.float32),
        advantages=rng.standard_normal((rows, length)).astype(np.float32),
        sampler_logprobs=-5 * rng.random((rows, length)).astype(np.float32),
    )


GRPO = PolicyGradientLoss(importance_cap=2.0, negative_scale=0.5)


@functools.cache
def on_one_device():
    return update(GRPO, random_batch(), mesh())


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 1, "fsdp": 4, "tensor": 2},
        {"data": 2, "fsdp": 2, "context": 2},
        {"data": 1, "expert": 4, "tensor": 2},
    ],
)
def test_eight_devices_agree_with_one(sizes):
    actual = update(GRPO, random_batch(), mesh(8, **sizes))
    assert_same(actual, on_one_device())
    assert actual[0] == pytest.approx(on_one_device()[0], abs=1e-5)


def test_micro_batches_do_not_change_the_update():
    actual = update(GRPO, random_batch(), mesh(), num_micro_batches=4)
    assert_same(actual, on_one_device())
    assert actual[0] == pytest.approx(on_one_device()[0], abs=1e-5)


def test_micro_batches_over_eight_devices_do_not_change_the_update():
    actual = update(GRPO, random_batch(), mesh(8, data=2, tensor=2, context=2), 2)
    assert_same(actual, on_one_device())


def next_tokens(rows, layout):
    """Rows of documents of token ids; every token of a document but its last has a target."""
    tokens = np.zeros((3, 16), np.int32)
    targets, weights = tokens.copy(), np.zeros(tokens.shape, np.float32)
    for row, documents in enumerate(rows):
        column = 0
        for ids in documents:
            tokens[row, column : column + len(ids)] = ids
            targets[row, column : column + len(ids) - 1] = ids[1:]
            weights[row, column : column + len(ids) - 1] = 1
            column += len(ids)
    return Batch(tokens, targets, weights, layout)


def test_a_packed_row_is_its_documents_trained_apart():
    rng = np.random.default_rng(1)
    a, b, c = (rng.integers(0, 64, n) for n in (5, 3, 6))
    together = next_tokens([[a, b, c]], packed([[5, 3, 6], [], []], 16))
    apart = next_tokens([[a], [b], [c]], packed([[5], [3], [6]], 16))
    loss = NextTokenLoss()
    assert_same(update(loss, together, mesh()), update(loss, apart, mesh()))


PROMPT = [11, 12, 13, 14]
BRANCHES = [[21, 22], [31, 32, 33], [41]]
ADVANTAGES = [1.0, -0.5, 2.0]


def rollouts(pieces, layout):
    """Token ids from given places, [(row, column, ids, how many of them are prompt, advantage)]."""
    tokens, targets = np.zeros((3, 16), np.int32), np.zeros((3, 16), np.int32)
    weights, advantages = np.zeros((3, 16), np.float32), np.zeros((3, 16), np.float32)
    for row, column, ids, num_prompt, advantage in pieces:
        tokens[row, column : column + len(ids)] = ids
        trained = slice(column + num_prompt - 1, column + len(ids) - 1)
        targets[row, trained] = ids[num_prompt:]
        weights[row, trained] = 1
        advantages[row, trained] = advantage
    return Batch(tokens, targets, weights, layout, advantages=advantages)


def test_a_prefix_tree_is_its_branches_as_rows_of_their_own():
    # The tree: 11 12 13 | 14 21 22 | 14 31 32 33 | 14 41. Each branch begins with its own copy of
    # the prompt's last token, which has the branch's first token for its target.
    runs = [(3, ROOT), *((1 + len(branch), 0) for branch in BRANCHES)]
    starts = np.cumsum([tokens for tokens, _ in runs])
    pieces = [(0, 0, PROMPT[:3], 3, 0.0)]
    for start, branch, advantage in zip(starts[:-1], BRANCHES, ADVANTAGES, strict=True):
        pieces.append((0, start, PROMPT[-1:] + branch, 1, advantage))
    tree = rollouts(pieces, prefix_tree([runs, [], []], 16))

    pieces = [
        (row, 0, PROMPT + branch, 4, advantage)
        for row, (branch, advantage) in enumerate(zip(BRANCHES, ADVANTAGES, strict=True))
    ]
    rows = rollouts(pieces, packed([[4 + len(branch)] for branch in BRANCHES], 16))

    assert tree.weights.sum() == rows.weights.sum() == 6
    loss = PolicyGradientLoss()
    assert_same(update(loss, tree, mesh()), update(loss, rows, mesh()))


def test_grpo_at_ratio_one_has_the_gradient_of_the_advantage_weighted_loss():
    batch = random_batch(rows=3)
    advantages = np.abs(batch.advantages)
    grpo = Batch(*batch[:4], advantages=advantages)
    # Weights say the same, but for the sum that they are divided by.
    scale = (batch.weights * advantages).sum() / batch.weights.sum()
    data = Batch(*batch[:4])._replace(weights=batch.weights * advantages)
    gradients = update(PolicyGradientLoss(), grpo, mesh())[1]
    expected = update(NextTokenLoss(), data, mesh())[1]
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b * scale, atol=1e-5)


def test_a_batch_without_weight_gives_no_gradient_and_no_nan():
    batch = random_batch()
    metrics, gradients = update(GRPO, batch._replace(weights=np.zeros_like(batch.weights)), mesh())
    assert metrics["loss"] == 0
    assert metrics["weight_sum"] == metrics["tokens"] == metrics["grad_norm"] == 0
    assert all((x == 0).all() for x in jax.tree.leaves(gradients))


def test_metrics_say_what_was_trained():
    metrics, gradients = on_one_device()
    weights = random_batch().weights
    assert metrics["weight_sum"] == pytest.approx(weights.sum(), rel=1e-6)
    assert metrics["tokens"] == (weights > 0).sum()
    assert metrics["learning_rate"] == 1
    square = sum((x**2).sum() for x in jax.tree.leaves(gradients))
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(square), rel=1e-4)
    groups = {"nonfinite/embed", "nonfinite/layers", "nonfinite/final_norm"}
    assert {name for name in metrics if name.startswith("nonfinite")} == groups
    assert all(metrics[name] == 0 for name in groups)


def test_a_gradient_that_is_not_finite_is_named_by_its_group():
    state = initial_state(mesh())
    embed = state.params["embed"]
    embed[...] = embed[...].at[0, 0].set(jnp.inf)
    _, metrics = step_of(GRPO, mesh())(state, random_batch())
    assert metrics["nonfinite/embed"] == 1


def test_the_state_is_donated_and_its_shardings_stay():
    sizes = mesh(8, data=1, fsdp=4, tensor=2)
    state = initial_state(sizes)
    new_state, _ = step_of(GRPO, sizes)(state, random_batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert int(new_state.step) == 1
    spec = new_state.params["layers"][0]["mlp"]["w_down"][...].sharding.spec
    assert spec == jax.sharding.PartitionSpec(None, "tensor", "fsdp")
    step_of(GRPO, sizes)(new_state, random_batch())
    assert step_of(GRPO, sizes).__wrapped__._cache_size() == 1


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    sizes = mesh(8, data=1, fsdp=4, tensor=2)
    state = initial_state(sizes)
    with pytest.raises(ValueError, match="a batch of 6 rows of 16 tokens does not divide"):
        step_of(GRPO, sizes)(state, random_batch(rows=6))


def test_scored_logprobs_are_those_of_the_softmax_at_the_temperature():
    batch = random_batch(rows=2)
    model = abstract_transformer(TINY)
    params = initial_state(mesh()).params
    logprobs, entropy = make_score_step(model, mesh(), temperature=2.0)(params, batch)
    model = nnx.merge(nnx.graphdef(model), params)
    logits = model(batch.tokens, batch.layout).hidden @ model.unembedding().T / 2
    expected = jax.nn.log_softmax(logits)
    at_targets = np.take_along_axis(expected, batch.targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(logprobs, at_targets, atol=1e-5)
    np.testing.assert_allclose(entropy, -(jnp.exp(expected) * expected).sum(-1), atol=1e-5)


def test_bfloat16_trains_and_stays_finite():
    model = abstract_transformer(dataclasses.replace(TINY, dtype="bfloat16"))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3), 8)
    state = init_state(model, optimizer, mesh(), jax.random.key(0))
    step = make_train_step(model, NextTokenLoss(), optimizer, mesh())
    losses = []
    for _ in range(8):
        state, metrics = step(state, random_batch())
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params)))


def test_the_learning_rate_warms_up_and_decays():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=3, schedule="linear", end_fraction=0.2)
    rates = [float(make_schedule(config, 8)(step)) for step in range(8)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    cosine = make_schedule(dataclasses.replace(config, schedule="cosine", warmup_steps=0), 3)
    np.testing.assert_allclose([cosine(step) for step in range(3)], [1, 0.6, 0.2], rtol=1e-6)
    constant = make_schedule(dataclasses.replace(config, schedule="constant"), 8)
    assert float(constant(7)) == 1
    with pytest.raises(ValueError, match="warmup_steps is 3, more than the 2 steps"):
        make_schedule(config, 2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_shrinks_matrices_alone(name):
    config = OptimizerConfig(
        name=name, learning_rate=0.1, schedule="constant", weight_decay=1.0, max_grad_norm=None
    )
    transform = make_optimizer(config, 4).transform
    params = initial_state(mesh()).params
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(transform.update)(zeros, transform.init(params), params)
    layers, moved = params["layers"][0], updates["layers"][0]
    np.testing.assert_allclose(
        moved["mlp"]["w_up"][...], -0.1 * layers["mlp"]["w_up"][...], atol=1e-6
    )
    for norm in (moved["attention_norm"], moved["attention"]["q_norm"], updates["final_norm"]):
        assert (norm["scale"][...] == 0).all()


def test_muon_orthogonalises_each_layer_s_matrix_by_itself():
    config = OptimizerConfig(
        name="muon", learning_rate=1.0, schedule="constant", weight_decay=0.0, max_grad_norm=None
    )
    transform = make_optimizer(config, 4).transform
    params = initial_state(mesh()).params
    # The second layer's gradient is a thousand times the first's; its update must not be.
    grads = jax.tree.map(lambda p: p.at[-1].multiply(1000), params)
    updates, _ = jax.jit(transform.update)(grads, transform.init(params), params)
    for name, inputs, outputs in (("w_q", 32, 32), ("w_k", 32, 16), ("w_o", 32, 32)):
        for matrix in np.asarray(updates["layers"][0]["attention"][name][...]):
            singular = np.linalg.svd(matrix.reshape(inputs, outputs), compute_uv=False)
            size = config.muon_rms * np.sqrt(max(inputs, outputs))
            # Five iterations leave all but the smallest near 1, give or take a third.
            assert 0.6 * size < singular[-3]
            assert singular.max() < 1.3 * size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "adam"}, "optimizer is 'adam'"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"b1": 1.0}, "b1 is 1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ],
)
def test_an_optimizer_out_of_range_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**change)
