"""Attention over a mesh: rows, heads and the tokens of a row split over devices.

Rows and heads are independent. Where tokens are split too, what a device lacks can come to it in
two ways, which go together:

- Heads are exchanged for tokens (ulysses.py): in groups of `Split.ulysses` neighbours each device
  gives up heads and gets the whole group's tokens for those it keeps.
- Between the groups keys and values are gathered, or they travel from group to group in a ring
  (ring.py), which holds those of two groups at a time and not of all.

    all_gather   groups of one device, gathered
    ulysses      one group of all devices: nothing is left to gather
    ring         groups of one device, in a ring
    usp          groups of several, in a ring (Fang and Zhao, 2024)

Each device plans for the queries and keys that it meets: nothing else of the attention knows that
there are others. Gradients go back the way that their values came.

Legend: B rows, S tokens a row, N heads, K KV heads, H and Hv head sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from agentx_kernels.attention import check_arrays, check_plan
from agentx_kernels.blocks import block_config
from agentx_kernels.hardware import Hardware
from agentx_kernels.layout import TreeLayout
from agentx_kernels.paths import Path
from agentx_kernels.plan import BlockPlan, make_plan
from agentx_kernels.ring import Ring, RingPath
from agentx_kernels.scores import Scores
from agentx_kernels.ulysses import HeadExchange, attention_in_parts

Array = jax.Array
Strategy = Literal["auto", "all_gather", "ulysses", "ring", "usp"]

# The share of a device's memory that the keys and values of whole rows may take, with their
# gradients: one layer's, beside parameters, moments and activations.
_GATHERED_SHARE = 1 / 16


@dataclasses.dataclass(frozen=True)
class Split:
    """The axes of a mesh that rows, heads and tokens of a row are split over.

    ulysses: how many neighbours along the tokens exchange heads for tokens; 1 for none.
    ring: between those groups keys and values travel in a ring; else they are gathered.
    """

    rows: tuple[str, ...]
    heads: str
    tokens: str
    ulysses: int = 1
    ring: bool = False

    def num_groups(self) -> int:
        """Of the mesh that the computation is traced under."""
        return jax.sharding.get_abstract_mesh().shape[self.tokens] // self.ulysses


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks", "queries", "keys"],
    meta_fields=["split"],
)
@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """What every device needs beside q, k and v; made once a batch.

    blocks: its queries against the keys that it meets; in a ring, against each group's, one by one.
    queries, keys: the layouts of the tokens that it attends from and, before a ring turns, to.
    """

    blocks: BlockPlan
    queries: TreeLayout
    keys: TreeLayout
    split: Split


def choose_split(
    strategy: Strategy,
    split: Split,
    *,
    devices: int,
    kv_heads: int,
    gathered_bytes: float,
    hardware: Hardware,
) -> Split:
    """`split` with what `strategy` says of ulysses and ring.

    devices: along the tokens. kv_heads: of one device. gathered_bytes: the keys and values of its
    whole rows, of one layer, and their gradients.

    One device has nobody to share with. "auto" is ulysses where KV heads suffice, for then all
    devices have the same to do; else all_gather where what is gathered fits into a sixteenth of
    the memory; else usp, with the largest groups that KV heads suffice for, which is a ring where
    that is one device.

    Raises ValueError where KV heads do not suffice for what is asked for.
    """
    if devices == 1:
        return dataclasses.replace(split, ulysses=1, ring=False)
    largest = math.gcd(devices, kv_heads)
    if strategy == "auto":
        fits = gathered_bytes <= _GATHERED_SHARE * hardware.hbm_bytes
        strategy = "ulysses" if largest == devices else "all_gather" if fits else "usp"
        if strategy == "usp" and largest == 1:
            strategy = "ring"
    if strategy == "all_gather":
        return dataclasses.replace(split, ulysses=1, ring=False)
    if strategy == "ring":
        return dataclasses.replace(split, ulysses=1, ring=True)
    needed = devices if strategy == "ulysses" else 2
    if largest < needed:
        raise ValueError(
            f"{strategy} over {devices} devices gives each group's devices KV heads of their own, "
            f"but each has {kv_heads} to share: choose ring or all_gather, or fewer devices"
        )
    return dataclasses.replace(split, ulysses=largest, ring=strategy == "usp")


def make_split_plan(
    layout: TreeLayout, split: Split, *, hardware: Hardware, window: int | None = None
) -> SplitPlan:
    """Every device's plan, for `split_attention`.

    layout: i32[B, S] each, to be split over rows and tokens. Under a mesh, jitted.
    """
    tokens = PartitionSpec(split.rows, split.tokens)
    num_groups = split.num_groups()

    def plan(layout: TreeLayout) -> tuple[BlockPlan, TreeLayout, TreeLayout]:
        queries = _gathered(layout, split.tokens, _groups(split, num_groups))
        keys = _gathered(queries, split.tokens, _places(split, num_groups))
        length = queries.index.shape[1]
        config = block_config(hardware, length)

        def against(keys: TreeLayout) -> BlockPlan:
            return make_plan(queries, config=config, window=window, keys=keys)

        if not split.ring:
            return against(keys), queries, keys
        at = lax.axis_index(split.tokens) // split.ulysses - jnp.arange(num_groups)

        def of_group(group: Array) -> TreeLayout:
            return jax.tree.map(
                lambda x: lax.dynamic_slice_in_dim(x, group * length, length, axis=1), keys
            )

        return lax.map(lambda group: against(of_group(group)), at % num_groups), queries, queries

    blocks = PartitionSpec(None, *tokens) if split.ring else tokens
    made, queries, keys = _on_mesh(plan, (tokens,), (blocks, tokens, tokens))(layout)
    return SplitPlan(made, queries, keys, split)


def split_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    plan: SplitPlan,
    hardware: Hardware,
    softcap: float | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    interpret: Any = False,
) -> Array:
    """`attention` of arrays that lie over the mesh that the computation is traced under.

    plan: from `make_split_plan`, for this layout and window. The rest is as for `attention`.
    Raises ValueError as that does, and where heads do not divide as the split would have it.
    """
    split = plan.split
    num_groups = split.num_groups()
    heads = PartitionSpec(split.rows, split.tokens, split.heads)
    tokens = PartitionSpec(split.rows, split.tokens)
    blocks = PartitionSpec(None, *tokens) if split.ring else tokens
    scale = q.shape[3] ** -0.5 if scale is None else scale
    window = plan.blocks.window

    def attend(
        q: Array,
        k: Array,
        v: Array,
        sinks: Array | None,
        blocks: BlockPlan,
        queries: TreeLayout,
        keys: TreeLayout,
    ) -> Array:
        exchange = HeadExchange(split.tokens, _groups(split, num_groups))
        kept = exchange.kept(q)
        k, v, sinks = exchange.to_heads(k), exchange.to_heads(v), exchange.share(sinks)
        if not split.ring:
            places = _places(split, num_groups)
            k, v = _gathered(k, split.tokens, places), _gathered(v, split.tokens, places)
        check_arrays(kept, k, v, sinks, queries, keys)
        check_plan(blocks, (kept.shape[1], k.shape[1]), blocks.config, window)
        path = Path(Scores(scale, softcap, window), hardware, interpret)
        path.check(kept, v, blocks)
        how = RingPath(path, _ring(split, num_groups)) if split.ring else path
        return attention_in_parts(q, k, v, sinks, (queries, keys), blocks, how, exchange)

    in_specs = (heads, heads, heads, PartitionSpec(split.heads), blocks, tokens, tokens)
    arrays = plan.blocks, plan.queries, plan.keys
    return _on_mesh(attend, in_specs, heads)(q, k, v, sinks, *arrays)


def _groups(split: Split, num_groups: int) -> tuple[tuple[int, ...], ...]:
    """The devices along the tokens, by group."""
    size = split.ulysses
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(num_groups))


def _places(split: Split, num_groups: int) -> tuple[tuple[int, ...], ...]:
    """Those of the same place in their groups: what gathers over all groups' tokens."""
    return tuple(zip(*_groups(split, num_groups), strict=True))


def _ring(split: Split, num_groups: int) -> Ring:
    devices = num_groups * split.ulysses
    following = tuple((i, (i + split.ulysses) % devices) for i in range(devices))
    return Ring(split.tokens, following)


def _gathered(x: Any, axis: str, groups: tuple[tuple[int, ...], ...]) -> Any:
    """Every [B, S, ...] of x with all devices' tokens."""
    if len(groups[0]) == 1:
        return x
    gather = functools.partial(lax.all_gather, axis_name=axis, axis_index_groups=groups)

    def gathered(x: Array) -> Array:
        if x.ndim < 4:
            return gather(x, axis=1, tiled=True)
        # Each device's part as the outermost dim: of any other XLA for TPU sums up all the
        # gradient on every device, and then keeps a part.
        x_BNSH = jnp.moveaxis(gather(x.swapaxes(1, 2)), 0, 2)
        return x_BNSH.reshape(*x_BNSH.shape[:2], -1, x_BNSH.shape[4]).swapaxes(1, 2)

    return jax.tree.map(gathered, x)


def _on_mesh(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Each device's part by itself. What each makes is its own, which JAX need not check."""
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)
