"""What a model takes: parameters, arithmetic, cache. Counted from its parameters' shapes.

Nothing is allocated: `jax.eval_shape` makes the parameters of any size in half a second.

Legend: L layers, S tokens a row.
"""

from __future__ import annotations

import functools
import math

import jax
from flax import nnx

from agentx.model.config import ModelConfig
from agentx.model.transformer import abstract_transformer


def num_params(config: ModelConfig) -> int:
    """How many numbers the parameters hold, tied embeddings counted once."""
    return sum(math.prod(w.shape) for w in _params(config))


def num_active_params(config: ModelConfig) -> int:
    """How many of them one token meets: of a mixture of experts, those of the experts it takes."""
    return round(sum(math.prod(w.shape) * _share(w, config) for w in _params(config)))


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """Floating-point operations to train one token of a causal row of `length` tokens.

    6 for each weight of a matrix product (2 forward, 4 backward), of experts those that a token
    takes, the unembedding included and the look-up of the embedding not; and in attention, of each
    layer and head, 6 for each number of a key and of a value that is seen. In the mean a token sees
    (length + 1) / 2 tokens, itself among them, or what a window leaves of that. Recomputation is
    not counted.
    """
    products = sum(
        math.prod(w.shape) * _share(w, config)
        for w in _params(config)
        if w.get_metadata("num_inputs")
    )
    products += config.vocab_size * config.d_model
    seen = sum(mean_keys_seen(length, kind.window) for kind in config.kinds)
    attention = config.num_heads * (config.head_dim + config.value_dim) * seen
    return 6.0 * (products + attention)


def mean_keys_seen(length: int, window: int | None) -> float:
    """How many tokens one of a causal row of `length` sees in the mean, itself among them."""
    window = length if window is None else min(window, length)
    # Those within the first window see all before them, the others a whole window.
    return (window * (window + 1) / 2 + (length - window) * window) / length


def cache_bytes_per_token(config: ModelConfig) -> int:
    """What the keys and values of one token take, of all layers, in the type of the activations."""
    kv_heads, key_size, value_size = config.cache_dims
    numbers = config.num_layers * kv_heads * (key_size + value_size)
    return numbers * config.compute_dtype.itemsize


def _share(param: nnx.Variable, config: ModelConfig) -> float:
    """How much of a parameter one token meets."""
    if config.moe is None or "experts" not in param.get_metadata("axes"):
        return 1.0
    return config.moe.experts_per_token / config.moe.num_experts


@functools.lru_cache(maxsize=4)  # every function here asks for them
def _params(config: ModelConfig) -> list[nnx.Variable]:
    params = nnx.state(abstract_transformer(config))
    return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
