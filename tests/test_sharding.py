"""The mesh, the rules, and that nothing is ever whole on one device."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from agentx.model import ModelConfig, abstract_transformer, init_params
from agentx.optim import OptimizerConfig, make_optimizer
from agentx.sharding import MeshConfig, batch_sharding, check_batch, make_mesh, spec, tree_shardings
from agentx.step import abstract_state, init_state

TINY = ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48
)


@functools.cache
def mesh(**sizes):
    return make_mesh(MeshConfig(**sizes))


@functools.cache
def fresh_state():
    optimizer = make_optimizer(OptimizerConfig(), 10)
    fsdp = mesh(data=1, fsdp=4, tensor=2)
    return init_state(abstract_transformer(TINY), optimizer, fsdp, jax.random.key(0))


def test_one_mesh_axis_may_take_the_devices_that_are_left():
    made = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(made.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1, "expert": 1}
    assert make_mesh(MeshConfig(), jax.devices()[:3]).shape["data"] == 3


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, "a mesh of data=3, fsdp=1, .* does not divide 8 devices"),
        ({"data": 2, "tensor": 2}, "does not divide 8 devices: the sizes must multiply to 8"),
        ({"data": -1, "tensor": 16}, "does not divide 8 devices"),
        ({"data": -1, "fsdp": -1}, "only one mesh axis can be -1"),
        ({"context": 0}, "mesh axes must have 1 or more devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(MeshConfig(**sizes))


def test_logical_axes_become_mesh_axes():
    shape = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert spec(("layers", "embed", "mlp"), (3, 32, 48), shape) == P(None, "fsdp", "tensor")
    over_tokens = shape | {"context": 4}
    assert spec(("embed", "mlp"), (32, 48), over_tokens) == P(("fsdp", "context"), "tensor")
    assert spec(("batch", "sequence", None), (8, 5, 9), shape) == P(("data", "fsdp"), None, None)
    # The expert axis is one more of data parallelism, but for experts themselves.
    with_experts = {"data": 2, "fsdp": 2, "expert": 2}
    assert spec(("batch",), (8,), with_experts) == P(("data", "fsdp", "expert"))
    assert spec(("embed", "routes"), (32, 8), with_experts) == P(("fsdp", "expert"), None)
    experts = ("layers", "experts", "expert_embed", "mlp")
    assert spec(experts, (3, 8, 32, 48), with_experts) == P(None, "expert", "fsdp", None)


@pytest.mark.parametrize(
    ("axes", "shape", "words"),
    [
        (("embed", "batch"), (8, 8), "mesh axis 'fsdp' would split both 'embed' and 'batch'"),
        (("heads", "mlp"), (8, 8), "mesh axis 'tensor' would split both 'heads' and 'mlp'"),
        (("kv_heads",), (3,), "axis 'kv_heads' has size 3, which 2 devices .tensor. do not divide"),
        (("batch",), (6,), "axis 'batch' has size 6, which 4 devices .data x fsdp. do not divide"),
        (("colour",), (8,), "axis 'colour' has no rule"),
    ],
)
def test_collisions_and_remainders_are_refused(axes, shape, words):
    with pytest.raises(ValueError, match=words):
        spec(axes, shape, {"data": 2, "fsdp": 2, "tensor": 2})


def test_a_parameter_that_does_not_divide_is_named():
    params = jax.eval_shape(lambda k: init_params(abstract_transformer(TINY), k), jax.random.key(0))
    with pytest.raises(ValueError, match=r"'attention'.*'w_k'.*'kv_heads' has size 2, which 4"):
        tree_shardings(params, mesh(fsdp=2, tensor=4, data=1))


def test_a_batch_that_does_not_divide_is_refused():
    check_batch((8, 6), mesh(data=2, fsdp=2, context=2), 2)
    with pytest.raises(ValueError, match="a batch of 8 rows of 7 tokens does not divide"):
        check_batch((8, 7), mesh(data=2, fsdp=2, context=2))
    with pytest.raises(ValueError, match="does not divide into 4 micro-batches"):
        check_batch((8, 8), mesh(data=2, fsdp=2, context=2), 4)
    with pytest.raises(ValueError, match="their rows over data=2 x fsdp=1 x expert=4 devices"):
        check_batch((4, 8), mesh(data=2, expert=4))
    assert batch_sharding(mesh(data=2, fsdp=2, context=2)).shard_shape((8, 6)) == (2, 3)
    assert batch_sharding(mesh(data=2, expert=4)).shard_shape((8, 6)) == (1, 6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_and_moments_are_born_sharded(name):
    model = abstract_transformer(TINY)
    optimizer = make_optimizer(OptimizerConfig(name=name), 10)
    fsdp = mesh(data=1, fsdp=4, tensor=2)
    before = {id(x) for x in jax.live_arrays()}
    state = init_state(model, optimizer, fsdp, jax.random.key(0))
    # No array that came into being, kept or not, has a whole matrix on a device.
    born = [x for x in jax.live_arrays() if id(x) not in before and x.size >= 1024]
    assert len(born) > 2 * 7  # more than the matrices and one moment of each
    for array in born:
        assert {shard.data.size for shard in array.addressable_shards} <= {
            array.size // 8,
            array.size // 4,
        }
    up = state.params["layers"][0]["mlp"]["w_up"][...]
    assert up.sharding.spec == P(None, "fsdp", "tensor")
    assert up.addressable_shards[0].data.shape == (2, 8, 24)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == up.shape]
    assert moments
    assert all(x.sharding == up.sharding for x in moments)


def test_the_program_that_makes_parameters_never_holds_one_whole():
    shardings = tree_shardings(
        jax.eval_shape(lambda k: init_params(abstract_transformer(TINY), k), jax.random.key(0)),
        mesh(data=1, fsdp=4, tensor=2),
    )

    def init(key):
        return init_params(abstract_transformer(TINY), key)

    program = jax.jit(init, out_shardings=shardings).lower(jax.random.key(0)).compile().as_text()
    assert "f32[2,8,24]" in program  # a device's part of w_gate and w_up
    assert "f32[2,32,48]" not in program
    assert "u32[2,32,48]" not in program


def test_fresh_parameters_do_not_depend_on_the_mesh():
    one = jax.tree.leaves(init_params(abstract_transformer(TINY), jax.random.key(0)))
    for a, b in zip(one, jax.tree.leaves(fresh_state().params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_the_abstract_state_describes_the_real_one():
    model = abstract_transformer(TINY)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    fsdp = mesh(data=1, fsdp=4, tensor=2)
    abstract = abstract_state(model, optimizer, fsdp)
    real = fresh_state()
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim)
