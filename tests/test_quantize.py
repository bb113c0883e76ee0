"""Weights in eight bits: as compressed-tensors reads them, and as transformers runs them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from agentx.interop.families import family_of
from agentx.interop.huggingface import export_huggingface, import_huggingface
from agentx.interop.quantize import dequantized, quantized
from agentx.interop.quantize_loss import accuracy_loss, random_rows
from agentx.interop.tensors import family_tensors, flatten_params
from agentx.model import ModelConfig, Transformer
from agentx.model.moe_config import MoEConfig
from agentx.tokenizer import Tokenizer
from agentx_kernels.layout import causal

TOKENIZER = Tokenizer.bytes()
SIZES = {
    "vocab_size": 288,
    "d_model": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "d_ff": 48,
    "max_length": 64,
}
CONFIGS = {
    "llama": ModelConfig(**SIZES, qk_norm="none", tie_embeddings=False),
    "qwen 2": ModelConfig(**SIZES, qk_norm="none", qkv_bias=True),
    "qwen 3": ModelConfig(**SIZES),
}
MOE = ModelConfig(
    **SIZES,
    tie_embeddings=False,
    moe=MoEConfig(4, 2, 16, scores="softmax", normalize=True),
)
KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])


def make_params(config):
    """Channels of very different sizes, one of zeros, and biases and norms that matter."""
    params = nnx.state(Transformer(config, nnx.Rngs(1)))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    flat = flatten_params(jax.tree.unflatten(structure, noisy))
    if config.moe is None:
        up = flat["layers.0.mlp.w_up"]
        flat["layers.0.mlp.w_up"] = up.at[..., 0].set(0.0).at[..., 1].multiply(30.0)
    return flat


def tensors_of(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def rounded(config, flat, kind, dtype="float32"):
    """Our weights as `dequantized` gives them, by their names."""
    out = {}
    for tensor in family_tensors(family_of(config), config).values():
        weight = tensor.joined(flat, np.dtype(np.float32))
        if tensor.pieces[0].num_inputs:
            weight = dequantized(*quantized(weight, kind, jnp.dtype(dtype))).astype(np.float32)
        out[tensor.name] = weight
    return out


def model_with(config, flat, weights):
    """A model of ours with the parameters of `flat`, but for the weights given by their names."""
    arrays = dict(flat)
    for tensor in family_tensors(family_of(config), config).values():
        (piece,) = tensor.pieces
        array = np.array(arrays[piece.param])
        array[piece.at] = piece.of_theirs(weights[tensor.name])
        arrays[piece.param] = array
    model = Transformer(config, nnx.Rngs(0))
    state = nnx.state(model)
    leaves = [arrays[name] for name in flatten_params(state)]
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), leaves))
    return model


def logits_of(model, tokens):
    return model(jnp.asarray(tokens), causal(*tokens.shape)).hidden @ model.unembedding().T


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_compressed_tensors_reads_the_weights_that_we_mean(kind, dtype, tmp_path):
    torch = pytest.importorskip("torch")
    compressed = pytest.importorskip("compressed_tensors")
    config = CONFIGS["qwen 3"]
    flat = make_params(config)
    folder = export_huggingface(
        flat, config, TOKENIZER, tmp_path / "out", dtype=dtype, quantize=kind
    )
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    theirs = compressed.quantization.QuantizationConfig.model_validate(about)
    (scheme,) = theirs.config_groups.values()
    # What the package would choose itself for such weights.
    infer = compressed.compressors.format.infer_module_format
    assert infer(torch.nn.Linear, scheme).value == about["format"] == theirs.format
    compressor = compressed.BaseCompressor.get_value_from_registry(about["format"])
    inside = tensors_of(folder)
    wanted = rounded(config, flat, kind, dtype)
    names = {name.removesuffix(".weight_scale") for name in inside if name.endswith("_scale")}
    assert names == {
        t.name.removesuffix(".weight")
        for t in family_tensors(family_of(config), config).values()
        if t.pieces[0].num_inputs
    }
    for name in names:
        parts = {
            part: inside.pop(f"{name}.{part}")
            for part in compressor.compression_param_names(scheme)
        }
        # And their own numbers, of the weights as they were and our scales.
        tensor = family_tensors(family_of(config), config)[f"{name}.weight"]
        before = torch.from_numpy(tensor.joined(flat, np.dtype(np.float32)))
        again = compressor.compress(
            {"weight": before, "weight_scale": parts["weight_scale"].float()}, scheme
        )
        key = "weight_packed" if kind == "int8" else "weight"
        assert again[key].dtype == parts[key].dtype
        if dtype == "float32":
            assert torch.equal(again[key].view(torch.uint8), parts[key].view(torch.uint8)), name
        found = compressor.decompress(parts, scheme)["weight"]
        assert str(found.dtype) == f"torch.{dtype}"
        assert np.array_equal(found.float().numpy(), wanted[f"{name}.weight"]), name
    # The rest is as it is without quantization.
    plain = tensors_of(export_huggingface(flat, config, TOKENIZER, tmp_path / "p", dtype=dtype))
    for name, tensor in inside.items():
        assert torch.equal(tensor, plain[name]), name
    assert inside.keys() | {f"{name}.weight" for name in names} == plain.keys()


@KINDS
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_runs_the_folder_as_we_run_the_rounded_weights(name, kind, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name]
    flat = make_params(config)
    folder = export_huggingface(flat, config, TOKENIZER, tmp_path / "out", quantize=kind)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = model_with(config, flat, rounded(config, flat, kind))
    tokens = np.random.default_rng(0).integers(0, 288, (2, 40))
    found = logits_of(ours, tokens)
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens)).logits
    assert float(wanted.abs().max()) > 1
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_weight_is_off_by_half_a_step_at_most(data):
    rows, columns = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    exponent = data.draw(st.integers(-20, 20))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    weight = (rng.standard_normal((rows, columns)) * 2.0**exponent).astype(np.float32)
    largest = np.abs(weight).max(1, keepdims=True)
    number, scale = quantized(weight, "int8", np.dtype(np.float32))
    again = dequantized(number, scale)
    assert np.all(np.abs(again - weight) <= largest / 254 * (1 + 1e-5))
    again = dequantized(*quantized(weight, "fp8", np.dtype(np.float32)))
    # Three bits behind the point; below 2^-6 of the numbers the steps are even.
    step = np.maximum(np.abs(weight) / 16, largest / 448 * 2.0**-10)
    assert np.all(np.abs(again - weight) <= step * (1 + 1e-5))


def test_files_are_cut_by_what_is_stored_and_are_smaller(tmp_path):
    config = CONFIGS["llama"]
    flat = make_params(config)
    folder = export_huggingface(
        flat, config, TOKENIZER, tmp_path / "out", quantize="int8", max_shard_bytes=20_000
    )
    about = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert sum(a.nbytes for a in arrays.values()) <= 20_000 or len(arrays) == 1
        sizes |= {name: array.nbytes for name, array in arrays.items()}
        assert all(about["weight_map"][name] == file.name for name in arrays)
    assert about["metadata"]["total_size"] == sum(sizes.values())
    assert sizes["model.layers.0.mlp.up_proj.weight_packed"] == 48 * 32
    with pytest.raises(ValueError, match="quantized weights, which cannot be read; give the one"):
        import_huggingface(folder)


def test_experts_are_quantized_and_their_routers_are_not(tmp_path):
    flat = make_params(MOE)
    folder = export_huggingface(flat, MOE, TOKENIZER, tmp_path / "out", quantize="int8")
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert about["ignore"] == ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(3))]
    compressed = pytest.importorskip("compressed_tensors")
    inside = tensors_of(folder)
    assert "model.layers.0.mlp.gate.weight" in inside
    scheme = compressed.quantization.QuantizationScheme(**about["config_groups"]["group_0"])
    compressor = compressed.BaseCompressor.get_value_from_registry(scheme.format)
    expert = "model.layers.2.mlp.experts.3.down_proj"
    parts = {x: inside[f"{expert}.{x}"] for x in compressor.compression_param_names(scheme)}
    found = compressor.decompress(parts, scheme)["weight"]
    assert np.array_equal(found, rounded(MOE, flat, "int8")[f"{expert}.weight"])


@pytest.mark.parametrize(
    ("config", "kind", "sentence"),
    [
        (CONFIGS["llama"], "int4", "quantize is 'int4'; choose int8 or fp8"),
        (MOE, "fp8", "vLLM reads experts in fp8 only where activations are in fp8 too"),
        (
            dataclasses.replace(CONFIGS["llama"], d_model=34),
            "int8",
            "gate_proj.weight has 34 inputs, and int8 needs a multiple of 4; choose fp8",
        ),
    ],
)
def test_what_no_server_could_read_is_refused(config, kind, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        export_huggingface(make_params(config), config, TOKENIZER, tmp_path / "out", quantize=kind)
    assert not list(tmp_path.iterdir())


@KINDS
def test_the_loss_of_accuracy_is_what_two_forward_passes_say(kind):
    config = CONFIGS["llama"]
    flat = make_params(config)
    tokens = np.random.default_rng(3).integers(0, 288, (3, 30))
    found = accuracy_loss(flat, config, tokens, kind)

    def log_p(weights):
        logits = logits_of(model_with(config, flat, weights), tokens)
        return np.asarray(jax.nn.log_softmax(logits))[:, :-1]

    tensors = family_tensors(family_of(config), config)
    plain = {name: t.joined(flat, np.dtype(np.float32)) for name, t in tensors.items()}
    log_p, log_q = log_p(plain), log_p(rounded(config, flat, kind))
    assert found.num_tokens == 87
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert found.divergence == pytest.approx(divergence, rel=1e-3)
    picked = [np.take_along_axis(x, tokens[:, 1:, None], -1).mean() for x in (log_p, log_q)]
    assert found.loss == pytest.approx(-picked[0], rel=1e-5)
    assert found.quantized_loss == pytest.approx(-picked[1], rel=1e-5)
    assert found.divergence > 0
    # What stands behind the end of a row counts for nothing.
    padded = np.pad(tokens, ((0, 0), (0, 5)), constant_values=-1)
    again = accuracy_loss(flat, config, padded, kind)
    np.testing.assert_allclose(again[1:], found[1:], rtol=1e-3)
    assert set(found.weights) == {
        *(f"attention.w_{x}" for x in "qkvo"),
        *(f"mlp.w_{x}" for x in ("gate", "up", "down")),
    }
    # int8's steps are a 127th of the largest, fp8's a 16th of each: about 0.5 and 2.5 %.
    bounds = (0.001, 0.02) if kind == "int8" else (0.01, 0.04)
    assert all(bounds[0] < error < bounds[1] for error in found.weights.values()), found.weights
    assert len(found.table().splitlines()) == 7 + 4


def test_rows_that_no_loss_can_be_measured_on_are_refused():
    config = CONFIGS["llama"]
    flat = make_params(config)
    with pytest.raises(ValueError, match=r"tokens has shape \(3, 1\); give rows of 2"):
        accuracy_loss(flat, config, np.zeros((3, 1), np.int32), "int8")
    with pytest.raises(ValueError, match="tokens has an id 288; the model has 288"):
        accuracy_loss(flat, config, np.array([[0, 288]]), "int8")
    assert random_rows(288, 64).shape == (4, 64)
