"""Attention in a ring: keys and values travel from device to device, queries stay.

Each device meets the keys and values of all others, one device's at a time (Liu et al., 2023).
While it works on what it has, that is already on its way to the next device, and the next is
arriving. Outputs of the parts are put together by their log-sum-exps. On the way back the gradients
of keys and values travel with them, one step behind, and arrive where they belong.

Each device holds the keys of two others at a time, not of all: memory does not grow with the number
of devices. What moves is moved by XLA (ppermute), which the scheduler starts early and ends late.

Legend: B rows, S tokens of one device, N heads, K KV heads, H and Hv head sizes, R devices.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from agentx_kernels.layout import TreeLayout
from agentx_kernels.paths import Path, sink_gradient
from agentx_kernels.plan import BlockPlan

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Ring:
    """axis: of the mesh. following: (device, the one that it sends to) for every device of it."""

    axis: str
    following: tuple[tuple[int, int], ...]

    def pass_on(self, x: Any) -> Any:
        """What the device before had."""
        return jax.tree.map(lambda a: lax.ppermute(a, self.axis, self.following), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def ring_attention(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    layout: TreeLayout,
    plans: BlockPlan,
    path: Path,
    ring: Ring,
) -> Array:
    """[B, S, N, Hv]: each device's queries over the keys of all of its ring. Inside a shard_map.

    q: [B, S, N, H]; k: [B, S, K, H]; v: [B, S, K, Hv]; sinks: [N]; layout: of the device's tokens.
    plans: every array with a leading axis R: entry t is of the device's queries against the keys of
      the t-th device before it in the ring.
    """
    return _forward(q, k, v, sinks, layout, plans, path, ring)[0]


def _forward(q, k, v, sinks, layout, plans, path, ring):
    def attend(moving: Any, plan: BlockPlan, sinks: Array | None) -> tuple[Array, Array]:
        k, v, keys = moving
        return path.forward(q, k, v, (layout, keys), plan, sinks)

    def step(carry, plan):
        moving, so_far = carry
        arriving = ring.pass_on(moving)
        return (arriving, _merged(so_far, attend(moving, plan, None))), None

    dtype = jnp.promote_types(q.dtype, jnp.float32)
    heads = q.shape[:3]
    nothing = jnp.zeros((*heads, v.shape[3]), dtype), jnp.full(heads, -jnp.inf, dtype)
    (moving, so_far), _ = lax.scan(
        step, ((k, v, layout), nothing), jax.tree.map(lambda x: x[:-1], plans)
    )
    last = jax.tree.map(lambda x: x[-1], plans)
    o, lse = _merged(so_far, attend(moving, last, sinks))
    o = o.astype(v.dtype)
    return o, (q, k, v, sinks, layout, plans, o, lse)


def _backward(path, ring, residuals, do):
    q, k, v, sinks, layout, plans, o, lse = residuals
    delta = jnp.sum(do.astype(lse.dtype) * o.astype(lse.dtype), -1)

    def gradients(moving: Any, plan: BlockPlan) -> tuple[Array, tuple[Array, Array]]:
        k, v, keys = moving
        layouts = layout, keys
        dq, *dkv = path.backward(q, k, v, layouts, plan, do, lse, delta, lse.dtype)
        return dq, tuple(dkv)

    def step(carry, plan):
        moving, total_dq, dkv = carry
        arriving = ring.pass_on(moving)
        # Of the keys that this device now works on, summed by the devices before it.
        before = ring.pass_on(dkv)
        dq, own = gradients(moving, plan)
        return (arriving, total_dq + dq, jax.tree.map(jnp.add, before, own)), None

    moving = k, v, layout
    arriving = ring.pass_on(moving)
    dq, dkv = gradients(moving, jax.tree.map(lambda x: x[0], plans))
    (_, dq, dkv), _ = lax.scan(step, (arriving, dq, dkv), jax.tree.map(lambda x: x[1:], plans))
    dk, dv = ring.pass_on(dkv)
    dsinks = sink_gradient(sinks, lse, delta)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dsinks, None, None


ring_attention.defvjp(_forward, _backward)


def _merged(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    """Outputs over two sets of keys, and their log-sum-exps, as of both sets."""
    lse = jnp.logaddexp(x[1], y[1])
    top = jnp.where(lse == -jnp.inf, 0, lse)  # where neither has anything to see
    o_x, o_y = (o.astype(lse.dtype) * jnp.exp(part - top)[..., None] for o, part in (x, y))
    return o_x + o_y, lse
