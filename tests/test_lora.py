"""Adapters: what they compute, what is trained and what stays, on any mesh, from run to run."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from runs import BYTES, MODEL, make_config, params_of, write_inputs

from agentx import checkpoint
from agentx.batch import Batch
from agentx.cli.config import load_config
from agentx.cli.main import main
from agentx.cli.runs import load_run, load_run_adapters, prepare_run
from agentx.interop.huggingface import export_huggingface
from agentx.interop.peft import export_peft
from agentx.interop.tensors import flatten_params
from agentx.losses import NextTokenLoss
from agentx.metrics import read_metrics
from agentx.model import ModelConfig, abstract_transformer, init_cache, init_params
from agentx.model.config import LatentConfig
from agentx.model.lora import LoraConfig, adapted, init_adapters, merged_params, split_trained
from agentx.model.moe_config import MoEConfig
from agentx.optim import Optimizer, OptimizerConfig, make_optimizer
from agentx.parameters import load_frozen, newest_saved
from agentx.sharding import MeshConfig, make_mesh, tree_shardings
from agentx.step import TrainState, init_state, make_score_step, make_train_step
from agentx.train import train
from agentx_kernels.layout import causal, packed

TINY = ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48
)
# Other numbers of heads, a latent vector for queries and keys, and layers of two kinds.
LATENT = dataclasses.replace(
    TINY,
    num_layers=3,
    num_kv_heads=4,
    head_dim=12,
    qk_norm="none",
    latent=LatentConfig(16, 10, 8, 4, 6),
    moe=MoEConfig(4, 2, 16, "sigmoid", shared_d_ff=16),
    num_dense_layers=1,
)
ALL = LoraConfig(4, 8.0, (r"attention\.w_.*", r"mlp\.w_.*"))
OF_EXPERTS = (r"moe\.shared\..*", r"moe\.experts\.w_.*", r"moe\.w_router")
SGD = Optimizer(optax.sgd(1.0), lambda step: jnp.float32(1.0))


@functools.cache
def make(config: ModelConfig = TINY, lora: LoraConfig = ALL, scale: float = 0.3):
    """(abstract model, its adapted form, base parameters, adapters, frozen), on the host.

    scale: of b, so that adapters matter; 0 for fresh ones.
    """
    plain = abstract_transformer(config)
    model = adapted(plain, lora)
    base = init_params(plain, jax.random.key(0))
    adapters = jax.device_get(jax.jit(lambda key: init_adapters(model, key))(jax.random.key(1)))
    rng = np.random.default_rng(2)
    drawn = lambda x: x + np.float32(scale) * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    adapters = jax.tree.map(drawn, adapters)
    frozen = split_trained(adapted(nnx.merge(nnx.graphdef(plain), base), lora))[2]
    return plain, model, *jax.device_get((base, adapters, frozen))


def tokens_of(config: ModelConfig, rows: int = 2, length: int = 16) -> np.ndarray:
    return np.random.default_rng(3).integers(0, config.vocab_size, (rows, length), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def hidden(graphdef, *states) -> jax.Array:
    model = nnx.merge(graphdef, *states)
    tokens = tokens_of(model.config)
    return model(tokens, causal(*tokens.shape)).hidden


@functools.partial(jax.jit, static_argnums=0)
def merge(graphdef, *states) -> nnx.State:
    return merged_params(nnx.merge(graphdef, *states))


def random_batch(rows: int = 8, length: int = 16) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TINY.vocab_size, (rows, length), np.int32)
    weights = rng.random((rows, length)).astype(np.float32)
    layout = packed([[length // 2, length // 4]] * rows, length)
    return Batch(tokens, np.roll(tokens, -1, 1), weights, layout)


@functools.cache
def mesh_of(num_devices: int = 1, **sizes: int):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:num_devices])


@functools.cache
def update(mesh, num_micro_batches: int = 1):
    """One step by plain descent at rate 1: (loss, gradients of the adapters, frozen after it)."""
    _, model, _, adapters, frozen = make()
    params = jax.tree.map(jnp.array, adapters)  # the step donates what it is given
    state = TrainState(jnp.int32(0), params, SGD.transform.init(params))
    state = jax.device_put(state, tree_shardings(state, mesh))
    frozen = jax.device_put(frozen, tree_shardings(frozen, mesh))
    step = make_train_step(model, NextTokenLoss(), SGD, mesh, num_micro_batches=num_micro_batches)
    state, metrics = step(state, random_batch(), frozen)
    grads = jax.tree.map(np.subtract, adapters, jax.device_get(state.params))
    return float(metrics["loss"]), grads, jax.device_get(frozen)


# ------------------------------------------------------------------------------- what is computed


def with_experts(config: ModelConfig) -> LoraConfig:
    """Adapters of every weight that the layers of a config have."""
    return dataclasses.replace(ALL, targets=(*ALL.targets, *(OF_EXPERTS if config.moe else ())))


@pytest.mark.parametrize("config", [TINY, LATENT], ids=["grouped", "latent"])
def test_fresh_adapters_change_nothing_and_others_are_the_sum_of_both(config):
    lora = with_experts(config)
    plain, model, base, adapters, frozen = make(config, lora, 0.0)
    before = hidden(nnx.graphdef(plain), base)
    fresh = hidden(split_trained(model)[0], adapters, frozen)
    np.testing.assert_allclose(fresh, before, atol=1e-5)

    plain, model, base, adapters, frozen = make(config, lora)
    graphdef = split_trained(model)[0]
    trained = hidden(graphdef, adapters, frozen)
    whole = merge(graphdef, adapters, frozen)
    assert np.abs(trained - before).max() > 0.1
    np.testing.assert_allclose(hidden(nnx.graphdef(plain), whole), trained, atol=1e-4)
    scale = lora.alpha / lora.rank
    pairs, found = flatten_params(adapters), flatten_params(whole)
    for name, w in flatten_params(base).items():
        delta = 0.0
        if f"{name}.a" in pairs:
            a, b = pairs[f"{name}.a"], pairs[f"{name}.b"]
            if "experts" in name:
                delta = scale * np.matmul(a, b)
            else:
                delta = scale * np.stack([np.tensordot(*ab, 1) for ab in zip(a, b, strict=True)])
        np.testing.assert_allclose(found[name], w + delta, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("config", [TINY, LATENT], ids=["grouped", "latent"])
def test_decoding_over_a_cache_equals_the_forward_stacked_and_by_separate_layers(config):
    _, model, _, adapters, frozen = make(config)
    graphdef = split_trained(model)[0]
    tokens = tokens_of(config)
    rows, length = tokens.shape
    positions = np.broadcast_to(np.arange(length), tokens.shape)

    @jax.jit
    def decode(adapters, frozen):
        model = nnx.merge(graphdef, adapters, frozen)
        cache = init_cache(config, rows, length)
        stacked = model.decode(tokens, positions, *cache)[0]
        layers = model.separate_layers()
        kv_heads, *sizes = config.cache_dims
        shapes = [(rows, kv_heads, length, size) for size in sizes]
        k, v = ([jnp.zeros(s, jnp.float32)] * config.num_layers for s in shapes)
        lengths = jnp.zeros(rows, jnp.int32)
        in_place = model.decode_in_place(layers, tokens, k, v, lengths, lengths + length)[0]
        return stacked, in_place

    wanted = hidden(graphdef, adapters, frozen)
    for found in decode(adapters, frozen):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


# --------------------------------------------------------------------------------- what is trained


def test_gradients_are_those_of_the_sum_and_nothing_else_moves():
    plain, model, _, adapters, frozen = make()
    loss, grads, after = update(mesh_of())
    score = make_score_step(plain, mesh_of())
    batch, graphdef = random_batch(), split_trained(model)[0]

    @jax.jit
    @jax.value_and_grad
    def by_hand(adapters):
        logprobs, _ = score(merge(graphdef, adapters, frozen), batch)
        return -jnp.sum(logprobs * batch.weights) / jnp.sum(batch.weights)

    wanted_loss, wanted = by_hand(adapters)
    assert loss == pytest.approx(float(wanted_loss), abs=1e-5)
    found, wanted = flatten_params(grads), flatten_params(wanted)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5, err_msg=name)
        assert np.abs(wanted[name]).max() > 1e-3
    for x, y in zip(jax.tree.leaves(frozen), jax.tree.leaves(after), strict=True):
        assert x.tobytes() == y.tobytes()


def test_adapters_of_experts_and_routers_learn_as_their_sum_does():
    plain, model, _, adapters, frozen = make(LATENT, with_experts(LATENT))
    graphdef = split_trained(model)[0]

    def in_place(adapters):
        return jnp.sum(jnp.sin(hidden(graphdef, adapters, frozen)))

    def summed(adapters):
        whole = merge(graphdef, adapters, frozen)
        return jnp.sum(jnp.sin(hidden(nnx.graphdef(plain), whole)))

    found, wanted = (flatten_params(jax.jit(jax.grad(f))(adapters)) for f in (in_place, summed))
    for name in ("w_router.b", "experts.w_gate.a", "experts.w_down.b", "shared.w_up.a"):
        name = f"layers.1.moe.{name}"
        assert np.abs(wanted[name]).max() > 1e-2
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-4 * scale, err_msg=name)


def test_eight_devices_and_micro_batches_agree_with_one():
    loss, grads, _ = update(mesh_of(8, data=1, fsdp=2, tensor=2, context=2), num_micro_batches=2)
    wanted_loss, wanted, _ = update(mesh_of())
    assert loss == pytest.approx(wanted_loss, abs=1e-5)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_the_optimizer_knows_adapters_alone():
    _, model, _, adapters, _ = make()
    size = sum(x.size for x in jax.tree.leaves(adapters))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = init_state(model, optimizer, mesh_of(), jax.random.key(0))
    floats = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.nbytes for x in floats) == 2 * 4 * size
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_no_gradient_of_a_frozen_weight_is_computed():
    """Forward, backward to the inputs, and nothing of the third part that full training has."""
    config = dataclasses.replace(TINY, d_model=256, d_ff=512, num_layers=1, vocab_size=1024)
    plain = abstract_transformer(config)
    batch = random_batch(8, 128)
    flops = []
    for model in (plain, adapted(plain, LoraConfig(1, 1.0, ALL.targets))):
        step = make_train_step(model, NextTokenLoss(), SGD, mesh_of()).__wrapped__
        _, params, *frozen = split_trained(model)
        opt_state = jax.eval_shape(SGD.transform.init, params)
        state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
        flops.append(step.lower(state, batch, *frozen).compile().cost_analysis()["flops"])
    assert flops[1] < 0.72 * flops[0]


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ((0, 1.0, ("mlp.*",)), "LoraConfig.rank is 0; it must be 1 or more"),
        ((1, 0.0, ("mlp.*",)), "LoraConfig.alpha is 0.0; it must be above 0"),
        ((1, 1.0, ()), "LoraConfig.targets is empty; give names"),
        ((1, 1.0, ("(",)), "LoraConfig.targets: '\\(' is no regular expression"),
    ],
)
def test_wrong_numbers_and_patterns_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        LoraConfig(*settings)


def test_targets_that_name_nothing_are_refused():
    for target, sentence in (
        ("attention.w_x", r"'attention.w_x', which is no weight of the model; its layers have att"),
        ("embed", "'embed', which is no weight of the model"),
        ("moe.experts.w_x", "'moe.experts.w_x', which is no weight of the model"),
    ):
        with pytest.raises(ValueError, match=sentence):
            adapted(abstract_transformer(LATENT), LoraConfig(1, 1.0, (target,)))


# --------------------------------------------------------------------------------------- its runs

LORA = LoraConfig(4, 16.0, (r"attention\.w_.*", r"mlp\.w_.*"))


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Inputs, a run of SFT, and adapters trained on it in bfloat16: "lora"."""
    folder = tmp_path_factory.mktemp("runs")
    write_inputs(folder)
    train(make_config("sft", folder, init_from=""), folder / "sft")
    train(lora_config(folder), folder / "lora")
    return folder


