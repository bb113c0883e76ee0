"""The model families of others, each a table that is read both ways.

A family says how config.json gives what `ModelConfig` holds, item by item, and which of its tensors
each of our parameters is, row by row. To add a family is to add a table here: nothing else knows
any by name. Which family a config of ours is of follows from the tables too: the first whose
config.json, read again, gives the same config.

Names are those of transformers, which wrote most of the checkpoints there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from agentx.interop.items import (
    Biases,
    Either,
    Experts,
    Item,
    Latent,
    LayerTypes,
    Ours,
    QueryScale,
    Rope,
    RopeLayers,
    Same,
    Theirs,
    TwoRopes,
    Window,
    shortest_period,
)
from agentx.model.config import ModelConfig
from agentx.model.rope import DynamicRope

# Settings of how a model is trained and run: no family says anything of them.
_OURS_ALONE = ("init", "dtype", "param_dtype", "remat", "context_parallel")


class Row(NamedTuple):
    """One parameter here and there.

    ours: the path in the parameters, joined by dots, without the place (see `ModelConfig.places`).
    theirs: the tensor's name; "{layer}" in it means that ours is stacked over layers on its first
    axis, "{expert}" that it is over experts on the next. num_inputs: how many axes of ours (layers
    and experts not counted) the product sums over, 0 for what is added to its result and so is a
    vector there; None for what is the same array on both sides.
    every_other: 0 or 1 where ours is every other number of theirs on its last axis, from that one.
    """

    ours: str
    theirs: str
    num_inputs: int | None = None
    every_other: int | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """A family: what config.json calls it, the items of its config and the rows of its tensors."""

    architecture: str
    model_type: str
    items: tuple[Item, ...]
    rows: tuple[Row, ...]

    def read(self, about: Mapping[str, Any], place: object) -> ModelConfig:
        """The config of a config.json. `place` opens the sentence of the ValueError."""
        settings: dict[str, Any] = {}
        for item in self.items:
            try:
                settings |= item.read(about)
            except KeyError as error:
                raise ValueError(f"{place} lacks {error.args[0]}") from None
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
        return ModelConfig(**settings)

    def write(self, config: ModelConfig, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A config.json, without the tokenizer's keys.

        like: one that was read before: what we know nothing of stays, and what says the same as
        config stays as it is said there.
        """
        about = {**(like or {}), "architectures": [self.architecture]}
        about["model_type"] = self.model_type
        for item in self.items:
            if like is None or not self._says(item, like, config):
                about |= item.write(config)
        return about

    @staticmethod
    def _says(item: Item, like: Mapping[str, Any], config: ModelConfig) -> bool:
        """Whether `like` gives the settings of an item as config has them."""
        try:
            read = item.read(like)
        except (KeyError, ValueError):
            return False
        return all(getattr(config, name) == value for name, value in read.items())

    def differences(self, config: ModelConfig) -> list[str]:
        """The settings of config that this family's config.json does not hold as they are."""
        config = _plain(config)
        try:
            again = _plain(self.read(self.write(config), self.model_type))
        except ValueError as error:
            return [str(error)]
        names = [field.name for field in dataclasses.fields(ModelConfig)]
        return [name for name in names if getattr(again, name) != getattr(config, name)]


def family_of(config: ModelConfig) -> Family:
    """The first family that has models like this. Raises ValueError where there is none."""
    differences = {family.model_type: family.differences(config) for family in FAMILIES}
    for family in FAMILIES:
        if not differences[family.model_type]:
            return family
    nearest = min(differences, key=lambda name: len(differences[name]))
    named = ", ".join(f"{n} = {getattr(config, n, '')!r}" for n in differences[nearest])
    raise ValueError(
        f"no model of others is like this one, so nobody else could run it; the nearest family is "
        f"{nearest}, which lacks {named}"
    )


