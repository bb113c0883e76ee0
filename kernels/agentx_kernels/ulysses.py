"""Heads exchanged for tokens (Ulysses, Jacobs et al., 2023), while other heads are attended.

In a group of neighbours each device gives up heads and gets the whole group's tokens for those that
it keeps. It attends from them in parts, a few heads at a time. What one part gives, its output and
on the way back the gradient of its queries, travels while the next part is computed; what comes in
arrives in one piece, beside the projections before it. Every part but the first two starts when
what the part before last gave has arrived, for left to itself XLA for TPU computes all parts first
and moves everything after.

Legend: B rows, S tokens of one device, T of all keys, N heads, K KV heads, H and Hv head sizes.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from agentx_kernels.paths import Layouts, Path, sink_gradient
from agentx_kernels.plan import BlockPlan
from agentx_kernels.ring import RingPath

Array = jax.Array

# Beside each part one array can travel at a time. Of the bytes that two layers of an 8B model move
# on a tpu7x, two parts let 60 % do so beside computation, and four 86 %.
_MOST_PARTS = 4


@dataclasses.dataclass(frozen=True)
class HeadExchange:
    """Of heads for tokens within groups of devices along an axis of the mesh, and back.

    groups: the devices along the axis, by group; all of one size.
    """

    axis: str
    groups: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return len(self.groups[0])

    def kept(self, x: Array) -> jax.ShapeDtypeStruct:
        """What `to_heads` makes of x. Raises ValueError where heads do not divide."""
        B, S, N, H = x.shape
        if N % self.size:
            raise ValueError(
                f"{self.size} devices cannot share {N} heads evenly: choose another split "
                f"(context_parallel.choose_split)"
            )
        return jax.ShapeDtypeStruct((B, S * self.size, N // self.size, H), x.dtype)

    def to_heads(self, x: Array) -> Array:
        """[B, S, N, H] -> [B, S * size, N / size, H]."""
        if self.size == 1:
            return x
        B, _, kept, H = self.kept(x).shape
        x_BNSH = x.swapaxes(1, 2).reshape(B, self.size, kept, -1, H)
        x_BNSH = jnp.moveaxis(self._all_to_all(jnp.moveaxis(x_BNSH, 1, 0)), 0, 2)
        return x_BNSH.reshape(B, kept, -1, H).swapaxes(1, 2)

    def to_tokens(self, x: Array) -> Array:
        """The inverse."""
        if self.size == 1:
            return x
        B, S, N, H = x.shape
        x_BNSH = x.swapaxes(1, 2).reshape(B, N, self.size, S // self.size, H)
        x_BNSH = jnp.moveaxis(self._all_to_all(jnp.moveaxis(x_BNSH, 2, 0)), 0, 1)
        return x_BNSH.reshape(B, -1, S // self.size, H).swapaxes(1, 2)

    def share(self, x: Array | None) -> Array | None:
        """[N] -> [N / size], of the heads that this device keeps."""
        if x is None or self.size == 1:
            return x
        kept = x.shape[0] // self.size
        place = lax.axis_index(self.axis) % self.size
        return lax.dynamic_slice_in_dim(x, place * kept, kept)

    def joined(self, parts: list[Array]) -> Array:
        """Parts of every device's heads, each from `to_tokens`, in the order of the heads."""
        B, S, N, H = parts[0].shape
        by_device = [x.reshape(B, S, self.size, N // self.size, H) for x in parts]
        return jnp.concatenate(by_device, 3).reshape(B, S, -1, H)

    def _all_to_all(self, x: Array) -> Array:
        """x[i] to device i of the group, and what came from there in its place.

        The dim that is exchanged is the outermost, so what goes to one device lies in one piece and
        as attention takes it. Left to XLA, heads were exchanged one row of 128 numbers at a time,
        between copies, in programs that a million tokens took a minute and a half to compile.
        """
        return lax.all_to_all(x, self.axis, 0, 0, axis_index_groups=self.groups, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attention_in_parts(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    layouts: Layouts,
    plan: BlockPlan,
    path: Path | RingPath,
    exchange: HeadExchange,
) -> Array:
    """[B, S, N, Hv]: of one device's tokens and all heads, both ways. Inside a shard_map.

    q: [B, S, N, H], of the same; k: [B, T, K, H]; v: [B, T, K, Hv]; sinks: [N / size]: of the heads
      that the device keeps. layouts, plan: of the group's tokens and of the keys, as path has them.
    """
    return _forward(q, k, v, sinks, layouts, plan, path, exchange)[0]


def _forward(q, k, v, sinks, layouts, plan, path, exchange):
    q = exchange.to_heads(q)
    num_parts = _num_parts(q, k, path) if exchange.size > 1 else 1
    queries = jnp.split(q, num_parts, 2)
    shares = [None] * num_parts if sinks is None else jnp.split(sinks, num_parts)
    arrived: list[Array] = []
    outputs, lses = [], []
    for i in range(num_parts):
        own = queries[i], _of_part(k, i, num_parts), _of_part(v, i, num_parts)
        after = arrived[i - 2] if i >= 2 else None
        o, lse = path.forward(*own, layouts, plan, shares[i], after)
        arrived.append(exchange.to_tokens(o))
        outputs.append(o)
        lses.append(lse)
    return exchange.joined(arrived), (q, k, v, sinks, layouts, plan, outputs, lses)


def _backward(path, exchange, residuals, do):
    q, k, v, sinks, layouts, plan, outputs, lses = residuals
    num_parts = len(outputs)
    queries = jnp.split(q, num_parts, 2)
    # Of keys that several parts attend to, the gradient is a sum that is rounded once.
    dtype = lses[0].dtype if num_parts > k.shape[2] else None
    cotangents = jnp.split(exchange.to_heads(do), num_parts, 2)
    arrived: list[Array] = []
    dks, dvs, deltas = [], [], []
    for i in range(num_parts):
        own = queries[i], _of_part(k, i, num_parts), _of_part(v, i, num_parts)
        do, o, lse = cotangents[i], outputs[i], lses[i]
        delta = jnp.sum(do.astype(lse.dtype) * o.astype(lse.dtype), -1)
        after = arrived[i - 2] if i >= 2 else None
        dq, dk, dv = path.backward(*own, layouts, plan, do, lse, delta, dtype, after)
        arrived.append(exchange.to_tokens(dq.astype(q.dtype)))
        dks.append(dk)
        dvs.append(dv)
        deltas.append(delta)
    dsinks = sink_gradient(sinks, jnp.concatenate(lses, 2), jnp.concatenate(deltas, 2))
    return exchange.joined(arrived), _summed(dks, k), _summed(dvs, v), dsinks, None, None


attention_in_parts.defvjp(_forward, _backward)


def _num_parts(q: Array, k: Array, path: Path | RingPath) -> int:
    """Of the heads that a device keeps: the most in which each has KV heads or shares of one.

    Each part gives all of a device's tensor cores heads to attend from, for they share them. In a
    ring no part shares a KV head, which would travel with each.
    """
    rows, _, heads, _ = q.shape
    kv_heads = k.shape[2]
    most = min(_MOST_PARTS, max(1, rows * heads // path.hardware.tensor_cores))
    own = [n for n in range(1, most + 1) if kv_heads % n == 0]
    shared = [n for n in range(1, most + 1) if heads % n == 0 == n % kv_heads]
    return max(own if isinstance(path, RingPath) else own + shared)


def _of_part(x: Array, i: int, num_parts: int) -> Array:
    """Of all KV heads [B, T, K, ...], those that part i attends to."""
    kv_heads = x.shape[2]
    start = i * kv_heads // num_parts
    return x[:, :, start : start + max(1, kv_heads // num_parts)]


def _summed(parts: list[Array], x: Array) -> Array:
    """The gradient of all KV heads x, from those of what each part attended to."""
    sharing = max(1, len(parts) // x.shape[2])
    sums = [sum(parts[i : i + sharing]) for i in range(0, len(parts), sharing)]
    return jnp.concatenate(sums, 2).astype(x.dtype)