def lora_config(folder: Path, kind: str = "pretrain", **changes):
    """A run of adapters on the SFT policy, whose parameters it keeps in bfloat16."""
    settings = {
        "model": dataclasses.replace(MODEL, param_dtype="bfloat16"),
        "init_from": str(folder / "sft"),
        "lora": LORA,
        "num_steps": 4,
        "checkpoint_every": 2,
        "log_every": 1,
    }
    return dataclasses.replace(make_config(kind, folder), **{**settings, **changes})


def test_a_run_trains_adapters_and_leaves_its_base_and_little_else(folder):
    records = read_metrics(folder / "lora")
    assert records[-1]["loss"] < records[0]["loss"]
    sizes = [
        sum(p.stat().st_size for p in newest_saved(folder / run).folder.rglob("*"))
        for run in ("lora", "sft")
    ]
    assert sizes[0] < sizes[1]
    about = json.loads((newest_saved(folder / "lora").folder / "about.json").read_text())
    names = [name for name in about["arrays"] if name.startswith("params/")]
    assert names
    assert all(name.endswith(("/a/value", "/b/value", "/a", "/b")) for name in names)
    assert about["extras"]["lora"]["base"]["step"] == 24

    before, after = params_of(folder / "sft"), params_of(folder / "lora")
    assert before.keys() == after.keys()
    for name, array in before.items():
        kept = array.astype(after[name].dtype)
        is_target = ".w_" in name
        assert after[name].dtype == jnp.bfloat16
        assert np.array_equal(kept, after[name]) != is_target, name


