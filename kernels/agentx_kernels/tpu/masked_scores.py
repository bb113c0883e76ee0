"""What the attention kernels for TPU share: scores, masks, shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax

from agentx_kernels.plan import KeyBlocks, QueryBlocks
from agentx_kernels.scores import Scores

Array = Any
Blocks = TypeVar("Blocks", QueryBlocks, KeyBlocks)

LANES = 128
LOG2_E = 1.4426950408889634
# Below any score. A row's maximum begins above what masks, so that 2 ** (HIDDEN - maximum) is 0.
HIDDEN = -2e30
LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Options:
    """What a kernel is compiled with.

    part: how many tokens' scores exist at a time. vmem_limit: bytes. interpret: as `pallas_call`
    takes it.
    """

    scores: Scores
    part: int
    vmem_limit: int
    interpret: Any = False


def at_block(blocks: Blocks, b: Array, i: Array) -> Blocks:
    """One block's integers, read from scalar memory."""
    return type(blocks)(*(x[b, i] for x in blocks))


def allowed(query: Sequence[Array], key: Sequence[Array], window: int | None) -> Array:
    """The mask, of the index (and depth) of queries and index, depth and subtree end of keys."""
    seen = (key[0] <= query[0]) & (query[0] < key[2])
    if window is not None:
        seen &= query[1] - key[1] < window
    return seen


def capped(s: Array, softcap: float | None) -> Array:
    """cap * tanh(s / cap), of scores that are in base 2."""
    if softcap is None:
        return s
    cap = softcap * LOG2_E
    return cap * jnp.tanh(s / cap)


def over_lanes(x: Array, width: int) -> Array:
    """[rows, 128], each row one value, as [rows, width]."""
    return x[:, :width] if width <= LANES else jnp.tile(x, (1, width // LANES))


def dot(x: Array, y: Array, over_x: int, over_y: int) -> Array:
    """f32 sums; f32 factors are not cut to bf16 on the way."""
    return lax.dot_general(
        x,
        y,
        (((over_x,), (over_y,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
