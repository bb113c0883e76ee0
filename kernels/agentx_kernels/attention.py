"""Attention over a TreeLayout: the public face, which checks and hands on.

There is one path today, plain XLA in blocks (xla.py), for every platform. A feature that it lacks
(windows, soft caps, sinks) is no argument here, so that asking for it fails instead of being
ignored.

Legend: B batch, S tokens, N heads, K KV heads, H head size of q and k, Hv head size of v.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from agentx_kernels.hardware import Hardware
from agentx_kernels.layout import TreeLayout
from agentx_kernels.xla import flash_attention

Array = jax.Array

# The most tokens in a block. On CPU the scores of a block should stay in cache: 128 measured best
# of 64 to 512 (kernels/README.md). Accelerators want matrix products that fill their units.
_BLOCK_SIZE = {"cpu": 128, "gpu": 512, "tpu": 512}


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    layout: TreeLayout,
    hardware: Hardware,
    scale: float | None = None,
    block_size: int | None = None,
) -> Array:
    """softmax(scale * q @ k.T) @ v, where each token sees itself and its ancestors in `layout`.

    q: float[B, S, N, H]; k: [B, S, K, H]; v: [B, S, K, Hv]; N a multiple of K, query heads
      n * N / K to (n + 1) * N / K - 1 sharing KV head n. One type for all three.
    layout: TreeLayout of i32[B, S]; see agentx_kernels.layout.
    hardware: the device it will run on, from agentx_kernels.hardware.
    scale: what the dot products are multiplied by; H ** -0.5 if None.
    block_size: the most tokens in a block; chosen by hardware if None. Any S will do.

    Returns [B, S, N, Hv] in the type of v. Softmax and sums are f32 (f64 for f64 inputs). A token
    that sees nothing, such as padding, gets output 0 and passes no gradient. Differentiable in
    q, k and v; memory grows with S, forward and backward.

    Raises ValueError where shapes or types do not fit together.
    """
    _check(q, k, v, layout)
    if not isinstance(hardware, Hardware):
        raise ValueError(
            f"hardware is {hardware!r}; give a Hardware, such as agentx_kernels.hardware's "
            f"hardware('cpu')"
        )
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be 1 or more")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    block_size = _BLOCK_SIZE[hardware.platform] if block_size is None else block_size
    return flash_attention(q, k, v, layout, scale, _even_block(q.shape[1], block_size))


def _even_block(length: int, most: int) -> int:
    """Blocks of one size, as few as `most` allows, so that the last is not mostly filling."""
    num_blocks = -(-length // most)
    even = -(-length // num_blocks)
    return even if num_blocks == 1 else min(most, -(-even // 8) * 8)


def _check(q: Array, k: Array, v: Array, layout: TreeLayout) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must have 4 dims [B, S, heads, size], not {shapes}")
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        raise ValueError(f"q, k and v must share batch and length, not {shapes}")
    if 0 in q.shape + k.shape + v.shape:
        raise ValueError(f"no dim of q, k and v may be 0, but they are {shapes}")
    if k.shape[2] != v.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k and v must have one number of heads, which divides that of q, not {shapes}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head size, not {shapes}")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"q, k and v must share one floating-point type, not {q.dtype}, {k.dtype}, {v.dtype}: "
            f"cast them"
        )
    for name, x in zip(layout._fields, layout, strict=True):
        if x.shape != q.shape[:2] or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"layout.{name} must be integers {q.shape[:2]} like the tokens of q, not "
                f"{x.dtype} {x.shape}"
            )
