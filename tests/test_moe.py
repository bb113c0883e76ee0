"""Mixtures of experts beside a plain sum over all experts, other libraries and other meshes.

Legend as in agentx/model/moe.py. What is compared to more than a few digits is computed in float64.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from agentx.model import ModelConfig
from agentx.model.experts import capacity, sum_of_products
from agentx.model.moe import CorrectionBias, MoE, updated_correction_bias
from agentx.model.moe_config import MoEConfig
from agentx.model.parts import gated
from agentx.optim import OptimizerConfig, make_optimizer
from agentx.sharding import MeshConfig, batch_sharding, make_mesh, tree_shardings

MODEL = ModelConfig(
    vocab_size=8, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=8
)
WIDE = dataclasses.replace(MODEL, param_dtype="float64")
QWEN = MoEConfig(8, 2, 12, "softmax")
MIXTRAL = MoEConfig(8, 2, 12, "softmax", normalize=True)
GPT_OSS = MoEConfig(8, 3, 12, "softmax_of_chosen", router_bias=True, expert_bias=True)
DEEPSEEK = MoEConfig(
    8, 3, 12, "sigmoid", normalize=True, scale=2.5, num_groups=4, groups_per_token=2, shared_d_ff=10
)
EVERYTHING = MoEConfig(
    8,
    2,
    12,
    "sigmoid",
    normalize=True,
    scale=2.5,
    shared_d_ff=8,
    router_bias=True,
    expert_bias=True,
    balance="loss",
    balance_rate=0.5,
)


@functools.cache
def make(config, activation="silu", model=MODEL, layers=1):
    """(graphdef, parameters with leading axis `layers`) at which every bias matters."""
    model = dataclasses.replace(model, moe=config, activation=activation)
    graphdef, params = nnx.split(MoE(nnx.Rngs(0), model, layers))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)
    ]
    return graphdef, jax.tree.unflatten(structure, noisy)


def apply(graphdef, params, x_BSD, **arguments):
    """The first of the layers."""
    return nnx.merge(graphdef, jax.tree.map(lambda w: w[0], params))(x_BSD, **arguments)


def tokens(rows=2, length=12, dtype=jnp.float64, seed=2):
    return jax.random.normal(jax.random.key(seed), (rows, length, MODEL.d_model), dtype)


def chosen_by_hand(config, scores_TE, bias_E):
    """One token after the other, i32[T, k]."""
    chosen = []
    for score_E in np.asarray(scores_TE + bias_E, np.float64):
        members = np.arange(config.num_experts).reshape(config.num_groups, -1)
        best_G = [np.sum(np.sort(score_E[m])[-2:]) for m in members]
        groups = np.argsort(best_G)[::-1][: config.groups_per_token]
        allowed = np.concatenate([members[g] for g in groups])
        chosen.append(allowed[np.argsort(score_E[allowed])[::-1][: config.experts_per_token]])
    return np.array(chosen, np.int32)


def act(activation, gate, up):
    if activation == "silu":
        return gate / (1 + jnp.exp(-gate)) * up
    if activation == "gelu_tanh":
        inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + jnp.tanh(inner)) * up
    gate = jnp.where(gate > 7, 7, gate)
    up = jnp.where(jnp.abs(up) > 7, 7 * jnp.sign(up), up)
    return (up + 1) * gate / (1 + jnp.exp(-1.702 * gate))


def scores_by_hand(config, w, x_TD):
    logits_TE = x_TD @ w["w_router"] + w.get("b_router", 0)
    exp_TE = jnp.exp(logits_TE)
    return {
        "softmax": exp_TE / exp_TE.sum(-1, keepdims=True),
        "softmax_of_chosen": logits_TE,
        "sigmoid": 1 / (1 + jnp.exp(-logits_TE)),
    }[config.scores]


def first_layer(params):
    return jax.tree.map(lambda x: x[0], nnx.to_pure_dict(params))


def by_hand(config, activation, params, x_BSD, chosen_Tk):
    """y: every expert on every token, weighted by a matrix that is mostly 0."""
    w = first_layer(params)
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    is_chosen_TkE = chosen_Tk[..., None] == np.arange(config.num_experts)
    weight_TE = scores_by_hand(config, w, x_TD)
    if config.scores == "softmax_of_chosen":
        weight_TE = jnp.exp(weight_TE)
    weight_TE *= is_chosen_TkE.sum(1)
    if config.normalize or config.scores == "softmax_of_chosen":
        weight_TE /= weight_TE.sum(-1, keepdims=True)
    y_TD = 0.0
    experts = w["experts"]
    for e in range(config.num_experts):
        b = {n: experts[n][e] if n in experts else 0 for n in ("b_gate", "b_up", "b_down")}
        gate = x_TD @ experts["w_gate"][e] + b["b_gate"]
        up = x_TD @ experts["w_up"][e] + b["b_up"]
        out_TD = act(activation, gate, up) @ experts["w_down"][e] + b["b_down"]
        y_TD += config.scale * weight_TE[:, e, None] * out_TD
    if "shared" in w:
        s = w["shared"]
        y_TD += act(activation, x_TD @ s["w_gate"], x_TD @ s["w_up"]) @ s["w_down"]
    return y_TD.reshape(x_BSD.shape)


def assert_trees_close(got, want, atol):
    """Up to atol times the largest number of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        (QWEN, "silu"),
        (MIXTRAL, "gelu_tanh"),
        (GPT_OSS, "clamped_swiglu"),
        (DEEPSEEK, "silu"),
        (dataclasses.replace(GPT_OSS, balance="bias", balance_rate=0.1), "gelu_tanh"),
    ],
    ids=["qwen3", "mixtral", "gpt_oss", "deepseek", "corrected"],
)
def test_outputs_and_gradients_are_those_of_a_sum_over_all_experts(config, activation):
    with jax.enable_x64(True):
        graphdef, params = make(config, activation, WIDE)
        x, dy = 3 * tokens(), tokens(seed=3)

        def ours(params, x):
            y, routing = apply(graphdef, params, x)
            return jnp.sum(y * dy), (y, routing)

        def theirs(params, x):
            y = by_hand(config, activation, params, x, chosen)
            return jnp.sum(y * dy), y

        w = first_layer(params)
        scores_TE = scores_by_hand(config, w, x.reshape(24, -1))
        chosen = chosen_by_hand(config, scores_TE, w.get("correction_bias", 0))
        ours, theirs = (
            jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)) for f in (ours, theirs)
        )
        (_, (y, routing)), grads = ours(params, x)
        (_, want), want_grads = theirs(params, x)
        np.testing.assert_array_equal(
            np.sort(routing.chosen, -1), np.sort(chosen.reshape(2, 12, -1), -1)
        )
        np.testing.assert_allclose(y, want, atol=1e-10)
        assert_trees_close(grads, want_grads, 1e-10)
        counts = np.bincount(chosen.reshape(-1), minlength=config.num_experts)
        np.testing.assert_array_equal(routing.tokens_E, counts)
        assert float(routing.overflowed) == float(routing.balance_loss) == 0


