"""Experts that the sampler took are those that the trainer takes again: rows, trees, mixtures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agentx.batch import Batch
from agentx.data.pack import pack_groups
from agentx.model import ModelConfig, abstract_transformer, init_params
from agentx.model.moe_config import MoEConfig
from agentx.sample import Engine, SamplingParams
from agentx.sharding import MeshConfig, make_mesh
from agentx.source import concatenate
from agentx.trajectory import Origin, Role, Span, Trajectory
from agentx_kernels.layout import causal, packed

CONFIG = ModelConfig(
    vocab_size=96,
    d_model=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    num_dense_layers=1,
    window_pattern=(9, None),
    moe=MoEConfig(8, 2, 24, "softmax", normalize=True),
    max_length=64,
)
PROMPT = list(range(10, 24))


@functools.cache
def params():
    fresh = init_params(abstract_transformer(CONFIG), jax.random.key(0))
    return jax.tree.map(lambda x: 2 * x, fresh)


@functools.cache
def model():
    return nnx.merge(nnx.graphdef(abstract_transformer(CONFIG)), params())


@functools.cache
def sampled(num_devices=1):
    """Two sessions of one prompt, two turns each: (ids, experts) of both."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:num_devices])
    engine = Engine(CONFIG, num_slots=8, max_length=64, mesh=mesh, stop_ids=(5,), seed=1)
    engine.set_params(params(), version=0)
    sessions = engine.open(PROMPT, [0, 1])
    for session in sessions:
        engine.submit(session, (), 6)
    turns = 0
    while turns < 4:
        for session, _ in engine.step():
            turns += 1
            if len(session.ids) < 28:
                engine.submit(session, [30, 31, 32], 9, SamplingParams(temperature=1.0))
    return [(session.ids, session.experts) for session in sessions]


@nnx.jit
def routed(model, tokens, layout, experts=None):
    return model(tokens, layout, experts).experts


@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_session_s_experts_are_those_that_the_trainer_s_router_chooses(num_devices):
    for ids, experts in sampled(num_devices):
        assert experts.shape == (len(ids) - 1, 2, 2)
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids
        wanted = routed(model(), jnp.asarray(tokens), causal(1, 64))[0, : len(ids) - 1]
        # Scores that are alike to the last bits may fall either way.
        assert np.mean(np.asarray(wanted) == experts) > 0.99


def trajectories():
    made = []
    for ids, experts in sampled():
        is_sampled = [False] * len(PROMPT) + [True] * (len(ids) - len(PROMPT))
        spans = [
            Span(Role.USER, ids[: len(PROMPT)]),
            Span(
                Role.ANSWER,
                ids[len(PROMPT) :],
                Origin.SAMPLED,
                logprobs=np.zeros(sum(is_sampled), np.float32),
            ),
        ]
        made.append(Trajectory(spans, num_prompt_spans=1, experts=experts))
    return made


@pytest.mark.parametrize("tree", [True, False])
def test_packed_experts_stand_at_the_tokens_that_took_them(tree):
    batch = pack_groups([trajectories()], [[1.0, -1.0]], 2, 64, tree=tree)
    assert batch.experts.shape == (2, 64, 2, 2)
    wanted = routed(model(), jnp.asarray(batch.tokens), jax.tree.map(jnp.asarray, batch.layout))
    used = np.asarray(batch.layout.subtree_end) > 0
    assert (batch.experts[~used] == -1).all()
    assert np.mean(np.asarray(wanted)[used] == batch.experts[used]) > 0.99


def test_the_router_chooses_where_nothing_was_recorded():
    batch = pack_groups([trajectories()], [[1.0, -1.0]], 1, 64)
    data = Batch(
        np.arange(64, dtype=np.int32)[None],
        np.zeros((1, 64), np.int32),
        np.ones((1, 64), np.float32),
        packed([[64]], 64),
        batch.from_policy,
        batch.advantages,
        batch.sampler_logprobs,
        experts=np.full_like(batch.experts, -1),
    )
    shifted = np.where(batch.experts >= 0, (batch.experts + 1) % 8, -1)
    both = concatenate(data, batch._replace(experts=shifted))
    layout = jax.tree.map(jnp.asarray, both.layout)
    taken = np.asarray(routed(model(), jnp.asarray(both.tokens), layout, jnp.asarray(both.experts)))
    free = np.asarray(routed(model(), jnp.asarray(both.tokens), layout))
    np.testing.assert_array_equal(taken[0], free[0])
    used = both.experts[1] >= 0
    np.testing.assert_array_equal(taken[1][used], both.experts[1][used])
    assert (taken[1][used] != free[1][used]).mean() > 0.5
