"""GGUF files, written as llama.cpp's converter does, read as the model that they are of.

The names are those of the gguf package's own map, and the models transformers', with random
weights; which numbers a file then holds is decided by the gguf package.
"""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agentx.cli.main import main
from agentx.cli.runs import load_run
from agentx.interop.families import family_of
from agentx.interop.gguf import open_gguf, read_gguf
from agentx.interop.huggingface import import_huggingface
from agentx.interop.tensors import flatten_params
from agentx.model import abstract_transformer
from agentx.model.rope import LinearRope, Llama3Rope, LongRope
from agentx.tokenizer import Tokenizer
from agentx_kernels.layout import causal

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Q = gguf.GGMLQuantizationType
# Multiples of 32, which a block of most types is.
SIZES = {
    "vocab_size": 288,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Name: the architecture, the class of the config, and what it is made with beside the sizes.
CASES = {
    "llama": ("llama", "LlamaConfig", {}),
    "llama, tied": ("llama", "LlamaConfig", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama with biases": ("llama", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", "LlamaConfig", {"rope_parameters": LLAMA3}),
    "mistral": ("llama", "MistralConfig", {"sliding_window": 7}),
    "qwen 2": ("qwen2", "Qwen2Config", {"rope_parameters": YARN}),
    "qwen 3": ("qwen3", "Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma 3": (
        "gemma3",
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 7,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


@functools.cache
def theirs(name):
    _, kind, changes = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.float().eval()


def as_converted(name):
    """The tensors of a model by the names that llama.cpp has, with what its converter changes."""
    architecture, *_ = CASES[name]
    model = theirs(name)
    config = model.config
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {}
    for full, tensor in model.state_dict().items():
        if full == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if architecture == "llama" and re.search(r"\.[qk]_proj\.", full):
            is_query = ".q_proj." in full
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            halves = array.reshape(heads, 2, -1, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if architecture == "gemma3" and full.endswith("norm.weight"):
            array = array + 1
        tensors[names.get_name(full, try_suffixes=(".weight", ".bias"))] = array
    if name == "llama 3":
        inverse = model.model.rotary_emb.inv_freq.numpy()
        size = 2 * len(inverse)
        plain = 1e4 ** -(np.arange(0, size, 2) / size)
        tensors["rope_freqs.weight"] = (plain / inverse).astype(np.float32)
    return tensors


def write(path, name, quantization=Q.F32, *, change=lambda tensors: None, **settings):
    """A file of a case. settings: changes of its metadata, None to leave one out."""
    architecture, *_ = CASES[name]
    config = theirs(name).config
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    about = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.value_length": getattr(config, "head_dim", None),
        "rope.freq_base": rope["rope_theta"],
        "vocab_size": config.vocab_size,
    }
    if architecture == "llama":
        about["rope.dimension_count"] = config.head_dim
    if name in ("mistral", "gemma 3"):
        about["attention.sliding_window"] = config.sliding_window
    if rope["rope_type"] in ("linear", "yarn"):
        about["rope.scaling.type"] = rope["rope_type"]
        about["rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] == "yarn":
        about["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    about |= {key.replace("__", "."): value for key, value in settings.items()}
    writer = gguf.GGUFWriter(path, about.pop("architecture", architecture))
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add |= {list: writer.add_array, bool: writer.add_bool}
    for key, value in about.items():
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    writer.add_token_list(["a", "b"])
    tensors = as_converted(name)
    change(tensors)
    for tensor_name, array in tensors.items():
        if array.ndim == 2:  # vectors stay f32, as llama.cpp has them
            raw = gguf.quants.quantize(np.ascontiguousarray(array), quantization)
            writer.add_tensor(tensor_name, raw, raw_dtype=quantization)
        else:
            writer.add_tensor(tensor_name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(config, arrays, tokens):
    model = abstract_transformer(config)
    params = nnx.state(model)
    leaves = [arrays[name] for name in flatten_params(params)]
    model = nnx.merge(nnx.graphdef(model), jax.tree.unflatten(jax.tree.structure(params), leaves))
    hidden = model(jnp.asarray(tokens), causal(*tokens.shape)).hidden
    return hidden @ model.unembedding().T


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_read_as_the_model_that_it_is_of(name, tmp_path):
    model = theirs(name)
    config, arrays = read_gguf(write(tmp_path / "model.gguf", name))
    model.save_pretrained(tmp_path / "folder")
    wanted_config, wanted = import_huggingface(tmp_path / "folder")
    assert arrays.keys() == wanted.keys()
    for key, array in arrays.items():
        # 1 that is added to a norm and taken away again rounds it.
        tolerance = 1e-7 if name == "gemma 3" and key.endswith("scale") else 0
        np.testing.assert_allclose(array, wanted[key], atol=tolerance, rtol=0, err_msg=key)
    family = family_of(config)
    # A file has the scaling of Llama 3 as divisors alone.
    differences = family.differences(config) or [
        key for key in vars(config) if getattr(config, key) != getattr(wanted_config, key)
    ]
    assert set(differences) <= {"rope_scaling", "window_pattern", "rope_pattern", "attention_scale"}
    assert [kind[:2] for kind in config.kinds] == [kind[:2] for kind in wanted_config.kinds]
    assert config.softmax_scale == wanted_config.softmax_scale
    assert ("rope_scaling" in differences) == (name == "llama 3")
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 40))
    with torch.no_grad():
        found = model(torch.from_numpy(tokens)).logits
    assert float(found.abs().max()) > 1
    np.testing.assert_allclose(logits(config, arrays, tokens), found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("name", ["llama", "gemma 3"])
def test_types_are_dequantized_before_they_are_taken_apart(kind, name, tmp_path):
    kind = Q[kind]
    path = write(tmp_path / "model.gguf", name, kind)
    config, arrays = read_gguf(path)

    def rounded(tensors):
        for key, array in tensors.items():
            if array.ndim == 2:
                raw = gguf.quants.quantize(np.ascontiguousarray(array), kind)
                tensors[key] = gguf.quants.dequantize(raw, kind)

    plain = write(tmp_path / "plain.gguf", name, change=rounded)
    same, wanted = read_gguf(plain)
    assert same == config
    for key, array in arrays.items():
        assert array.dtype == np.float32
        assert np.array_equal(array, wanted[key]), key


# transformers reads no scaling of the rotation, and of qwen3 no size of the heads.
@pytest.mark.parametrize("name", ["llama, tied", "qwen 2", "gemma 3"])
def test_transformers_reads_the_same_file_as_the_same_model(name, tmp_path):
    load = importlib.import_module("transformers.modeling_gguf_pytorch_utils").load_gguf_checkpoint
    path = write(tmp_path / "model.gguf", name, Q.Q8_0, rope__scaling__type=None)
    about = {**load(path)["config"], "vocab_size": SIZES["vocab_size"]}
    if name == "gemma 3":  # llama.cpp takes the size of a head for it, and transformers 256
        about["query_pre_attn_scalar"] = 32
    peer = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**about), attn_implementation="eager"
    ).eval()
    state = load(path, return_tensors=True, model_to_load=peer)["tensors"]
    missing, surplus = peer.load_state_dict(state, strict=False)
    assert not surplus
    assert set(missing) <= {"lm_head.weight"}
    peer.tie_weights()
    config, arrays = read_gguf(path)
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 40))
    with torch.no_grad():
        wanted = peer(torch.from_numpy(tokens)).logits
    np.testing.assert_allclose(logits(config, arrays, tokens), wanted, atol=1e-4, rtol=0)


def test_tensors_come_one_at_a_time(tmp_path):
    file = open_gguf(write(tmp_path / "model.gguf", "llama"))
    names = [tensor.name for tensor, _ in file.read()]
    assert len(names) == 3 + 9 * 3
    assert {tensor.name: array.shape for tensor, array in file.read()} == {
        tensor.name: tensor.shape for tensor, _ in file.read()
    }


def test_the_scaling_of_llama_3_is_known_by_its_divisors(tmp_path):
    sizes = ("attention__key_length", "attention__value_length", "rope__dimension_count")
    about = {"rope__freq_base": 5e5, **dict.fromkeys(sizes, 128)}
    wanted = Llama3Rope(32.0, 8192)
    divisors = 5e5 ** -(np.arange(0, 128, 2) / 128) / wanted.frequencies(5e5, 128, 64)[0]

    def change(tensors, divisors=divisors):
        tensors["rope_freqs.weight"] = divisors.astype(np.float32)

    path = write(tmp_path / "llama.gguf", "llama", change=change, **about)
    assert open_gguf(path).config.rope_scaling == wanted
    other = functools.partial(change, divisors=np.linspace(1, 2, 64))
    path = write(tmp_path / "other.gguf", "llama", change=other, **about)
    scaling = open_gguf(path).config.rope_scaling
    assert isinstance(scaling, LongRope)
    frequencies, factor = scaling.frequencies(5e5, 128, 64)
    plain = LinearRope(1.0).frequencies(5e5, 128, 64)[0]
    np.testing.assert_allclose(plain / frequencies, np.linspace(1, 2, 64), rtol=1e-6)
    assert factor == 1


def test_gemma_s_largest_model_divides_by_another_size_than_its_heads(tmp_path):
    path = write(tmp_path / "model.gguf", "gemma 3", block_count=62)
    assert open_gguf(path).config.softmax_scale == (64 / 4) ** -0.5


def rename(before, after):
    def change(tensors):
        tensors[after] = tensors.pop(before)

    return change


def cut(tensors):
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"][:64]


def drop(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"architecture": "mamba"}, "is of a 'mamba' model; only llama, qwen2, qwen3, gemma3 can"),
        ({"change": drop("blk.2.attn_k.weight")}, "has no tensor blk.2.attn_k.weight"),
        ({"change": drop("token_embd.weight")}, "has no tensor token_embd.weight"),
        (
            {"change": rename("blk.0.ffn_up.weight", "blk.0.ffn_gate_exps.weight")},
            "has no tensor blk.0.ffn_up.weight",
        ),
        (
            {"change": lambda tensors: tensors.update(extra=np.zeros(3, np.float32))},
            "has a tensor that the model has not: extra",
        ),
        (
            {"change": cut},
            r"blk.1.ffn_up.weight has shape \(64, 64\), and its metadata means \(96, 64\)",
        ),
        ({"block_count": None}, "lacks llama.block_count"),
        ({"expert_count": 4}, "has llama.expert_count, which cannot be read"),
        ({"feed_forward_length": [96, 96, 64]}, r"d_ff is \[96, 96, 64\]; only one number for all"),
        ({"attention__head_count": 0}, "num_heads is 0; only one number"),
        ({"rope__dimension_count": 8}, "rope.dimension_count is 8, and a head has 16"),
        (
            {"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0},
            "rope.scaling.type is 'longrope', which cannot be read",
        ),
        ({"rope__scaling__attn_factor": 2.0}, "has rope.scaling.attn_factor, which cannot"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(options, sentence, tmp_path):
    path = write(tmp_path / "model.gguf", "llama", **options)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "rope_freqs.weight"])
def test_a_tensor_of_another_architecture_is_left_over(name, tmp_path):
    def change(tensors):
        tensors[name] = np.ones(16, np.float32)

    path = write(tmp_path / "model.gguf", "qwen 3", change=change)
    with pytest.raises(ValueError, match=f"has a tensor that the model has not: {name}"):
        read_gguf(path)


def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path):
    path = write(tmp_path / "model.gguf", "llama")
    whole = path.read_bytes()
    head = len(whole) - 4 * sum(tensor.size for tensor in as_converted("llama").values())
    ends = [*range(4, head, 97), *np.linspace(head, len(whole) - 64, 9).astype(int)]
    for end in ends:
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="is cut short or damaged"):
            read_gguf(path)


