"""The sizes of a model, for the screen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from agentx.cli.config import load_config
from agentx.model import sizes
from agentx.model.config import ModelConfig


def model_table(path: str, overrides: Sequence[str]) -> str:
    """The sizes of the model in a run file or a model file, as lines to print."""
    loaded = load_config(path, overrides, root=("TrainConfig", "ModelConfig"))
    config: ModelConfig = loaded if isinstance(loaded, ModelConfig) else loaded.model
    params, length = sizes.num_params(config), config.max_length
    weights = params * jnp.dtype(config.param_dtype).itemsize
    cache = sizes.cache_bytes_per_token(config) * length
    gflops = sizes.train_flops_per_token(config, length) / 1e9
    rows = {
        **{name: str(value) for name, value in dataclasses.asdict(config).items()},
        "parameters": f"{params:,}",
        "weights": _mebibytes(weights),
        "to train": f"{_mebibytes(2 * weights + 8 * params)}, with gradients and Adam's moments",
        "KV cache": f"{_mebibytes(cache)} a row of {length} tokens",
        "arithmetic": f"{gflops:,.3f} GFLOP to train a token",
    }
    return "\n".join(f"{name:<16}{value}" for name, value in rows.items())


def _mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
