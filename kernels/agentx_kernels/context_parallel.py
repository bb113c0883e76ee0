"""Attention over a mesh: rows, heads and the tokens of a row split over devices.

Rows and heads are independent. Where tokens are split too, each device keeps its queries and
gathers the keys and values of the whole row (all-gather), whose gradients are summed back to the
devices that they came from. Each device plans for its own queries: nothing else of the attention
knows that there are others.

Left out: Ulysses, ring and USP; balance, so that with a causal mask the device with the last tokens
works longest.

Legend: B rows, S tokens a row, N heads, K KV heads, H and Hv head sizes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from agentx_kernels.attention import attention
from agentx_kernels.blocks import block_config
from agentx_kernels.hardware import Hardware
from agentx_kernels.layout import TreeLayout
from agentx_kernels.plan import BlockPlan, make_plan

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Split:
    """The axes of a mesh that rows, heads and tokens of a row are split over."""

    rows: tuple[str, ...]
    heads: str
    tokens: str


def make_split_plan(
    layout: TreeLayout, split: Split, *, hardware: Hardware, window: int | None = None
) -> BlockPlan:
    """Every device's plan, of its queries against all keys of its rows, for `split_attention`.

    layout: i32[B, S] each, to be split over rows and tokens. Under a mesh, jitted.
    """
    tokens = PartitionSpec(split.rows, split.tokens)

    def plan(layout: TreeLayout) -> BlockPlan:
        keys = _gathered(layout, split)
        config = block_config(hardware, layout.index.shape[1])
        return make_plan(layout, config=config, window=window, keys=keys)

    return _on_mesh(plan, (tokens,), tokens)(layout)


def split_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    layout: TreeLayout,
    plan: BlockPlan,
    split: Split,
    hardware: Hardware,
    sinks: Array | None = None,
    **given: Any,
) -> Array:
    """`attention` of arrays that lie over the mesh that the computation is traced under.

    plan: from `make_split_plan`, for this split. given: softcap, scale and interpret, as for
    `attention`. Raises ValueError as that does.
    """
    heads = PartitionSpec(split.rows, split.tokens, split.heads)
    tokens = PartitionSpec(split.rows, split.tokens)

    def attend(
        q: Array, k: Array, v: Array, sinks: Array | None, layout: TreeLayout, plan: BlockPlan
    ) -> Any:
        k, v, keys = (_gathered(x, split) for x in (k, v, layout))
        return attention(
            q,
            k,
            v,
            layout=layout,
            keys=keys,
            plan=plan,
            config=plan.config,
            window=plan.window,
            hardware=hardware,
            sinks=sinks,
            **given,
        )

    in_specs = (heads, heads, heads, PartitionSpec(split.heads), tokens, tokens)
    return _on_mesh(attend, in_specs, heads)(q, k, v, sinks, layout, plan)


def _gathered(x: Any, split: Split) -> Any:
    return jax.tree.map(functools.partial(_gather, axis_name=split.tokens), x)


def _gather(x: Array, axis_name: str) -> Array:
    return lax.all_gather(x, axis_name, axis=1, tiled=True)


def _on_mesh(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Each device's part by itself. What each makes is its own, which JAX need not check."""
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)