def _plain(config: ModelConfig) -> ModelConfig:
    """`config` in one form, whatever it says of how it is trained and run."""
    plain: dict[str, Any] = {name: getattr(ModelConfig, name) for name in _OURS_ALONE}
    plain["window_pattern"] = shortest_period([kind.window for kind in config.kinds])
    plain["rope_pattern"] = shortest_period([kind.rope for kind in config.kinds])
    if "local" not in plain["rope_pattern"]:  # then it says nothing
        plain["local_rope_theta"] = ModelConfig.local_rope_theta
    if isinstance(config.rope_scaling, DynamicRope):
        # config.json has one number for the original length and the longest row: see `write_rope`.
        plain["max_length"] = config.rope_scaling.original_length
    if config.moe is not None:  # config.json says nothing of how tokens are spread in training
        plain["moe"] = dataclasses.replace(config.moe, balance="none", balance_rate=0.0)
    if config.latent is None:
        plain["attention_scale"] = config.softmax_scale
    return dataclasses.replace(config, **plain)


# --------------------------------------------------------------------------------------------------
# What several families have
# --------------------------------------------------------------------------------------------------

_LAYER = "model.layers.{layer}."
_ENDS = (
    Row("embed", "model.embed_tokens.weight"),
    Row("final_norm.scale", "model.norm.weight"),
    Row("lm_head", "lm_head.weight"),
)
_PROJECTIONS = (
    Row("layers.attention.w_q", _LAYER + "self_attn.q_proj.weight", 1),
    Row("layers.attention.w_k", _LAYER + "self_attn.k_proj.weight", 1),
    Row("layers.attention.w_v", _LAYER + "self_attn.v_proj.weight", 1),
    Row("layers.attention.w_o", _LAYER + "self_attn.o_proj.weight", 2),
)
_QKV_BIASES = (
    Row("layers.attention.b_q", _LAYER + "self_attn.q_proj.bias", 0),
    Row("layers.attention.b_k", _LAYER + "self_attn.k_proj.bias", 0),
    Row("layers.attention.b_v", _LAYER + "self_attn.v_proj.bias", 0),
)
_BIASES = (*_QKV_BIASES, Row("layers.attention.b_o", _LAYER + "self_attn.o_proj.bias", 0))
_QK_NORMS = (
    Row("layers.attention.q_norm.scale", _LAYER + "self_attn.q_norm.weight", 0),
    Row("layers.attention.k_norm.scale", _LAYER + "self_attn.k_norm.weight", 0),
)
_MLP = (
    Row("layers.mlp.w_gate", _LAYER + "mlp.gate_proj.weight", 1),
    Row("layers.mlp.w_up", _LAYER + "mlp.up_proj.weight", 1),
    Row("layers.mlp.w_down", _LAYER + "mlp.down_proj.weight", 1),
)
_MLP_BIASES = (
    Row("layers.mlp.b_gate", _LAYER + "mlp.gate_proj.bias", 0),
    Row("layers.mlp.b_up", _LAYER + "mlp.up_proj.bias", 0),
    Row("layers.mlp.b_down", _LAYER + "mlp.down_proj.bias", 0),
)
_PRE_NORMS = (
    Row("layers.attention_norm.scale", _LAYER + "input_layernorm.weight"),
    Row("layers.mlp_norm.scale", _LAYER + "post_attention_layernorm.weight"),
)
_POST_NORMS = (
    Row("layers.attention_post_norm.scale", _LAYER + "post_attention_layernorm.weight"),
    Row("layers.mlp_post_norm.scale", _LAYER + "post_feedforward_layernorm.weight"),
)
_BOTH_NORMS = (
    Row("layers.attention_norm.scale", _LAYER + "input_layernorm.weight"),
    Row("layers.mlp_norm.scale", _LAYER + "pre_feedforward_layernorm.weight"),
    *_POST_NORMS,
)
_LLAMA_ROWS = (*_ENDS, *_PRE_NORMS, *_PROJECTIONS, *_MLP)

