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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from agentx_kernels.hardware import Hardware
from agentx_kernels.paths import Layouts, Path
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


@dataclasses.dataclass(frozen=True)
class RingPath:
    """What a Path gives, of keys that travel. Inside a shard_map, each device's queries and keys.

    Both take the arguments of a Path's, but of keys, values and their layout each device has a
    part, and plans have a leading axis R: entry t is of the device's queries against the keys of
    the t-th device before it in the ring.
    """

    path: Path
    ring: Ring

    @property
    def hardware(self) -> Hardware:
        return self.path.hardware

    def forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        layouts: Layouts,
        plans: BlockPlan,
        sinks: Array | None,
        after: Array | None = None,
    ) -> tuple[Array, Array]:
        """As `Path.forward`. after: waited for before the last turn."""
        queries, keys = layouts

        def attend(moving: Any, plan: BlockPlan, **last: Any) -> tuple[Array, Array]:
            k, v, keys = moving
            return self.path.forward(q, k, v, (queries, keys), plan, **({"sinks": None} | last))

        def step(carry: Any, plan: BlockPlan) -> tuple[Any, None]:
            moving, so_far = carry
            arriving = self.ring.pass_on(moving)
            return (arriving, _merged(so_far, attend(moving, plan))), None

        dtype = jnp.promote_types(q.dtype, jnp.float32)
        heads = q.shape[:3]
        nothing = jnp.zeros((*heads, v.shape[3]), dtype), jnp.full(heads, -jnp.inf, dtype)
        (moving, so_far), _ = lax.scan(
            step, ((k, v, keys), nothing), jax.tree.map(lambda x: x[:-1], plans)
        )
        last = attend(moving, jax.tree.map(lambda x: x[-1], plans), sinks=sinks, after=after)
        o, lse = _merged(so_far, last)
        return o.astype(v.dtype), lse

    def backward(
        self,
        q: Array,
        k: Array,
        v: Array,
        layouts: Layouts,
        plans: BlockPlan,
        do: Array,
        lse: Array,
        delta: Array,
        dtype: Any = None,
        after: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """As `Path.backward`. after: waited for before the first turn."""
        queries, keys = layouts

        def gradients(
            moving: Any, plan: BlockPlan, after: Array | None = None
        ) -> tuple[Array, tuple[Array, Array]]:
            k, v, keys = moving
            dq, dk, dv = self.path.backward(
                q, k, v, (queries, keys), plan, do, lse, delta, lse.dtype, after
            )
            return dq, (dk, dv)

        def step(carry: Any, plan: BlockPlan) -> tuple[Any, None]:
            moving, total_dq, dkv = carry
            arriving = self.ring.pass_on(moving)
            # Of the keys that this device now works on, summed by the devices before it.
            before = self.ring.pass_on(dkv)
            dq, own = gradients(moving, plan)
            return (arriving, total_dq + dq, jax.tree.map(jnp.add, before, own)), None

        moving = k, v, keys
        arriving = self.ring.pass_on(moving)
        dq, dkv = gradients(moving, jax.tree.map(lambda x: x[0], plans), after)
        (_, dq, dkv), _ = lax.scan(step, (arriving, dq, dkv), jax.tree.map(lambda x: x[1:], plans))
        dk, dv = self.ring.pass_on(dkv)
        return (
            dq.astype(dtype or q.dtype),
            dk.astype(dtype or k.dtype),
            dv.astype(dtype or v.dtype),
        )


def _merged(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    """Outputs over two sets of keys, and their log-sum-exps, as of both sets."""
    lse = jnp.logaddexp(x[1], y[1])
    top = jnp.where(lse == -jnp.inf, 0, lse)  # where neither has anything to see
    o_x, o_y = (o.astype(lse.dtype) * jnp.exp(part - top)[..., None] for o, part in (x, y))
    return o_x + o_y, lse
