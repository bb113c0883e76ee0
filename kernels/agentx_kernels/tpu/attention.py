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
from agentx_kernels.tpu.common import LOG2_E, LOWEST, Options

Array = Any

# Of a core's VMEM: the rest is the compiler's.
_VMEM_SHARE = 0.9


def check(q: Array, v: Array, plan: BlockPlan) -> None:
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
    if any(x % 128 for x in (config.query, config.key, config.part)):
        raise ValueError(f"attention on TPU takes blocks and parts that 128 divides, not {config}")
    if config.query % config.part or config.key % config.part:
        raise ValueError(f"the part must divide both blocks, but they are {config}")


def forward(
    q: Array,
    k: Array,
    v: Array,
    layout: TreeLayout,
    plan: BlockPlan,
    sinks: Array | None,
    scores: Scores,
    hardware: Hardware,
    interpret: Any,
) -> tuple[Array, Array]:
    """The output and its log-sum-exp f32[B, S, N]: minus infinity where nothing is seen."""
    length = q.shape[1]
    sinks = jnp.full(q.shape[2], -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    o, lse = flash_forward.forward(
        _to_heads(q, plan),
        _to_heads(k, plan),
        _to_heads(v, plan),
        _tokens(layout, plan),
        plan,
        sinks,
        _options(scores, hardware, interpret),
    )
    lse = jnp.where(lse > LOWEST, lse / LOG2_E, -jnp.inf)
    return _from_heads(o, length), lse.swapaxes(1, 2)[:, :length]


def backward(
    q: Array,
    k: Array,
    v: Array,
    layout: TreeLayout,
    plan: BlockPlan,
    scores: Scores,
    do: Array,
    lse: Array,
    delta: Array,
    hardware: Hardware,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """dq, dk and dv. delta: the sums of do * o, less the cotangent of lse."""
    length = q.shape[1]
    lse = jnp.maximum(lse * LOG2_E, LOWEST)
    dq, dk, dv = flash_backward.backward(
        _to_heads(q, plan),
        _to_heads(k, plan),
        _to_heads(v, plan),
        _tokens(layout, plan),
        plan,
        _to_heads(do, plan),
        _to_heads(lse[..., None], plan)[..., 0],
        _to_heads(delta[..., None], plan)[..., 0],
        _options(scores, hardware, interpret),
    )
    dq = (dq * scores.scale).astype(q.dtype)
    return _from_heads(dq, length), _from_heads(dk, length), _from_heads(dv, length)


def _options(scores: Scores, hardware: Hardware, interpret: Any) -> Options:
    return Options(scores, int(_VMEM_SHARE * hardware.vmem_bytes), interpret)


def _filling(plan: BlockPlan) -> int:
    """What makes the length a multiple of both blocks."""
    config = plan.config
    return -plan.length % max(config.query, config.key)


def _to_heads(x: Array, plan: BlockPlan) -> Array:
    """[B, S, N, H] -> [B, N, S, H], filled up with zeros."""
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, _filling(plan)), (0, 0)))


def _from_heads(x: Array, length: int) -> Array:
    return x[:, :, :length].swapaxes(1, 2)


def _tokens(layout: TreeLayout, plan: BlockPlan) -> Array:
    """i32[B, 3, S]: index, depth and subtree end; what fills up sees nothing and is not seen."""
    parts = [(layout.index, BEYOND), (layout.position, 0), (layout.subtree_end, 0)]
    pad = ((0, 0), (0, _filling(plan)))
    return jnp.stack([jnp.pad(x, pad, constant_values=filling) for x, filling in parts], axis=1)