_SIZES = (
    Same("vocab_size", "vocab_size"),
    Same("d_model", "hidden_size"),
    Same("num_layers", "num_hidden_layers"),
    Same("num_heads", "num_attention_heads"),
    Same("num_kv_heads", "num_key_value_heads", lambda about: about["num_attention_heads"]),
    Same("max_length", "max_position_embeddings"),
)
_HEADS = Same(
    "head_dim", "head_dim", lambda about: about["hidden_size"] // about["num_attention_heads"]
)
_FEED_FORWARD = Same("d_ff", "intermediate_size")
_SILU = Theirs({"hidden_act": "silu"})
_NO_QK_NORM = Ours({"qk_norm": "none"})
_UNTIED = Same("tie_embeddings", "tie_word_embeddings", False)
_TIED = Same("tie_embeddings", "tie_word_embeddings", True)
_MLP_BIAS = Same("mlp_bias", "mlp_bias", False)


def _epsilon(default: float) -> Same:
    return Same("norm_eps", "rms_norm_eps", default)


_GEMMA = (
    *_SIZES,
    _HEADS,
    _FEED_FORWARD,
    _TIED,
    _epsilon(1e-6),
    Biases(),
    QueryScale(),
    Theirs({"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False}),
    Ours(
        {
            "norms": "both",
            "norm_plus_one": True,
            "scale_embeddings": True,
            "activation": "gelu_tanh",
        }
    ),
)

# --------------------------------------------------------------------------------------------------
# The families
# --------------------------------------------------------------------------------------------------

LLAMA = Family(
    "LlamaForCausalLM",
    "llama",
    (
        *_SIZES,
        _HEADS,
        _FEED_FORWARD,
        _UNTIED,
        _epsilon(1e-6),
        Rope(),
        Biases(),
        _MLP_BIAS,
        _SILU,
        _NO_QK_NORM,
    ),
    (*_LLAMA_ROWS, *_BIASES, *_MLP_BIASES),
)
MISTRAL = Family(
    "MistralForCausalLM",
    "mistral",
    (
        *_SIZES,
        _HEADS,
        _FEED_FORWARD,
        _UNTIED,
        _epsilon(1e-6),
        Rope(),
        Window(4096),
        _SILU,
        _NO_QK_NORM,
    ),
    _LLAMA_ROWS,
)
QWEN2 = Family(
    "Qwen2ForCausalLM",
    "qwen2",
    (
        *_SIZES,
        _HEADS,
        _FEED_FORWARD,
        _UNTIED,
        _epsilon(1e-6),
        Rope(),
        LayerTypes(),
        _SILU,
        _NO_QK_NORM,
        Ours({"qkv_bias": True}),
    ),
    (*_LLAMA_ROWS, *_QKV_BIASES),
)
QWEN3 = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    (
        *_SIZES,
        Same("head_dim", "head_dim", 128),
        _FEED_FORWARD,
        _UNTIED,
        _epsilon(1e-6),
        Rope(),
        LayerTypes(),
        Biases(),
        _SILU,
        Ours({"qk_norm": "head"}),
    ),
    (*_LLAMA_ROWS, *_BIASES, *_QK_NORMS),
)
SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    "smollm3",
    (
        *_SIZES,
        _HEADS,
        _FEED_FORWARD,
        _TIED,
        _epsilon(1e-6),
        Rope(2_000_000.0),
        RopeLayers(),
        Biases(),
        _MLP_BIAS,
        _SILU,
        _NO_QK_NORM,
        Theirs({"use_sliding_window": False}),
    ),
    (*_LLAMA_ROWS, *_BIASES, *_MLP_BIASES),
)
OLMO2 = Family(
    "Olmo2ForCausalLM",
    "olmo2",
    (
        *_SIZES,
        _HEADS,
        _FEED_FORWARD,
        _UNTIED,
        _epsilon(1e-5),
        Rope(),
        Biases(),
        _SILU,
        Ours({"norms": "post", "qk_norm": "all"}),
    ),
    (*_ENDS, *_POST_NORMS, *_PROJECTIONS, *_BIASES, *_QK_NORMS, *_MLP),
)
GEMMA2 = Family(
    "Gemma2ForCausalLM",
    "gemma2",
    (
        *_GEMMA,
        Rope(),
        LayerTypes(period=2),
        _NO_QK_NORM,
        Same("logit_softcap", "final_logit_softcapping", 30.0),
        Same("attention_softcap", "attn_logit_softcapping", 50.0),
    ),
    (*_ENDS, *_BOTH_NORMS, *_PROJECTIONS, *_BIASES, *_MLP),
)
GEMMA3 = Family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    (
        *_GEMMA,
        TwoRopes(),
        LayerTypes(period=6, ropes=True),
        Ours({"qk_norm": "head"}),
        Same("logit_softcap", "final_logit_softcapping", None),
        Same("attention_softcap", "attn_logit_softcapping", None),
    ),
    (*_ENDS, *_BOTH_NORMS, *_PROJECTIONS, *_BIASES, *_QK_NORMS, *_MLP),
)

