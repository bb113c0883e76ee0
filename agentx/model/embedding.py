"""Looking up embeddings in a table that lies over the mesh.

A table's vocabulary is split over `tensor`, its D over the same devices as rows and tokens. So a
device finds a part of D of everybody's tokens, and an all-to-all brings each its own tokens' whole
D. The gradient goes back the same way, to the part of the table that a device has. Left to itself
XLA brings all tokens of all devices to each of them where tokens of a row are split; and a table
whose D is whole would take more room than a device's tokens do, twice with its gradient.

Legend: B rows, S tokens a row, V vocabulary, D model, E devices that D is split over.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from agentx.sharding import RULES

Array = jax.Array

_EMBED = RULES["embed"]
(_VOCAB,) = RULES["vocab"]


def look_up(table_VD: Array, tokens_BS: Array, dtype: jnp.dtype) -> Array:
    """[B, S, D] in dtype, the rows of the table that tokens i32[B, S] name, laid out as a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return table_VD[tokens_BS].astype(dtype)
    tokens = PartitionSpec(RULES["batch"], RULES["sequence"])
    return jax.shard_map(
        functools.partial(_look_up_on_mesh, dtype=dtype),
        in_specs=(PartitionSpec(_VOCAB, _EMBED), tokens),
        out_specs=tokens,
        check_vma=False,  # what the devices of `tensor` give is a sum over them
    )(table_VD, tokens_BS)


def _look_up_on_mesh(table_VD: Array, tokens_BS: Array, dtype: jnp.dtype) -> Array:
    tokens_EBS = lax.all_gather(tokens_BS, _EMBED)
    own_EBS = tokens_EBS - lax.axis_index(_VOCAB) * table_VD.shape[0]
    is_own_EBS = (own_EBS >= 0) & (own_EBS < table_VD.shape[0])
    parts_EBSD = jnp.where(is_own_EBS[..., None], table_VD[own_EBS].astype(dtype), 0)
    x_1BSD = lax.all_to_all(parts_EBSD, _EMBED, split_axis=0, concat_axis=3, tiled=True)
    return lax.psum(x_1BSD[0], _VOCAB)
