"""The train step of a model with experts: meshes, balance, statistics, replayed routing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from agentx.batch import Batch
from agentx.losses import NextTokenLoss
from agentx.model import ModelConfig, abstract_transformer, init_params
from agentx.model.moe_config import MoEConfig
from agentx.optim import Optimizer, OptimizerConfig, make_optimizer
from agentx.sharding import MeshConfig, make_mesh, tree_shardings
from agentx.step import TrainState, make_train_step
from agentx_kernels.layout import packed

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    num_dense_layers=1,
    window_pattern=(5, None),
    moe=MoEConfig(8, 2, 24, "sigmoid", normalize=True, shared_d_ff=16),
)
SGD = Optimizer(optax.sgd(1.0), lambda step: jnp.float32(1.0))


def balanced(**changes):
    return dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, **changes))


@functools.cache
def initial_params(config):
    return jax.device_get(init_params(abstract_transformer(config), jax.random.key(0)))


def random_batch(experts=None):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (8, 16), np.int32)
    weights = (rng.random((8, 16)) < 0.7).astype(np.float32)
    layout = packed([[8, 4]] * 8, 16)
    return Batch(tokens, np.roll(tokens, -1, 1), weights, layout, experts=experts)


def update(config, batch, num_devices=1, optimizer=SGD, num_micro_batches=1, **sizes):
    """(metrics, parameters before less after), on the host."""
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:num_devices])
    model = abstract_transformer(config)
    step = make_train_step(
        model, NextTokenLoss(), optimizer, mesh, num_micro_batches=num_micro_batches
    )
    params = jax.tree.map(jnp.array, initial_params(config))
    state = TrainState(jnp.int32(0), params, optimizer.transform.init(params))
    state, metrics = step(jax.device_put(state, tree_shardings(state, mesh)), batch)
    moved = jax.tree.map(np.subtract, initial_params(config), jax.device_get(state.params))
    return {name: float(value) for name, value in metrics.items()}, moved


@functools.cache
def on_one_device():
    return update(CONFIG, random_batch())


def assert_same(actual, expected):
    # How a mesh's buffers fare is no matter of what is computed.
    numbers = [
        {k: v for k, v in x[0].items() if k != "router/overflowed"} for x in (actual, expected)
    ]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)
    for a, b in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected[1])) > 1e-3


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "expert": 4}, {"expert": 2, "context": 2, "tensor": 2, "data": 1}]
)
def test_eight_devices_agree_with_one(sizes):
    assert_same(update(CONFIG, random_batch(), 8, **sizes), on_one_device())


def test_micro_batches_do_not_change_the_update():
    assert_same(update(CONFIG, random_batch(), num_micro_batches=4), on_one_device())


def test_the_metrics_tell_of_the_routers():
    metrics, _ = on_one_device()
    assert 0 < metrics["router/entropy"] <= np.log(8) + 1e-6
    assert 1 < metrics["router/max_load"] < 4
    assert metrics["router/idle_experts"] == metrics["router/overflowed"] == 0
    assert metrics["router/balance_loss"] == 0


def test_the_balance_loss_is_added_and_reaches_the_router():
    plain = on_one_device()
    metrics, moved = update(balanced(balance="loss", balance_rate=0.1), random_batch())
    # At least the rate, of each of two layers.
    assert metrics["router/balance_loss"] > 0.2
    assert metrics["loss"] == pytest.approx(
        plain[0]["loss"] + metrics["router/balance_loss"], abs=1e-5
    )
    routers = [x["layers"][1]["moe"]["w_router"][...] for x in (moved, plain[1])]
    assert np.abs(routers[0] - routers[1]).max() > 1e-4


def test_a_step_moves_the_correction_bias_toward_an_even_load_and_nothing_else_does():
    config = balanced(balance="bias", balance_rate=0.125)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=1.0), 4
    )
    for mesh in ({}, {"num_devices": 8, "data": 2, "expert": 4}):
        _, moved = update(config, random_batch(), optimizer=optimizer, **mesh)
        model = abstract_transformer(config)
        batch = random_batch()
        graphdef = nnx.graphdef(model)
        params = initial_params(config)
        forward = nnx.merge(graphdef, params)(jnp.asarray(batch.tokens), batch.layout)
        tokens_LE = np.asarray(forward.routing.tokens_E)
        for place in (1, 2):  # of a dense layer, and of two that have windows in turn
            found = -moved["layers"][place]["moe"]["correction_bias"][...][0]
            load_E = tokens_LE[place - 1]
            np.testing.assert_allclose(found, 0.125 * np.sign(load_E.mean() - load_E))


def test_experts_that_are_given_are_taken_again():
    batch = random_batch()
    model = nnx.merge(nnx.graphdef(abstract_transformer(CONFIG)), initial_params(CONFIG))
    experts = model(jnp.asarray(batch.tokens), batch.layout).experts
    assert experts.shape == (8, 16, 2, 2)
    again = update(CONFIG, random_batch(experts))
    assert_same(again, on_one_device())
    # Others are taken where others are given, on a mesh as on one device.
    others = (experts + 1) % 8
    on_one = update(CONFIG, random_batch(others), num_micro_batches=2)
    assert abs(on_one[0]["loss"] - again[0]["loss"]) > 1e-4
    assert_same(update(CONFIG, random_batch(others), 8, expert=4, context=2), on_one)