def test_a_run_file_holds_adapters(folder, tmp_path):
    text = prepare_run(lora_config(folder), tmp_path)
    assert "TrainConfig.lora = @LoraConfig()" in text
    assert load_config(tmp_path / "config.gin") == lora_config(folder)


def test_a_run_that_was_stopped_goes_on_to_the_same_adapters(folder, tmp_path):
    def stop(step, made):
        if step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        train(lora_config(folder), tmp_path, stop)
    train(lora_config(folder), tmp_path)
    wanted, *_ = load_run_adapters(folder / "lora")
    found, *_ = load_run_adapters(tmp_path)
    for x, y in zip(jax.tree.leaves(found.adapters), jax.tree.leaves(wanted.adapters), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_rollouts_are_played_by_base_and_adapters_as_the_step_has_them(folder, tmp_path):
    """In bfloat16 merged weights would differ: here sampler and trainer agree as without."""
    config = lora_config(folder, "rl", num_steps=2)
    train(config, tmp_path / "rl")
    records = read_metrics(tmp_path / "rl")
    assert any(r["tokens"] > 0 for r in records)
    assert all(r["sampler_difference_max"] < 1e-4 for r in records)


def test_a_base_that_changed_or_went_and_other_adapters_are_refused(folder, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(folder / "sft", base)
    config = lora_config(folder, init_from=str(base), num_steps=1)
    train(config, run)
    for changes, sentence in (
        ({"alpha": 2.0}, "begun with other adapters: LoraConfig.alpha was 16, is now 2"),
        ({"rank": 2}, "is of another model"),
    ):
        lora = dataclasses.replace(LORA, **changes)
        with pytest.raises(ValueError, match=sentence):
            train(dataclasses.replace(config, lora=lora), run)
    with pytest.raises(ValueError, match="adapts parameters that are there: set Tra"):
        lora_config(folder, init_from="")
    with pytest.raises(ValueError, match="sft trained all parameters, so it has no adapters"):
        load_run_adapters(folder / "sft")

    saved = newest_saved(base).folder
    about = saved / "about.json"
    about.write_text(about.read_text().replace('"seconds": ', '"seconds": 1'))
    (saved / "checksums.json").write_text(json.dumps(checkpoint._checksums(saved)))
    with pytest.raises(ValueError, match=r"adapters for other parameters than .* now holds"):
        load_run(run)
    saved.rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"adapters for step 24, but .* is not there any more"):
        load_run(run)


def test_adapters_of_a_run_of_adapters_have_its_merged_parameters_as_base(folder):
    plain, mesh = abstract_transformer(lora_config(folder).model), mesh_of()
    frozen = load_frozen(newest_saved(folder / "lora"), plain, LORA, mesh, BYTES)
    found, wanted = flatten_params(frozen), params_of(folder / "lora")
    for name, array in wanted.items():
        kept = found.get(name, found.get(f"{name}.w"))
        assert np.asarray(kept).tobytes() == array.tobytes(), name


# -------------------------------------------------------------------------------------- to others


def assert_peft_agrees(
    folder: Path, config: ModelConfig, whole: nnx.State, base: nnx.State, adapter: Path
) -> None:
    """Our whole model, and peft's over a base that was exported, have the same logits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    export_huggingface(base, config, BYTES, folder / "base")
    tokens = tokens_of(config)
    model = nnx.merge(nnx.graphdef(abstract_transformer(config)), whole)
    logits = hidden(*nnx.split(model)) @ model.unembedding().T
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32")
    with torch.no_grad():
        before = theirs(torch.from_numpy(tokens).long()).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(theirs, adapter)
        after = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(np.asarray(logits), after, atol=1e-4, rtol=0)

    export_huggingface(whole, config, BYTES, folder / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged", dtype="float32")
    with torch.no_grad():
        at_once = merged(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(at_once, after, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("config", "targets", "named"),
    [
        (MODEL, ALL.targets, 7),
        (MODEL, ("attention.w_(q|o)",), ["o_proj", "q_proj"]),
        (dataclasses.replace(LATENT, vocab_size=BYTES.vocab_size), ("attention.w_.*",), 5),
    ],
    ids=["all", "some", "latent"],
)
def test_peft_loads_adapters_with_the_same_logits(tmp_path, config, targets, named):
    lora = LoraConfig(4, 8.0, targets)
    _, model, base, adapters, frozen = make(config, lora)
    export_peft(adapters, config, lora, tmp_path / "adapter", base="base")
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["bias"]) == (4, 8.0, "none")
    modules = about["target_modules"]
    assert named in (modules, len(modules))
    whole = merge(split_trained(model)[0], adapters, frozen)
    assert_peft_agrees(tmp_path, config, whole, base, tmp_path / "adapter")


QWEN_MOE = dataclasses.replace(
    TINY, vocab_size=BYTES.vocab_size, moe=MoEConfig(4, 2, 16, "softmax")
)
MIXTRAL = dataclasses.replace(
    QWEN_MOE, qk_norm="none", moe=MoEConfig(4, 2, TINY.d_ff, "softmax", normalize=True)
)
# An odd number of layers in a pattern of two, so experts lie in two stacks.
GPT_OSS = dataclasses.replace(
    MIXTRAL,
    num_layers=3,
    qkv_bias=True,
    output_bias=True,
    sinks=True,
    window_pattern=(7, None),
    activation="clamped_swiglu",
    moe=MoEConfig(4, 2, TINY.d_ff, "softmax_of_chosen", router_bias=True, expert_bias=True),
)
DEEPSEEK = dataclasses.replace(LATENT, vocab_size=BYTES.vocab_size)
ATTENTION, EXPERTS, ROUTER = r"attention\.w_.*", r"moe\.experts\.w_.*", r"moe\.w_router"
OF_THREE = ["down_proj", "gate_proj", "up_proj"]
OF_FOUR = ["k_proj", "o_proj", "q_proj", "v_proj"]
FUSED = ["experts.down_proj", "experts.gate_up_proj"]


@pytest.mark.parametrize(
    ("config", "targets", "modules", "parameters"),
    [
        (QWEN_MOE, (ATTENTION, EXPERTS, ROUTER), sorted(OF_THREE + OF_FOUR), ["gate.weight"]),
        (QWEN_MOE, ("moe.experts.w_(gate|up)",), OF_THREE, None),
        (MIXTRAL, (ATTENTION, EXPERTS, ROUTER), [*OF_FOUR, "w1", "w2", "w3"], ["gate.weight"]),
        (MIXTRAL, ("moe.experts.w_up",), ["w1", "w2", "w3"], None),
        (GPT_OSS, (ATTENTION, EXPERTS, ROUTER), OF_FOUR, [*FUSED, "router.weight"]),
        (GPT_OSS, ("moe.experts.w_up",), [], FUSED),
        (
            DEEPSEEK,
            (ATTENTION, EXPERTS, "mlp.w_.*", "moe.shared.w_.*"),
            8,
            [f"{of}.{x}.weight" for of in ("mlp", "shared_experts") for x in OF_THREE],
        ),
        (DEEPSEEK, ("moe.experts.w_down",), OF_THREE, None),
        (
            DEEPSEEK,
            ("mlp.w_up", "moe.shared.w_down"),
            [],
            ["mlp.up_proj.weight", "shared_experts.down_proj.weight"],
        ),
    ],
    ids=[
        "qwen3-moe",
        "qwen3-moe, no down",
        "mixtral",
        "mixtral, up",
        "gpt-oss",
        "gpt-oss, up",
        "deepseek, no router",
        "deepseek, down",
        "deepseek, no experts",
    ],
)
def test_peft_loads_adapters_of_mixtures_with_the_same_logits(
    tmp_path, config, targets, modules, parameters
):
    lora = LoraConfig(4, 8.0, targets)
    _, model, base, adapters, frozen = make(config, lora)
    export_peft(adapters, config, lora, tmp_path / "adapter", base="base")
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert modules in (about["target_modules"], len(about["target_modules"]))
    assert about.get("target_parameters") == parameters
    graphdef = split_trained(model)[0]
    whole = merge(graphdef, adapters, frozen)
    assert_peft_agrees(tmp_path, config, whole, base, tmp_path / "adapter")

    # Were the adapter of any weight passed over, of a single expert too, the logits would tell.
    leaves, structure = jax.tree.flatten(adapters)
    unembedding = nnx.merge(nnx.graphdef(abstract_transformer(config)), whole).unembedding()
    trained = hidden(graphdef, adapters, frozen)
    for number, name in enumerate(flatten_params(adapters)):
        num_stacked = 2 if ".experts." in name else 1
        for at in np.ndindex(leaves[number].shape[:num_stacked] if name.endswith(".b") else 0):
            fewer = [leaf.copy() if leaf is leaves[number] else leaf for leaf in leaves]
            fewer[number][at] = 0
            less = hidden(graphdef, jax.tree.unflatten(structure, fewer), frozen)
            assert np.abs((less - trained) @ unembedding.T).max() > 1e-3, (name, at)


@pytest.mark.parametrize(
    ("config", "targets", "sentence"),
    [
        (
            DEEPSEEK,
            (ROUTER,),
            r"layers.1.mlp.gate, whose e_score_correction_bias its wrapper hides",
        ),
        (
            DEEPSEEK,
            (ATTENTION, EXPERTS, ROUTER),
            r"cannot load an adapter of model.layers.1.mlp.ga",
        ),
        (
            dataclasses.replace(
                GPT_OSS, moe=dataclasses.replace(GPT_OSS.moe, num_experts=1, experts_per_token=1)
            ),
            (EXPERTS,),
            r"model.layers.0.mlp.experts.down_proj, a parameter of one expert alone, for its trans",
        ),
    ],
    ids=["router", "router and others", "one expert"],
)
def test_adapters_that_peft_cannot_load_are_refused(tmp_path, config, targets, sentence):
    lora = LoraConfig(4, 8.0, targets)
    adapters = make(config, lora)[3]
    with pytest.raises(ValueError, match=sentence):
        export_peft(adapters, config, lora, tmp_path / "adapter", base="base")
    assert not any(tmp_path.iterdir())


def test_the_command_exports_an_adapter_or_all_of_it(folder, tmp_path, capsys):
    assert main(["export", str(folder / "lora"), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert f"agentx export {folder / 'sft'} BASE" in capsys.readouterr().out
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(folder / "sft")
    assert main(["export", str(folder / "lora"), str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert main(["export", str(folder / "sft"), str(tmp_path / "none"), "--adapter"]) == 2
    assert "trained all parameters, so it has no adapters" in capsys.readouterr().err
