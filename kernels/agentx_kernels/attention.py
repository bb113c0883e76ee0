"""Attention over a TreeLayout: the public face, which checks, plans and picks the path.

There are two paths: Pallas kernels on TPU (tpu/), and plain XLA in blocks (xla.py) for CPU, and for
GPU until it has kernels of its own. Each takes every argument there is here, or refuses in one
sentence what it lacks.

Legend: B batch, S tokens, N heads, K KV heads, H head size of q and k, Hv head size of v.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from agentx_kernels import xla
from agentx_kernels.blocks import BlockConfig, block_config
from agentx_kernels.hardware import Hardware
from agentx_kernels.layout import TreeLayout
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
    _check(q, k, v, layout, keys)
    _check_numbers(q, hardware, window, softcap, sinks)
    config = block_config(hardware, q.shape[1]) if config is None else config
    if min(dataclasses.astuple(config)) < 1:
        raise ValueError(f"the blocks are {config}; each must have 1 token or more")
    if plan is None:
        plan = make_plan(layout, config=config, window=window, keys=keys)
    made_for = plan.lengths, plan.config, plan.window
    given = (q.shape[1], k.shape[1]), config, window
    if made_for != given:
        raise ValueError(
            f"the plan was made for lengths, blocks and window {made_for}, not {given}: make one "
            f"for these"
        )
    if hardware.platform == "tpu":
        _tpu().check(q, v, plan)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    path = _Path(Scores(scale, softcap, window), hardware, interpret)
    o, lse = _attend(q, k, v, sinks, (layout, keys), plan, path)
    return (o, lse) if return_lse else o


@dataclasses.dataclass(frozen=True)
class _Path:
    scores: Scores
    hardware: Hardware
    interpret: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    layouts: tuple[TreeLayout, TreeLayout],
    plan: BlockPlan,
    path: _Path,
) -> tuple[Array, Array]:
    if path.hardware.platform == "tpu":
        return _tpu().forward(
            q, k, v, layouts, plan, sinks, path.scores, path.hardware, path.interpret
        )
    return xla.forward(q, k, v, layouts, plan, sinks, path.scores)


def _attend_forward(q, k, v, sinks, layouts, plan, path):
    o, lse = _attend(q, k, v, sinks, layouts, plan, path)
    return (o, lse), (q, k, v, sinks, layouts, plan, o, lse)


def _attend_backward(path, residuals, cotangents):
    q, k, v, sinks, layouts, plan, o, lse = residuals
    do, dlse = cotangents
    dtype = xla.accumulation_dtype(q)
    delta = jnp.sum(do.astype(dtype) * o.astype(dtype), -1) - dlse
    if path.hardware.platform == "tpu":
        gradients = _tpu().backward(
            q, k, v, layouts, plan, path.scores, do, lse, delta, path.hardware, path.interpret
        )
    else:
        gradients = xla.backward(q, k, v, layouts, plan, path.scores, do, lse, delta)
    dsinks = None
    if sinks is not None:
        share = jnp.exp(sinks.astype(dtype) - lse)  # of the sink in each softmax
        dsinks = -jnp.sum(share * delta, (0, 1)).astype(sinks.dtype)
    return *gradients, dsinks, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _tpu() -> Any:
    """The path with Pallas, which takes a second to import where nobody needs it."""
    from agentx_kernels.tpu import attention as tpu

    return tpu


def _check_numbers(
    q: Array, hardware: Hardware, window: int | None, softcap: float | None, sinks: Array | None
) -> None:
    if not isinstance(hardware, Hardware):
        raise ValueError(
            f"hardware is {hardware!r}; give a Hardware, such as agentx_kernels.hardware's "
            f"hardware('cpu')"
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be 1 or more, or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0, or None for none")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks must have one value a head, {q.shape[2:3]}, not {sinks.shape}")


def _check(q: Array, k: Array, v: Array, layout: TreeLayout, keys: TreeLayout) -> None:
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
