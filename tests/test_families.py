"""Every family, as transformers writes it: read, run, trained, decoded, written and loaded again.

The configs are small and use every feature that the family has. Weights are random, norms and
biases too, so that each of them matters.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agentx.interop.families import FAMILIES, family_of
from agentx.interop.huggingface import export_huggingface, import_huggingface, read_config
from agentx.interop.tensors import flatten_params
from agentx.model import abstract_transformer, init_cache, write
from agentx.tokenizer import Tokenizer
from agentx_kernels.layout import causal, packed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# Threads of small products wait for one another longer than they work, beside other tests.
torch.set_num_threads(1)

TOKENIZER = Tokenizer.bytes()
SIZES = {
    "vocab_size": 288,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BIASES = {"attention_bias": True}
WINDOW = {"sliding_window": 7}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, **WINDOW}

# Name: the class of the config, and what it is made with beside the sizes.
CASES = {
    "llama 2": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama 3": ("LlamaConfig", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama with biases": ("LlamaConfig", {"mlp_bias": True, "head_dim": 12, **BIASES}),
    "mistral": ("MistralConfig", {"head_dim": 12, **WINDOW}),
    "mistral without a window": ("MistralConfig", {"sliding_window": None}),
    "qwen 2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen 2 with windows": (
        "Qwen2Config",
        {"use_sliding_window": True, "max_window_layers": 2, **WINDOW},
    ),
    "qwen 3": ("Qwen3Config", {"head_dim": 12, "rope_parameters": YARN}),
    "smollm 3": ("SmolLM3Config", {"tie_word_embeddings": True}),
    "olmo 2": ("Olmo2Config", {"rms_norm_eps": 1e-5}),
    "gemma 2": (
        "Gemma2Config",
        {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0, **GEMMA},
    ),
    "gemma 3": (
        "Gemma3TextConfig",
        {
            "rope_parameters": TWO_ROPES,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 6,
            **GEMMA,
        },
    ),
    "qwen 3 moe": (
        "Qwen3MoeConfig",
        {
            "num_hidden_layers": 2,
            "moe_intermediate_size": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "head_dim": 12,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_hidden_layers": 2, "num_local_experts": 4, **WINDOW}),
    "gpt-oss": (
        "GptOssConfig",
        {
            "head_dim": 12,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "rope_parameters": {**YARN, "rope_theta": 1.5e5, "truncate": False},
            **WINDOW,
        },
    ),
    "deepseek v3": (
        "DeepseekV3Config",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 10,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek v3 without a query rank": (
        "DeepseekV3Config",
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 10,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}


@functools.cache
def theirs(name):
    kind, changes = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for buffer_name, buffer in model.named_buffers():
            if "correction_bias" in buffer_name:
                buffer.add_(0.1 * torch.randn(buffer.shape))
    return model.float().eval()


@pytest.fixture(scope="module", params=CASES)
def read(request, tmp_path_factory):
    """Their model, the folder they wrote, and the config and parameters that we read of it."""
    folder = tmp_path_factory.mktemp("theirs") / "model"
    model = theirs(request.param)
    model.save_pretrained(folder)
    return model, folder, *import_huggingface(folder)


def ours(config, arrays):
    model = abstract_transformer(config)
    params = nnx.state(model)
    leaves = flatten_params(params)
    structure = jax.tree.structure(params)
    return nnx.merge(
        nnx.graphdef(model), jax.tree.unflatten(structure, [arrays[name] for name in leaves])
    )


@nnx.jit
def forward(model, tokens, layout):
    return logits_of(model, model(tokens, layout).hidden)


def logits_of(model, hidden):
    logits = hidden @ model.unembedding().T
    cap = model.config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def random_tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(3, SIZES["vocab_size"], (batch, length))


def test_logits_are_theirs_of_a_padded_and_of_a_packed_batch(read):
    model, _, config, arrays = read
    tokens = random_tokens(2, 40)
    mask = np.ones((2, 40), np.int64)
    mask[1, 25:] = 0
    documents = tokens[:1, :23], tokens[:1, 23:], tokens[1:, :9], tokens[1:, 9:]
    with torch.no_grad():
        padded = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).logits
        apart = torch.cat([model(torch.from_numpy(x)).logits[0] for x in documents])
    assert float(padded.abs().max()) > 1
    found = forward(ours(config, arrays), jnp.asarray(tokens), causal(2, 40))
    np.testing.assert_allclose(found[0], padded[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found[1, :25], padded[1, :25], atol=1e-4, rtol=0)
    layout = packed([[23, 17], [9, 31]], 40)
    found = forward(ours(config, arrays), jnp.asarray(tokens), layout)
    np.testing.assert_allclose(found.reshape(80, -1), apart, atol=1e-4, rtol=0)


def test_loss_and_gradients_are_theirs(read):
    model, folder, config, arrays = read
    tokens = random_tokens(2, 33, seed=1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    model.zero_grad()
    logits = model(torch.from_numpy(inputs)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), torch.from_numpy(targets.reshape(-1))
    )
    loss.backward()
    # Their gradients, as a folder that is read as their weights are.
    wanted = type(model)(model.config)
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            parameter.copy_(model.get_parameter(name).grad)
    wanted.save_pretrained(folder.with_name("gradients"))
    _, wanted_arrays = import_huggingface(folder.with_name("gradients"))

    graphdef, params = nnx.split(ours(config, arrays))

    @jax.value_and_grad
    def value_and_gradient(params):
        model = nnx.merge(graphdef, params)
        logits = logits_of(model, model(jnp.asarray(inputs), causal(2, 32)).hidden)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
        return -picked.mean()

    found_loss, gradients = jax.jit(value_and_gradient)(params)
    assert float(found_loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, found in flatten_params(gradients).items():
        if "correction_bias" in name:  # no gradient reaches it, and theirs is no parameter
            continue
        difference = np.linalg.norm(found - wanted_arrays[name])
        assert difference <= 1e-3 * np.linalg.norm(wanted_arrays[name]), name


def test_decoding_over_a_cache_equals_the_full_forward_past_windows_and_lengths(read):
    *_, config, arrays = read
    model = ours(config, arrays)
    tokens = random_tokens(2, 40, seed=2)
    full = forward(model, jnp.asarray(tokens), causal(2, 40))

    @nnx.jit
    def step(model, tokens, cache):
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
        hidden, new = model.decode(tokens, positions, cache.k, cache.v, cache.lengths)
        counts = jnp.full(2, tokens.shape[1])
        return logits_of(model, hidden), write(cache, *new, counts)

    cache, found = init_cache(config, 2, 40), []
    for first, last in [(0, 12), *((i, i + 1) for i in range(12, 28)), (28, 40)]:
        logits, cache = step(model, jnp.asarray(tokens[:, first:last]), cache)
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, 1), full, atol=1e-4, rtol=0)


def test_what_is_written_again_is_bit_for_bit_what_was_read(read, tmp_path):
    model, folder, config, arrays = read
    written = export_huggingface(arrays, config, TOKENIZER, tmp_path / "out", like=folder)
    again, same = import_huggingface(written)
    assert again == config
    assert {k: v.tobytes() for k, v in same.items()} == {k: v.tobytes() for k, v in arrays.items()}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        written, dtype="float32", attn_implementation="eager"
    )
    assert type(loaded) is type(model)
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tokens = torch.from_numpy(random_tokens(1, 40))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_the_config_that_is_written_says_what_theirs_said(read, tmp_path):
    _, folder, config, arrays = read
    written = export_huggingface(arrays, config, TOKENIZER, tmp_path / "out", like=folder)
    before = transformers.AutoConfig.from_pretrained(folder).to_dict()
    after = transformers.AutoConfig.from_pretrained(written).to_dict()
    # Ids of the tokenizer are the run's own, and a folder knows where it lies.
    ours_alone = {"bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path", "dtype"}
    differs = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert differs <= ours_alone, {k: (before.get(k), after.get(k)) for k in differs}


@pytest.mark.parametrize("name", CASES)
def test_a_config_s_family_is_found_without_being_told(name, tmp_path):
    theirs(name).config.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about["architectures"] = [type(theirs(name)).__name__]
    (tmp_path / "config.json").write_text(json.dumps(about))
    family, config = read_config(tmp_path)
    found = family_of(config)
    # A model that two families have alike goes to the first.
    assert found is family or FAMILIES.index(found) < FAMILIES.index(family)
    assert found.differences(config) == []
