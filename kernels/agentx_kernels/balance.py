"""In which order tokens lie over devices, so that attention gives each of them the same to do.

With a causal mask, the device that has the last tokens of a row works longest, twice the mean; with
packed documents and trees it depends on the row. So the blocks of a row are dealt to devices by how
many blocks of keys each visits: the longest first, each to the device with the least so far that
still has room. For one causal document that is the zigzag order: the n-th device has the n-th block
and the n-th from the end, and so on.

Masks and plans go by `TreeLayout.index`, which stays with its token: so an order changes nothing
but where things are computed.

Legend: B rows, S tokens a row, I blocks of a row, P parts, one to a device or a group of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from agentx_kernels.blocks import block_config
from agentx_kernels.hardware import Hardware
from agentx_kernels.layout import TreeLayout
from agentx_kernels.plan import make_plan, visits_of_queries

Array = jax.Array


def can_balance(length: int, parts: int, hardware: Hardware) -> bool:
    """Whether the parts of a row of `length` tokens are two whole blocks or more."""
    block = block_config(hardware, length // parts).query
    return parts > 1 and length % (parts * block) == 0 and length // parts > block


def balanced_order(
    layout: TreeLayout, parts: int, *, hardware: Hardware, window: int | None = None
) -> Array:
    """i32[B, S]: which token of the row comes at each place; a part has S / P places on end.

    Raises ValueError where `can_balance` says no. Jitted; it takes I steps of P comparisons.
    """
    batch, length = layout.index.shape
    if not can_balance(length, parts, hardware):
        raise ValueError(
            f"{parts} parts of a row of {length} tokens are not two whole blocks or more each: "
            f"leave the order as it is, or take rows that {parts} times the block divides"
        )
    config = block_config(hardware, length // parts)
    plan = make_plan(layout, config=config, window=window)
    dealt_BI = jax.vmap(lambda work_I: _deal(work_I, parts))(visits_of_queries(plan))
    # A part's blocks stay in the order of the row: so neighbours are visited one after the other.
    block_BI = jnp.argsort(dealt_BI, stable=True)
    token_BIQ = block_BI[:, :, None] * config.query + jnp.arange(config.query)
    return token_BIQ.reshape(batch, length).astype(jnp.int32)


def _deal(work_I: Array, parts: int) -> Array:
    """The part that each block goes to; all parts get as many blocks."""
    most = work_I.size // parts

    def give(carry, block):
        load_P, count_P, dealt_I = carry
        part = jnp.argmin(jnp.where(count_P < most, load_P, jnp.iinfo(jnp.int32).max))
        return (
            load_P.at[part].add(work_I[block]),
            count_P.at[part].add(1),
            dealt_I.at[block].set(part),
        ), None

    nothing = jnp.zeros(parts, jnp.int32), jnp.zeros(parts, jnp.int32), jnp.zeros_like(work_I)
    (_, _, dealt_I), _ = lax.scan(give, nothing, jnp.argsort(-work_I, stable=True))
    return dealt_I
