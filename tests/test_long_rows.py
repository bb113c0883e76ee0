"""Rows of many blocks: on several devices, in an order of equal work, and as trees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agentx.batch import Batch
from agentx.losses import PolicyGradientLoss
from agentx.model import ModelConfig, abstract_transformer
from agentx.model.transformer import init_params
from agentx.optim import Optimizer
from agentx.sharding import MeshConfig, make_mesh, tree_shardings
from agentx.step import TrainState, make_score_step, make_train_step
from agentx_kernels.blocks import block_config
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import ROOT, causal, prefix_tree
from agentx_kernels.plan import make_plan, visited_blocks

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=16,
)
SGD = Optimizer(optax.sgd(1.0), lambda step: jnp.float32(1.0))
ROWS, LENGTH = 2, 1024


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH), np.int32)
    trees = [
        [(300, ROOT), (200, 0), (150, 0), (100, 0), (250, ROOT)],
        [(40, ROOT), (700, 0), (200, 1)],
    ]
    return Batch(
        tokens,
        np.roll(tokens, -1, 1),
        rng.random((ROWS, LENGTH), np.float32),
        prefix_tree(trees, LENGTH),
        from_policy=(rng.random((ROWS, LENGTH)) < 0.5).astype(np.float32),
        advantages=rng.standard_normal((ROWS, LENGTH)).astype(np.float32),
        sampler_logprobs=-5 * rng.random((ROWS, LENGTH)).astype(np.float32),
    )


def run(config, mesh, batch):
    """(loss, gradients, log-probabilities) on the host."""
    model = abstract_transformer(config)
    params = jax.device_get(init_params(model, jax.random.key(0)))
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.array, params), SGD.transform.init(params))
    state = jax.device_put(state, tree_shardings(state, mesh))
    logprobs, _ = make_score_step(model, mesh)(state.params, batch)
    logprobs = jax.device_get(logprobs)
    new, metrics = make_train_step(model, PolicyGradientLoss(), SGD, mesh)(state, batch)
    gradients = jax.tree.map(np.subtract, params, jax.device_get(new.params))
    return float(metrics["loss"]), gradients, logprobs


@functools.cache
def on_one_device():
    return run(CONFIG, make_mesh(MeshConfig(), jax.devices()[:1]), batch())


@pytest.mark.parametrize("strategy", ["all_gather", "ring", "usp", "ulysses"])
def test_tokens_over_devices_train_as_on_one(strategy):
    context = 2 if strategy == "ulysses" else 4
    mesh = make_mesh(MeshConfig(data=2, context=context), jax.devices()[: 2 * context])
    config = dataclasses.replace(CONFIG, context_parallel=strategy)
    loss, gradients, logprobs = run(config, mesh, batch())
    want_loss, want_gradients, want_logprobs = on_one_device()
    assert loss == pytest.approx(want_loss, abs=1e-6)
    np.testing.assert_allclose(logprobs, want_logprobs, rtol=0, atol=2e-6)
    assert_close(gradients, want_gradients)


def assert_close(gradients, want_gradients):
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1, np.abs(want).max()))


@pytest.mark.parametrize(
    ("strategy", "is_ordered"), [("all_gather", True), ("ring", True), ("ulysses", False)]
)
def test_tokens_are_put_in_an_order_of_equal_work_where_devices_have_different_work(
    strategy, is_ordered
):
    config = dataclasses.replace(CONFIG, context_parallel=strategy)
    mesh = make_mesh(MeshConfig(context=2), jax.devices()[:2])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        order = jax.eval_shape(abstract_transformer(config).balanced_order, batch().layout)
    assert (order is not None) == is_ordered


def group(as_tree):
    """A prompt of 385 tokens and four answers of 255: as one tree, or a row for each.

    In the tree every answer begins with a copy of the prompt's last token, which has the answer's
    first for its target.
    """
    rng = np.random.default_rng(2)
    prompt = rng.integers(0, CONFIG.vocab_size, 385, np.int32)
    answers = rng.integers(0, CONFIG.vocab_size, (4, 255), np.int32)
    advantages = [1.0, -0.5, 2.0, -1.5]
    if as_tree:
        layout = prefix_tree([[(384, ROOT), *[(256, 0)] * 4]], 1408)
        places = [(0, 384 + 256 * i) for i in range(4)]
    else:
        layout, places = causal(4, 640), [(i, 384) for i in range(4)]
    tokens = np.zeros(layout.index.shape, np.int32)
    targets, weights = tokens.copy(), np.zeros(tokens.shape, np.float32)
    advantage = weights.copy()
    tokens[:, :384] = prompt[:384]
    for (row, start), answer, value in zip(places, answers, advantages, strict=True):
        tokens[row, start : start + 256] = [prompt[-1], *answer]
        targets[row, start : start + 255] = answer
        weights[row, start : start + 255] = 1
        advantage[row, start : start + 255] = value
    return Batch(tokens, targets, weights, layout, advantages=advantage)


def test_a_group_as_one_tree_trains_as_its_rows_and_visits_fewer_blocks():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tree, rows = group(as_tree=True), group(as_tree=False)
    loss, gradients, _ = run(CONFIG, mesh, tree)
    want_loss, want_gradients, _ = run(CONFIG, mesh, rows)
    assert loss == pytest.approx(want_loss, abs=1e-6)
    assert_close(gradients, want_gradients)

    def visits(layout):
        config = block_config(hardware("cpu"), layout.index.shape[1])
        return int(visited_blocks(make_plan(layout, config=config)).sum())

    # 3 blocks of prompt, seen once or four times by 2 blocks of each answer.
    assert visits(tree.layout) == 6 + 4 * (2 * 3 + 3)
    assert visits(rows.layout) == 4 * 15
