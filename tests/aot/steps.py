"""The trainer's step, to be compiled for a TPU that is not there."""

import dataclasses

import jax
import jax.numpy as jnp

from agentx.batch import Batch
from agentx.cli.config import load_config
from agentx.losses import NextTokenLoss
from agentx.model.transformer import abstract_transformer
from agentx.optim import OptimizerConfig, make_optimizer
from agentx.sharding import MeshConfig, batch_sharding, make_mesh
from agentx.step import abstract_state, make_train_step
from agentx_kernels import ahead
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import TreeLayout


def train_step(chip, shape, length, moe=None, **changes):
    """AdamW's step on one device, on a row of `length` tokens, with all of a layer computed again
    in the backward pass.

    shape: a file of configs/models. changes, moe: what ModelConfig and its MoEConfig have instead.
    """
    config = load_config(f"models/{shape}", root="ModelConfig")
    if moe:
        changes["moe"] = dataclasses.replace(config.moe, **moe)
    for name, value in changes.items():
        changes[name] = tuple(value) if isinstance(value, list) else value
    config = dataclasses.replace(config, remat="full", **changes)
    mesh = make_mesh(MeshConfig(), ahead.devices(ahead.SMALLEST[chip])[:1])
    model = abstract_transformer(config, hardware=hardware(chip))
    optimizer = make_optimizer(OptimizerConfig(), num_steps=1000)
    ids, weights = (
        jax.ShapeDtypeStruct((1, length), dtype, sharding=batch_sharding(mesh))
        for dtype in (jnp.int32, jnp.float32)
    )
    batch = Batch(ids, ids, weights, TreeLayout(ids, ids, ids))
    step = make_train_step(model, NextTokenLoss(), optimizer, mesh)
    return step.__wrapped__.lower(abstract_state(model, optimizer, mesh), batch)
