"""The decoder and its key-value cache."""

from agentx.model.cache import KVCache, fork, init_cache, write
from agentx.model.config import ModelConfig
from agentx.model.transformer import Transformer, abstract_transformer, init_params

__all__ = [
    "KVCache",
    "ModelConfig",
    "Transformer",
    "abstract_transformer",
    "fork",
    "init_cache",
    "init_params",
    "write",
]