def test_what_is_no_gguf_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match=r"model.gguf is no GGUF file: it begins with b'PK"):
        read_gguf(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is no GGUF file"):
        read_gguf(path)
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "none.gguf")


def test_one_part_of_several_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="is one of 3 parts; join them with llama-gguf-split"):
        open_gguf(tmp_path / "part.gguf")


def test_a_file_is_imported_as_a_run_that_has_its_parameters(tmp_path, capsys):
    path = write(tmp_path / "model.gguf", "llama", Q.Q8_0)
    Tokenizer.bytes().save(tmp_path / "tokenizer.model")
    assert main(["import", str(path), str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path} says too little of its tokenizer: give the tokenizer")
    assert main(["import", str(path), str(tmp_path / "run"), "--tokenizer", "none"]) == 2
    assert capsys.readouterr().err == "error: --tokenizer none: there is no such file\n"
    assert not (tmp_path / "run").exists()
    given = ["--tokenizer", str(tmp_path / "tokenizer.model")]
    assert main(["import", str(path), str(tmp_path / "run"), *given]) == 0
    config, wanted = read_gguf(path)
    policy = load_run(tmp_path / "run")
    assert policy.config == config
    for name, found in flatten_params(policy.params).items():
        np.testing.assert_array_equal(found, wanted[name], err_msg=name)