_EXPERT = "mlp.experts.{expert}."
_EXPERTS = (
    Row("layers.moe.w_router", _LAYER + "mlp.gate.weight", 1),
    Row("layers.moe.experts.w_gate", _LAYER + _EXPERT + "gate_proj.weight", 1),
    Row("layers.moe.experts.w_up", _LAYER + _EXPERT + "up_proj.weight", 1),
    Row("layers.moe.experts.w_down", _LAYER + _EXPERT + "down_proj.weight", 1),
)
QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    (
        *_SIZES,
        _HEADS,
        _FEED_FORWARD,
        _UNTIED,
        _epsilon(1e-6),
        Rope(),
        Window(None),
        Biases(),
        _SILU,
        Ours({"qk_norm": "head"}),
        Theirs({"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []}),
        Experts(
            {"scores": "softmax"},
            (
                # transformers 5 writes num_local_experts; those before, and servers, num_experts.
                Either("num_experts", "num_experts", also="num_local_experts"),
                Same("experts_per_token", "num_experts_per_tok"),
                Same("d_ff", "moe_intermediate_size"),
                Same("normalize", "norm_topk_prob", False),
            ),
        ),
    ),
    (*_ENDS, *_PRE_NORMS, *_PROJECTIONS, *_BIASES, *_QK_NORMS, *_EXPERTS),
)
_BLOCK = "block_sparse_moe."
MIXTRAL = Family(
    "MixtralForCausalLM",
    "mixtral",
    (
        *_SIZES,
        _HEADS,
        _FEED_FORWARD,
        _UNTIED,
        _epsilon(1e-5),
        Rope(1_000_000.0),
        Window(None),
        _SILU,
        _NO_QK_NORM,
        Experts(
            {"scores": "softmax", "normalize": True},
            (
                Same("num_experts", "num_local_experts", 8),
                Same("experts_per_token", "num_experts_per_tok", 2),
                Same("d_ff", "intermediate_size"),
            ),
        ),
    ),
    (
        *_ENDS,
        *_PRE_NORMS,
        *_PROJECTIONS,
        Row("layers.moe.w_router", _LAYER + _BLOCK + "gate.weight", 1),
        Row("layers.moe.experts.w_gate", _LAYER + _BLOCK + "experts.{expert}.w1.weight", 1),
        Row("layers.moe.experts.w_down", _LAYER + _BLOCK + "experts.{expert}.w2.weight", 1),
        Row("layers.moe.experts.w_up", _LAYER + _BLOCK + "experts.{expert}.w3.weight", 1),
    ),
)
GPT_OSS = Family(
    "GptOssForCausalLM",
    "gpt_oss",
    (
        *_SIZES,
        Same("head_dim", "head_dim", 64),
        _FEED_FORWARD,
        _UNTIED,
        _epsilon(1e-5),
        Rope(150_000.0),
        LayerTypes(period=2, default_window=128),
        Biases(default=True),
        _SILU,
        Ours({"qk_norm": "none", "sinks": True, "activation": "clamped_swiglu"}),
        Experts(
            {"scores": "softmax_of_chosen", "router_bias": True, "expert_bias": True},
            (
                Same("num_experts", "num_local_experts"),
                Same("experts_per_token", "num_experts_per_tok", 4),
                Same("d_ff", "intermediate_size"),
            ),
        ),
    ),
    (
        *_ENDS,
        *_PRE_NORMS,
        *_PROJECTIONS,
        *_BIASES,
        Row("layers.attention.sink", _LAYER + "self_attn.sinks"),
        Row("layers.moe.w_router", _LAYER + "mlp.router.weight", 1),
        Row("layers.moe.b_router", _LAYER + "mlp.router.bias"),
        Row("layers.moe.experts.w_gate", _LAYER + "mlp.experts.gate_up_proj", every_other=0),
        Row("layers.moe.experts.w_up", _LAYER + "mlp.experts.gate_up_proj", every_other=1),
        Row("layers.moe.experts.b_gate", _LAYER + "mlp.experts.gate_up_proj_bias", every_other=0),
        Row("layers.moe.experts.b_up", _LAYER + "mlp.experts.gate_up_proj_bias", every_other=1),
        Row("layers.moe.experts.w_down", _LAYER + "mlp.experts.down_proj"),
        Row("layers.moe.experts.b_down", _LAYER + "mlp.experts.down_proj_bias"),
    ),
)
_SHARED = "mlp.shared_experts."
DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    (
        *_SIZES,
        Latent(),
        _FEED_FORWARD,
        _UNTIED,
        _epsilon(1e-6),
        Rope(),
        _SILU,
        _NO_QK_NORM,
        Theirs({"attention_bias": False, "rope_interleave": True}),
        Same("num_dense_layers", "first_k_dense_replace", 3),
        Experts(
            {"scores": "sigmoid"},
            (
                Same("num_experts", "n_routed_experts"),
                Same("experts_per_token", "num_experts_per_tok", 8),
                Same("d_ff", "moe_intermediate_size"),
                Same("normalize", "norm_topk_prob", True),
                Same("scale", "routed_scaling_factor", 2.5),
                Same("num_groups", "n_group", 1),
                Same("groups_per_token", "topk_group", 1),
            ),
            shared=True,
        ),
    ),
    (
        *_ENDS,
        *_PRE_NORMS,
        Row("layers.attention.w_q", _LAYER + "self_attn.q_proj.weight", 1),
        Row("layers.attention.w_q_a", _LAYER + "self_attn.q_a_proj.weight", 1),
        Row("layers.attention.q_norm.scale", _LAYER + "self_attn.q_a_layernorm.weight"),
        Row("layers.attention.w_q_b", _LAYER + "self_attn.q_b_proj.weight", 1),
        Row("layers.attention.w_kv_a", _LAYER + "self_attn.kv_a_proj_with_mqa.weight", 1),
        Row("layers.attention.kv_norm.scale", _LAYER + "self_attn.kv_a_layernorm.weight"),
        Row("layers.attention.w_kv_b", _LAYER + "self_attn.kv_b_proj.weight", 1),
        Row("layers.attention.w_o", _LAYER + "self_attn.o_proj.weight", 2),
        *_MLP,
        *_EXPERTS,
        Row("layers.moe.correction_bias", _LAYER + "mlp.gate.e_score_correction_bias"),
        Row("layers.moe.shared.w_gate", _LAYER + _SHARED + "gate_proj.weight", 1),
        Row("layers.moe.shared.w_up", _LAYER + _SHARED + "up_proj.weight", 1),
        Row("layers.moe.shared.w_down", _LAYER + _SHARED + "down_proj.weight", 1),
    ),
)

FAMILIES = (
    LLAMA,
    QWEN3,
    QWEN2,
    MISTRAL,
    SMOLLM3,
    OLMO2,
    GEMMA2,
    GEMMA3,
    QWEN3_MOE,
    MIXTRAL,
    GPT_OSS,
    DEEPSEEK_V3,
)