def test_a_gate_beyond_its_limits_is_clamped():
    gate, up = jnp.array([9.0, -9.0, 1.0]), jnp.array([1.0, 9.0, -9.0])
    want = [7 / (1 + np.exp(-1.702 * 7)) * 2, -9 / (1 + np.exp(1.702 * 9)) * 8, 0]
    want[2] = 1 / (1 + np.exp(-1.702)) * -6
    np.testing.assert_allclose(gated("clamped_swiglu", gate, up), want, rtol=1e-6)


@functools.cache
def replaying():
    with jax.enable_x64(True):
        graphdef, params = make(GPT_OSS, "silu", WIDE)

        def ours(params, x, chosen):
            y, routing = apply(graphdef, params, x, chosen_BSk=chosen)
            return jnp.sum(jnp.square(y)), (y, routing.tokens_E)

        def theirs(params, x, chosen):
            y = by_hand(GPT_OSS, "silu", params, x, chosen.reshape(-1, 3))
            return jnp.sum(jnp.square(y)), y

        jitted = (jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)) for f in (ours, theirs))
        return params, *jitted


@settings(max_examples=20, deadline=None)
@given(st.lists(st.permutations(range(8)), min_size=6, max_size=6), st.integers(1, 8))
def test_any_choice_is_computed_and_experts_may_be_idle(orders, num_used):
    """Experts from num_used on come last in a token's order, so few are used where it is small."""
    order = np.array([sorted(o, key=lambda e: e >= num_used) for o in orders], np.int32)
    chosen = order[:, :3].reshape(1, 6, 3)
    params, ours, theirs = replaying()
    with jax.enable_x64(True):
        x = tokens(1, 6)
        (_, (y, tokens_E)), grads = ours(params, x, chosen)
        (_, want), want_grads = theirs(params, x, chosen)
        np.testing.assert_allclose(y, want, atol=1e-10)
        assert_trees_close(grads, want_grads, 1e-10)
    np.testing.assert_array_equal(tokens_E, np.bincount(chosen.reshape(-1), minlength=8))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_the_gradient_of_weights_is_summed_block_by_block(sizes):
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((30, n)).astype(np.float32) for n in (4, 5))
    expert = np.repeat(np.arange(4), [*sizes, 30 - sum(sizes)])  # the last rows are nobody's
    want = np.einsum("qe,qi,qo->eio", expert[:, None] == np.arange(3), x, y)
    got = jax.jit(sum_of_products, static_argnums=3)(x, y, np.array(sizes, np.int32), 4)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": 0}, "num_experts is 0; it must be 1 or more"),
        ({"experts_per_token": 9}, "experts_per_token is 9, more than the 8 experts"),
        ({"scores": "tanh"}, "scores is 'tanh'; choose one of softmax, softmax_of_chosen, sigmoid"),
        ({"balance": "noise"}, "balance is 'noise'; choose one of none, loss, bias"),
        ({"num_groups": 3}, "num_experts 8 is not a multiple of num_groups 3"),
        ({"num_groups": 8}, "8 experts in 8 groups are fewer than 2 in each"),
        ({"groups_per_token": 2}, "groups_per_token is 2, more than the 1 groups"),
        ({"num_groups": 4, "experts_per_token": 3}, "more than the 2 experts in the groups"),
        ({"shared_d_ff": -1}, "shared_d_ff is -1; it must be 0 or more"),
        ({"scale": 0.0}, r"scale is 0\.0; it must be above 0"),
        ({"balance_rate": -1.0}, r"balance_rate is -1\.0; it must be 0 or more"),
        ({"balance": "bias"}, "balance is 'bias' with a balance_rate of 0, which does nothing"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(QWEN, **change)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation is 'relu'; choose one of silu, gelu_tanh"):
        dataclasses.replace(MODEL, activation="relu")


def test_the_state_has_parameters_of_all_layers_with_their_axes():
    _, params = make(EVERYTHING, layers=3)
    shapes = {
        ".".join(path): (variable.shape, variable.get_metadata("axes"))
        for path, variable in nnx.to_flat_state(params)
    }
    assert shapes["w_router"] == ((3, 16, 8), ("layers", "embed", "routes"))
    assert shapes["correction_bias"] == ((3, 8), ("layers", "routes"))
    assert shapes["experts.w_up"] == ((3, 8, 16, 12), ("layers", "experts", "expert_embed", "mlp"))
    assert shapes["experts.b_down"] == ((3, 8, 16), ("layers", "experts", "expert_embed"))
    assert shapes["shared.w_down"] == ((3, 8, 16), ("layers", "mlp", "embed"))
    assert len(shapes) == 3 + 6 + 3


# Other libraries.


def random_torch(module, seed=0):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return module.eval()


def compare(config, module, experts, others, activation="silu", output=lambda y: y):
    """Our layer, with weights as numpy arrays, beside a module of transformers."""
    torch = pytest.importorskip("torch")
    graphdef, params = make(config, activation)
    flat = {".".join(path): variable for path, variable in nnx.to_flat_state(params)}
    weights = {f"experts.{name}": w for name, w in experts.items()} | others
    assert set(weights) == set(flat)
    for name, weight in weights.items():
        assert flat[name].shape[1:] == tuple(weight.shape), name
    new = {name: flat[name].replace(jnp.array(w.numpy())[None]) for name, w in weights.items()}
    params = nnx.from_flat_state([(tuple(name.split(".")), v) for name, v in new.items()])
    x = np.random.default_rng(0).standard_normal((2, 10, MODEL.d_model)).astype(np.float32)
    y, _ = jax.jit(functools.partial(apply, graphdef))(params, x)
    with torch.no_grad():
        want = output(module(torch.from_numpy(x.copy())))
    np.testing.assert_allclose(y, want.numpy(), rtol=0, atol=1e-5)


def halves(module):
    """gate and up [E, D, F], down [E, F, D] of the families that keep them transposed."""
    gate, up = module.experts.gate_up_proj.detach().transpose(1, 2).chunk(2, -1)
    return {"w_gate": gate, "w_up": up, "w_down": module.experts.down_proj.detach().transpose(1, 2)}


@pytest.mark.parametrize("normalize", [False, True])
def test_qwen3_moe_of_transformers(normalize):
    theirs = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = theirs.Qwen3MoeConfig(
        hidden_size=16,
        moe_intermediate_size=12,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=normalize,
    )
    module = random_torch(theirs.Qwen3MoeSparseMoeBlock(config))
    router = {"w_router": module.gate.weight.detach().T}
    compare(dataclasses.replace(QWEN, normalize=normalize), module, halves(module), router)


def test_mixtral_of_transformers():
    theirs = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = theirs.MixtralConfig(
        hidden_size=16, intermediate_size=12, num_local_experts=8, num_experts_per_tok=2
    )
    module = random_torch(theirs.MixtralSparseMoeBlock(config))
    router = {"w_router": module.gate.weight.detach().T}
    compare(MIXTRAL, module, halves(module), router)


def test_gpt_oss_of_transformers():
    theirs = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = theirs.GptOssConfig(
        hidden_size=16, intermediate_size=12, num_local_experts=8, num_experts_per_tok=3
    )
    module = random_torch(theirs.GptOssMLP(config))
    e = module.experts
    experts = {
        "w_gate": e.gate_up_proj.detach()[..., ::2],
        "w_up": e.gate_up_proj.detach()[..., 1::2],
        "w_down": e.down_proj.detach(),
        "b_gate": e.gate_up_proj_bias.detach()[..., ::2],
        "b_up": e.gate_up_proj_bias.detach()[..., 1::2],
        "b_down": e.down_proj_bias.detach(),
    }
    router = {"w_router": module.router.weight.detach().T, "b_router": module.router.bias.detach()}
    compare(GPT_OSS, module, experts, router, "clamped_swiglu", output=lambda y: y[0])


def test_deepseek_v3_of_transformers():
    theirs = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = theirs.DeepseekV3Config(
        hidden_size=16,
        moe_intermediate_size=12,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    module = random_torch(theirs.DeepseekV3MoE(config))
    shared = module.shared_experts
    others = {
        "w_router": module.gate.weight.detach().T,
        "correction_bias": module.gate.e_score_correction_bias,
        "shared.w_gate": shared.gate_proj.weight.detach().T,
        "shared.w_up": shared.up_proj.weight.detach().T,
        "shared.w_down": shared.down_proj.weight.detach().T,
    }
    compare(dataclasses.replace(DEEPSEEK, shared_d_ff=24), module, halves(module), others)


# Meshes.

MESHES = [
    {"expert": 4, "data": 2},
    {"expert": 2, "tensor": 2, "fsdp": 2, "data": 1},
    {"expert": 2, "context": 2, "data": 2},
]
ROWS, LENGTH = 8, 32


def loss_and_outputs(graphdef, params, x, useful, chosen):
    y, routing = apply(graphdef, params, x, useful_BS=useful, chosen_BSk=chosen)
    return jnp.sum(jnp.sin(y), where=useful[..., None]) + routing.balance_loss, (y, routing)


with_gradients = jax.value_and_grad(loss_and_outputs, (1, 2), has_aux=True)


@functools.cache
def on_one_device():
    """(graphdef, parameters, the jitted function of one device)."""
    with jax.enable_x64(True):
        graphdef, params = make(EVERYTHING, "silu", WIDE)
        return graphdef, params, jax.jit(functools.partial(with_gradients, graphdef))


def on_mesh(function, mesh):
    graphdef, params, _ = on_one_device()
    rows = batch_sharding(mesh)

    def run(params, x, useful, chosen):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(graphdef, params, x, useful, chosen)

    jitted = jax.jit(run, in_shardings=(tree_shardings(params, mesh), rows, rows, rows))
    return functools.partial(jitted, params)


def choice(mesh, num_first):
    """i32[B, S, 2]: of every device's pairs, so many go to the first device along `expert`."""
    shape = NamedSharding(mesh, batch_sharding(mesh).spec).shard_shape((ROWS, LENGTH))
    pair = np.arange(2 * shape[0] * shape[1]).reshape(*shape, 2)
    first = EVERYTHING.num_experts // mesh.shape["expert"]
    rest = first + pair % (EVERYTHING.num_experts - first)
    local = np.where(pair < num_first, pair % first, rest)
    return np.tile(local, (ROWS // shape[0], LENGTH // shape[1], 1)).astype(np.int32), pair.size


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "_".join(s))
def test_a_mesh_gives_what_one_device_gives(sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    _, params, one_device = on_one_device()
    everything = np.ones((ROWS, LENGTH), bool)
    some = np.random.default_rng(0).random((ROWS, LENGTH)) < 0.8
    _, num_pairs = choice(mesh, 0)
    places = capacity(num_pairs, mesh.shape["expert"])
    full, _ = choice(mesh, places)
    skewed, _ = choice(mesh, places + 1)
    is_first = np.all(skewed < EVERYTHING.num_experts // mesh.shape["expert"], -1)
    # (experts, which tokens are no padding, whether the slow way is taken)
    cases = [
        (full, everything, 0),
        (skewed, everything, 1),
        (skewed, some, 0),
        (skewed, ~is_first, 0),
        (np.zeros_like(skewed), everything, 1),
    ]
    with jax.enable_x64(True):
        x = tokens(ROWS, LENGTH)
        run = on_mesh(with_gradients, mesh)
        for chosen, useful, overflowed in cases:
            (value, (y, routing)), grads = one_device(params, x, useful, chosen)
            (mesh_value, (mesh_y, mesh_routing)), mesh_grads = run(x, useful, chosen)
            assert float(mesh_routing.overflowed) == overflowed
            mesh_routing, routing = (r._replace(overflowed=0) for r in (mesh_routing, routing))
            assert_trees_close(mesh_routing, routing, 1e-6)
            assert float(mesh_value) == pytest.approx(float(value), abs=1e-8)
            np.testing.assert_allclose(mesh_y, y, atol=1e-10)
            assert_trees_close(mesh_grads, grads, 1e-9)


def test_the_devices_of_a_mesh_choose_what_one_device_chooses():
    mesh = make_mesh(MeshConfig(**MESHES[2]))
    graphdef, params, _ = on_one_device()
    useful = np.random.default_rng(0).random((ROWS, LENGTH)) < 0.8
    with jax.enable_x64(True):
        x = tokens(ROWS, LENGTH)
        _, (mesh_y, mesh_routing) = on_mesh(loss_and_outputs, mesh)(x, useful, None)
        one_device = jax.jit(functools.partial(loss_and_outputs, graphdef))
        _, (y, routing) = one_device(params, x, useful, None)
        np.testing.assert_array_equal(mesh_routing.chosen, routing.chosen)
        np.testing.assert_allclose(mesh_y, y, atol=1e-10)
        mesh_routing, routing = (r._replace(overflowed=0) for r in (mesh_routing, routing))
        assert_trees_close(mesh_routing, routing, 1e-6)


def test_tokens_of_bfloat16_run_on_a_mesh_both_ways():
    mesh = make_mesh(MeshConfig(**MESHES[1]))
    graphdef, params = make(QWEN)
    x = tokens(ROWS, LENGTH, jnp.bfloat16)
    useful = np.ones((ROWS, LENGTH), bool)

    def run(params, x, useful, chosen):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return with_gradients(graphdef, params, x, useful, chosen)

    rows = batch_sharding(mesh)
    jitted = jax.jit(run, in_shardings=(tree_shardings(params, mesh), rows, rows, rows))
    want_of = jax.jit(functools.partial(apply, graphdef))
    for num_first, overflowed in [(2 * LENGTH, 0), (4 * LENGTH, 1)]:
        chosen, _ = choice(mesh, num_first)
        (_, (y, routing)), grads = jitted(params, x, useful, chosen)
        assert y.dtype == jnp.bfloat16
        assert float(routing.overflowed) == overflowed
        want, _ = want_of(params, x.astype(jnp.float32), chosen_BSk=chosen)
        np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.03 * np.abs(want).max())
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads[0]))


def test_experts_that_do_not_divide_are_refused_by_name():
    mesh = make_mesh(MeshConfig(expert=4, data=2))
    _, params = make(dataclasses.replace(QWEN, num_experts=6))
    with pytest.raises(ValueError, match=r"axis 'experts' has size 6, which 4 devices .expert. do"):
        tree_shardings(params, mesh)


# Routing.


@pytest.mark.parametrize("config", [QWEN, DEEPSEEK], ids=["softmax", "sigmoid"])
def test_a_replayed_choice_gives_the_same_and_gradients_reach_another_router(config):
    graphdef, params = make(config)
    x = tokens(dtype=jnp.float32)
    y, routing = jax.jit(functools.partial(apply, graphdef))(params, x)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def replay(params):
        y, replayed = apply(graphdef, params, x, chosen_BSk=routing.chosen)
        return jnp.sum(jnp.square(y)), (y, replayed.chosen)

    (_, (again, chosen)), _ = replay(params)
    np.testing.assert_array_equal(again, y)
    np.testing.assert_array_equal(chosen, routing.chosen)
    other = params | {"w_router": params["w_router"].replace(-params["w_router"][...])}
    (_, (changed, chosen)), grads = replay(other)
    np.testing.assert_array_equal(chosen, routing.chosen)
    assert np.abs(changed - y).max() > 1e-2
    assert np.abs(grads["w_router"][...]).max() > 1e-3


def test_padding_goes_nowhere_and_counts_nowhere():
    graphdef, params = make(EVERYTHING)
    run = jax.jit(functools.partial(apply, graphdef))
    x = tokens(dtype=jnp.float32)
    useful = np.arange(12) < np.array([[7], [12]])
    y, routing = run(params, x, useful_BS=useful)
    other = jnp.where(useful[..., None], x, 9.0)
    other_y, other_routing = run(params, other, useful_BS=useful)
    np.testing.assert_array_equal(y[useful], other_y[useful])
    for name in ("tokens_E", "balance_loss", "entropy"):
        np.testing.assert_array_equal(getattr(routing, name), getattr(other_routing, name))
    assert float(jnp.sum(routing.tokens_E)) == 2 * useful.sum()
    # The first row by itself has the same statistics without its padding.
    alone, alone_routing = run(params, x[:1, :7])
    first, first_routing = run(params, x[:1], useful_BS=useful[:1])
    np.testing.assert_allclose(first[:, :7], alone, atol=1e-6)
    for name in ("tokens_E", "balance_loss", "entropy"):
        a, b = getattr(first_routing, name), getattr(alone_routing, name)
        np.testing.assert_allclose(a, b, rtol=1e-5)
    layer = nnx.merge(graphdef, jax.tree.map(lambda w: w[0], params))
    np.testing.assert_allclose(y[~useful], layer.shared(x)[~useful], atol=1e-5)
    nothing = run(params, x, useful_BS=np.zeros_like(useful))[1]
    assert float(nothing.balance_loss) == float(nothing.entropy) == 0


def test_entropy_and_balance_loss_of_an_even_router():
    x = tokens(dtype=jnp.float32)
    for scores in ("softmax", "softmax_of_chosen", "sigmoid"):
        config = MoEConfig(8, 2, 4, scores, balance="loss", balance_rate=0.25)
        graphdef, params = make(config)
        params = params | {"w_router": params["w_router"].replace(jnp.zeros((1, 16, 8)))}
        _, routing = jax.jit(functools.partial(apply, graphdef))(params, x)
        assert float(routing.balance_loss) == pytest.approx(0.25, rel=1e-6)
        assert float(routing.entropy) == pytest.approx(np.log(8), rel=1e-5)


def skewed_tokens():
    """128 tokens that share a direction, so that they prefer the same experts."""
    x = np.random.default_rng(0).standard_normal((4, 32, 16))
    return (x + 1.0).astype(np.float32)


@pytest.mark.parametrize("scores", ["softmax", "softmax_of_chosen", "sigmoid"])
def test_the_balance_loss_pushes_towards_an_even_load(scores):
    config = MoEConfig(8, 2, 4, scores, balance="loss", balance_rate=1.0)
    graphdef, params = make(config)
    x = skewed_tokens()

    def loss(params):
        _, routing = apply(graphdef, params, x)
        return routing.balance_loss, routing

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (before, routing), _ = step(params)
    assert np.max(routing.tokens_E) > 2.5 * np.mean(routing.tokens_E)
    for _ in range(30):
        _, grads = step(params)
        params = jax.tree.map(lambda w, g: w - 0.3 * g, params, grads)
    (after, routing), _ = step(params)
    assert after < before
    assert after == pytest.approx(1.0, abs=0.1)
    assert np.max(routing.tokens_E) < 1.8 * np.mean(routing.tokens_E)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_moving_the_correction_bias_evens_the_load(scores):
    config = MoEConfig(8, 2, 4, scores, balance="bias", balance_rate=0.01)
    graphdef, params = make(config)
    x = skewed_tokens()
    run = jax.jit(lambda params: apply(graphdef, params, x)[1])
    worst = []
    for _ in range(60):
        tokens_E = run(params).tokens_E
        worst.append(np.max(tokens_E) / np.mean(tokens_E))
        bias = params["correction_bias"]
        moved = updated_correction_bias(bias[...], tokens_E[None], config.balance_rate)
        params = params | {"correction_bias": bias.replace(moved)}
    assert worst[0] > 2.5
    assert worst[-1] < 0.5 * worst[0]
    np.testing.assert_allclose(
        updated_correction_bias(jnp.zeros(4), jnp.array([1.0, 2.0, 3.0, 2.0]), 0.1),
        [0.1, 0, -0.1, 0],
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_no_optimizer_moves_the_correction_bias_and_all_move_the_rest(name):
    graphdef, params = make(EVERYTHING)
    x = tokens(dtype=jnp.float32)
    transform = make_optimizer(
        OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.1, schedule="constant"), 4
    ).transform

    def loss(params):
        y, routing = apply(graphdef, params, x)
        return jnp.sum(jnp.square(y)) + routing.balance_loss

    @jax.jit
    def step(params, state):
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    new, state = params, jax.jit(transform.init)(params)
    for _ in range(2):
        new, state = step(new, state)
    for (path, before), (_, after) in zip(
        nnx.to_flat_state(params), nnx.to_flat_state(new), strict=True
    ):
        is_moved = np.any(before[...] != after[...])
        assert is_moved == (not isinstance(before, CorrectionBias)), path


# Types and programs.


def test_tokens_of_bfloat16_are_routed_in_float32():
    graphdef, params = make(EVERYTHING)
    run = jax.jit(functools.partial(apply, graphdef))
    x = tokens(dtype=jnp.bfloat16)
    y, routing = run(params, x)
    want, want_routing = run(params, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(routing.chosen, want_routing.chosen)
    np.testing.assert_allclose(routing.entropy, want_routing.entropy, rtol=1e-6)
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.02 * np.abs(want).max())


def test_other_tokens_and_choices_compile_nothing_anew():
    graphdef, params = make(QWEN)
    run = jax.jit(functools.partial(apply, graphdef))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        run(
            params,
            tokens(dtype=jnp.float32, seed=seed),
            useful_BS=rng.random((2, 12)) < 0.5,
            chosen_BSk=rng.integers(0, 8, (2, 12, 2), np.int32),
        )
    assert run._cache_size() == 1
