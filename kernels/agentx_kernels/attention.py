"""Attention over a TreeLayout: the public face, which checks, plans and picks the path.

There are two paths (paths.py): Pallas kernels on TPU (tpu/), and plain XLA in blocks (xla.py) for
CPU, and for GPU until it has kernels of its own. Each takes every argument there is here, or
refuses in one sentence what it lacks.

Legend: B batch, S tokens, N heads, K KV heads, H head size of q and k, Hv head size of v.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from agentx_kernels.blocks import BlockConfig, block_config
from agentx_kernels.hardware import Hardware
from agentx_kernels.layout import TreeLayout
from agentx_kernels.paths import Layouts, Path, sink_gradient
from agentx_kernels.plan import BlockPlan, make_plan
from agentx_kernels.scores import Scores

Array = jax.Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    layout: TreeLayout,
    hardware: Hardware,
    keys: TreeLayout | None = None,
    plan: BlockPlan | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    config: BlockConfig | None = None,
    return_lse: bool = False,
    interpret: Any = False,
) -> Any:
    """softmax(scale * q @ k.T) @ v, where each token sees itself and its ancestors in `layout`.

    q: float[B, S, N, H]; k: [B, S, K, H]; v: [B, S, K, Hv]; N a multiple of K, query heads
      n * N / K to (n + 1) * N / K - 1 sharing KV head n. One type for all three.
    layout: TreeLayout of i32[B, S]; see agentx_kernels.layout.
    keys: the layout of the keys, where they are others of the rows' tokens than the queries: k and
      v may then have another length.
    hardware: the device it will run on, from agentx_kernels.hardware.
    plan: of this layout, window and config, from agentx_kernels.plan: make it once a batch and give
      it to every layer. Made here if None.
    window: a token sees itself and ancestors less than `window` above it; all of them if None.
    softcap: scores become softcap * tanh(score / softcap).
    sinks: float[N], a score in each softmax of the head that has no value.
    scale: what the dot products are multiplied by; H ** -0.5 if None.
    config: the blocks, from agentx_kernels.blocks; chosen by hardware if None. Any S will do.
    return_lse: also the log-sum-exp of the scores, [B, S, N] in f32; differentiable.
    interpret: runs the TPU's kernels in Pallas' interpreter, for tests; as `pallas_call` takes it.

    Returns [B, S, N, Hv] in the type of v; with `return_lse` a pair. Softmax and sums are f32 (f64
    for f64 inputs). A token that sees nothing, such as padding, gets output 0, minus infinity as
    its log-sum-exp (the sink, where there is one), and passes no gradient. Differentiable in q, k,
    v and sinks; memory grows with S, forward and backward.

    Raises ValueError where shapes, types or the plan do not fit together, and for what the path of
    this hardware lacks.
    """
    keys = layout if keys is None else keys
    check_arrays(q, k, v, sinks, layout, keys)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    path = Path(Scores(scale, softcap, window), hardware, interpret)
    config = block_config(hardware, q.shape[1]) if config is None else config
    if plan is None:
        plan = make_plan(layout, config=config, window=window, keys=keys)
    check_plan(plan, (q.shape[1], k.shape[1]), config, window)
    path.check(q, v, plan)
    o, lse = _attend(q, k, v, sinks, (layout, keys), plan, path)
    return (o, lse) if return_lse else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    layouts: Layouts,
    plan: BlockPlan,
    path: Path,
) -> tuple[Array, Array]:
    return path.forward(q, k, v, layouts, plan, sinks)


def _attend_forward(q, k, v, sinks, layouts, plan, path):
    o, lse = _attend(q, k, v, sinks, layouts, plan, path)
    return (o, lse), (q, k, v, sinks, layouts, plan, o, lse)


def _attend_backward(path, residuals, cotangents):
    q, k, v, sinks, layouts, plan, o, lse = residuals
    do, dlse = cotangents
    delta = jnp.sum(do.astype(lse.dtype) * o.astype(lse.dtype), -1) - dlse
    gradients = path.backward(q, k, v, layouts, plan, do, lse, delta)
    return *gradients, sink_gradient(sinks, lse, delta), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def check_plan(
    plan: BlockPlan, lengths: tuple[int, int], config: BlockConfig, window: int | None
) -> None:
    """Raises ValueError where it was made for other lengths of queries and keys, or otherwise."""
    made_for = plan.lengths, plan.config, plan.window
    given = lengths, config, window
    if made_for != given:
        raise ValueError(
            f"the plan was made for lengths, blocks and window {made_for}, not {given}: make one "
            f"for these"
        )


def check_arrays(
    q: Array | jax.ShapeDtypeStruct,
    k: Array,
    v: Array,
    sinks: Array | None,
    layout: TreeLayout,
    keys: TreeLayout,
) -> None:
    """Raises ValueError where the arguments of `attention` do not fit together."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must have 4 dims [B, S, heads, size], not {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"q, k and v must share the batch, k and v the length, not {shapes}")
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
    for kind, given, tokens in (("layout", layout, q.shape[:2]), ("keys", keys, k.shape[:2])):
        for name, x in zip(given._fields, given, strict=True):
            if x.shape != tokens or not jnp.issubdtype(x.dtype, jnp.integer):
                raise ValueError(
                    f"{kind}.{name} must be integers {tokens} like the tokens it is of, not "
                    f"{x.dtype} {x.shape}"
                )
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks must have one value a head, {q.shape[2:3]}, not {sinks.shape}")
