"""The face of the attention kernels for TPU: [B, S, N, H] in and out, any length.

Legend: B batch, S tokens, N heads, K KV heads, H head size of q and k, Hv of v.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from agentx_kernels.hardware import Hardware
from agentx_kernels.layout import TreeLayout
from agentx_kernels.plan import BEYOND, BlockPlan
from agentx_kernels.scores import Scores
from agentx_kernels.tpu import flash_backward, flash_forward
from agentx_kernels.tpu.masked_scores import LOG2_E, LOWEST, Options

Array = Any

# Of a core's VMEM: the rest is the compiler's.
_VMEM_SHARE = 0.9


def check(q: Array, v: Array, plan: BlockPlan, hardware: Hardware) -> None:
    """Raises ValueError for what the kernels lack."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"attention on TPU takes float32 and bfloat16, not {q.dtype}: cast q, k and v"
        )
    for name, size in (("q and k", q.shape[3]), ("v", v.shape[3])):
        if size % 64:
            raise ValueError(
                f"attention on TPU takes head sizes that 64 divides; {name} have {size}"
            )
    config = plan.config
    parts = config.parts(hardware, q.shape[3])
    if any(size % 128 for size in (config.query, config.key, *parts)):
        raise ValueError(f"attention on TPU takes blocks and parts that 128 divides, not {config}")
    if config.key % parts[0] or config.query % parts[1]:
        raise ValueError(
            f"forward_part must divide the block of keys and backward_part that of queries, but "
            f"they are {config}"
        )


def forward(
    q: Array,
    k: Array,
    v: Array,
    layouts: tuple[TreeLayout, TreeLayout],
    plan: BlockPlan,
    sinks: Array | None,
    scores: Scores,
    after: Array | None,
    hardware: Hardware,
    interpret: Any,
) -> tuple[Array, Array]:
    """The output and its log-sum-exp f32[B, S, N]: minus infinity where nothing is seen."""
    length = q.shape[1]
    sinks = jnp.full(q.shape[2], -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    o, lse = flash_forward.forward(
        _to_heads(q, plan.config.query),
        _to_heads(k, plan.config.key),
        _to_heads(v, plan.config.key),
        *_tokens(layouts, plan),
        plan,
        sinks,
        _options(scores, plan.config.parts(hardware, q.shape[3])[0], hardware, interpret),
        after,
    )
    lse = jnp.where(lse > LOWEST, lse / LOG2_E, -jnp.inf)
    return _from_heads(o, length), lse.swapaxes(1, 2)[:, :length]


def backward(
    q: Array,
    k: Array,
    v: Array,
    layouts: tuple[TreeLayout, TreeLayout],
    plan: BlockPlan,
    scores: Scores,
    do: Array,
    lse: Array,
    delta: Array,
    dtype: Any,
    after: Array | None,
    hardware: Hardware,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """dq, dk and dv, as `Path.backward` has them."""
    lse = jnp.maximum(lse * LOG2_E, LOWEST)
    dq, dk, dv = flash_backward.backward(
        _to_heads(q, plan.config.query),
        _to_heads(k, plan.config.key),
        _to_heads(v, plan.config.key),
        *_tokens(layouts, plan),
        plan,
        _to_heads(do, plan.config.query),
        _to_heads(lse[..., None], plan.config.query)[..., 0],
        _to_heads(delta[..., None], plan.config.query)[..., 0],
        _options(scores, plan.config.parts(hardware, q.shape[3])[1], hardware, interpret),
        dtype,
        after,
    )
    dq = (dq * scores.scale).astype(dtype or q.dtype)
    num_queries, num_keys = plan.lengths
    return _from_heads(dq, num_queries), _from_heads(dk, num_keys), _from_heads(dv, num_keys)


def _options(scores: Scores, part: int, hardware: Hardware, interpret: Any) -> Options:
    return Options(scores, part, int(_VMEM_SHARE * hardware.vmem_bytes), interpret)


def _to_heads(x: Array, block: int) -> Array:
    """[B, S, N, H] -> [B, N, S, H], filled up with zeros to whole blocks."""
    x = x.swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))


def _from_heads(x: Array, length: int) -> Array:
    return x[:, :, :length].swapaxes(1, 2)


def _tokens(layouts: tuple[TreeLayout, TreeLayout], plan: BlockPlan) -> tuple[Array, Array]:
    """i32[B, 2, S] of queries, index and depth; i32[B, 3, S] of keys, and subtree end.

    What fills up the last block sees nothing and is not seen.
    """
    queries, keys = layouts

    def stacked(fields: list[tuple[Array, int]], block: int) -> Array:
        rows = [
            jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=filling)
            for x, filling in fields
        ]
        return jnp.stack(rows, axis=1)

    return (
        stacked([(queries.index, BEYOND), (queries.position, 0)], plan.config.query),
        stacked([(keys.index, BEYOND), (keys.position, 0), (keys.subtree_end, 0)], plan.config.key),
    )
