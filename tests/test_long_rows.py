"""Rows whose tokens lie on several devices, in an order of equal work: they train as on one."""

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
from agentx_kernels.layout import ROOT, prefix_tree

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


def run(config, mesh):
    """(loss, gradients, log-probabilities) on the host."""
    model = abstract_transformer(config)
    params = jax.device_get(init_params(model, jax.random.key(0)))
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.array, params), SGD.transform.init(params))
    state = jax.device_put(state, tree_shardings(state, mesh))
    logprobs, _ = make_score_step(model, mesh)(state.params, batch())
    logprobs = jax.device_get(logprobs)
    new, metrics = make_train_step(model, PolicyGradientLoss(), SGD, mesh)(state, batch())
    gradients = jax.tree.map(np.subtract, params, jax.device_get(new.params))
    return float(metrics["loss"]), gradients, logprobs


@functools.cache
def on_one_device():
    return run(CONFIG, make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize("strategy", ["all_gather", "ring", "usp", "ulysses"])
def test_tokens_over_devices_train_as_on_one(strategy):
    context = 2 if strategy == "ulysses" else 4
    mesh = make_mesh(MeshConfig(data=2, context=context), jax.devices()[: 2 * context])
    config = dataclasses.replace(CONFIG, context_parallel=strategy)
    loss, gradients, logprobs = run(config, mesh)
    want_loss, want_gradients, want_logprobs = on_one_device()
    assert loss == pytest.approx(want_loss, abs=1e-6)
    np.testing.assert_allclose(logprobs, want_logprobs, rtol=0, atol=2e-6)
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
