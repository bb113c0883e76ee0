"""What experts make of a device's tokens, wherever the experts lie.

The pairs of a token and an expert are sorted by expert, and `lax.ragged_dot` multiplies each run of
them by its expert's weights.

On a mesh this runs inside a shard_map. Over the mesh axis `expert` each device holds some of the
experts; tokens go to their experts and come back by all-to-all. Its buffers have a fixed size:
`capacity` places for each pair of devices. Where a batch needs more, `lax.cond` takes a slow way:
the tokens of one device at a time meet the experts of all. It needs no more memory and gives the
same result, and the caller is told. Over `tensor` each device has a part of F. Weights are gathered
over `fsdp` and `context` where they are used, as other parameters are.

Legend: D model, E experts (that the device holds), F feed-forward of an expert (its part), k
experts of a token; T tokens of a device; P = T * k, pairs of a token and an expert of its; R
devices along `expert`; Q places of a buffer, or rows in the order of their experts; I and O: what
goes into a product and what comes out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from agentx.model.config import Activation
from agentx.model.parts import gated
from agentx.sharding import RULES

Array = jax.Array

# How many times an even share a device may send to another before the slow way is taken.
_SLACK = 1.5
# How many rows at a time are multiplied for a gradient of weights: so many that reading and writing
# the sum, one expert's weights in f32, does not take longer than the product.
_ROWS = 512

# The mesh axes that tokens, experts and F lie over.
_TOKENS = (*RULES["batch"], *RULES["sequence"])
(_EXPERT,) = RULES["experts"]
(_TENSOR,) = RULES["mlp"]

_keep = functools.partial(checkpoint_name, name="product")


def capacity(pairs: int, devices: int) -> int:
    """How many of a device's `pairs` of token and expert it may send to each of `devices`.

    One and a half times an even share, in whole tiles of 8 rows, and never more than there are.
    """
    return min(pairs, 8 * math.ceil(_SLACK * pairs / devices / 8))


def weighted_experts(
    x_TD: Array,
    expert_Tk: Array,
    weight_Tk: Array,
    experts: Mapping[str, Array],
    axes: Mapping[str, tuple[str, ...]] | None,
    *,
    activation: Activation,
) -> tuple[Array, Array]:
    """The sum [T, D] of what each token's experts make of it, by weight, and f32[] `overflowed`.

    x_TD: the device's tokens. expert_Tk: i32, numbers of experts of all devices; the number after
      the last is nobody's, and adds 0. weight_Tk: f32.
    experts: w_gate, w_up [E, D, F], w_down [E, F, D] and, where there are biases, b_gate, b_up
      [E, F], b_down [E, D]; on a mesh the device's part of each, and axes the names of its axes.
    overflowed: 1 where the slow way was taken on all devices, else 0.
    """

    # What backward passes need again are two products and what the experts return; the rest is
    # cheap. Without this the two ways of `lax.cond` would each keep copies of all they touch.
    @functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_only_these_names("product"),
        prevent_cse=False,
    )
    def through_experts(x_TD, weight_Tk, experts):
        experts = {name: w.astype(x_TD.dtype) for name, w in experts.items()}
        if axes is None:
            out_TkD = _through_experts(x_TD, expert_Tk, experts, activation, _keep)
            return _weighted(_keep(out_TkD), weight_Tk).astype(x_TD.dtype), jnp.float32(0)
        experts = {name: _gathered(w, axes[name]) for name, w in experts.items()}
        if "b_down" in experts:  # once, where the devices' parts of F are summed
            is_first = lax.axis_index(_TENSOR) == 0
            experts["b_down"] = jnp.where(is_first, experts["b_down"], 0)
        y_TD, overflowed = _over_devices(x_TD, expert_Tk, weight_Tk, experts, activation)
        return lax.psum(y_TD, _TENSOR).astype(x_TD.dtype), overflowed

    return through_experts(x_TD, weight_Tk, experts)


def _through_experts(
    x_TD: Array,
    expert_Tk: Array,
    experts: Mapping[str, Array],
    activation: Activation,
    keep: Callable[[Array], Array],
) -> Array:
    """[T, k, D]: each row through its k experts; 0 where one is no number of an expert here.

    keep: applied to the products that the backward pass is not to compute again.
    """
    num_experts = len(experts["w_gate"])
    order_Q = jnp.argsort(expert_Tk.reshape(-1))
    place_Tk = jnp.argsort(order_Q).reshape(expert_Tk.shape)
    sizes_E = jnp.sum(expert_Tk[..., None] == jnp.arange(num_experts), (0, 1), dtype=jnp.int32)
    # Behind the last group a chip may leave anything: cut off here, and its gradient there.
    row_Q1, end_E = jnp.arange(len(order_Q))[:, None], jnp.cumsum(sizes_E)
    is_used_Q1 = row_Q1 < end_E[-1]
    is_of_QE = (row_Q1 >= end_E - sizes_E) & (row_Q1 < end_E)

    def product(x_QI: Array, name: str) -> Array:
        y_QO = _product(x_QI, experts["w_" + name], sizes_E)
        # A plain product with ones and zeros: a ragged one, of one number a row, takes as much of
        # a chip's time as one of 128, and is another kernel to compile both ways.
        if "b_" + name in experts:
            y_QO += jnp.dot(is_of_QE.astype(x_QI.dtype), experts["b_" + name])
        return _where(is_used_Q1, y_QO)

    # What lies between gate and result is made again: a way of `lax.cond` hands its backward pass
    # all that it does not make again, and the other way as many zeros.
    activated = jax.checkpoint(functools.partial(gated, activation), prevent_cse=False)
    x_QD = _where(is_used_Q1, _spread(x_TD, order_Q, place_Tk))
    gate_QF, up_QF = keep(product(x_QD, "gate")), keep(product(x_QD, "up"))
    return _collect(product(activated(gate_QF, up_QF), "down"), order_Q, place_Tk)


@jax.custom_vjp
def _product(x_QI: Array, w_EIO: Array, sizes_E: Array) -> Array:
    """`lax.ragged_dot`, with another gradient of the weights.

    JAX's is a ragged product too, but one that no chip has a kernel for: XLA multiplies all rows,
    masked, for every expert.
    """
    return lax.ragged_dot(x_QI, w_EIO, sizes_E)


def _product_forward(x_QI, w_EIO, sizes_E):
    return _product(x_QI, w_EIO, sizes_E), (x_QI, w_EIO, sizes_E)


def _product_backward(residuals, dy_QO):
    x_QI, w_EIO, sizes_E = residuals
    dx_QI = lax.ragged_dot(dy_QO, w_EIO.swapaxes(1, 2), sizes_E)
    dw_EIO = sum_of_products(x_QI, dy_QO, sizes_E, min(_ROWS, len(x_QI)))
    return dx_QI, dw_EIO.astype(w_EIO.dtype), None


_product.defvjp(_product_forward, _product_backward)


def sum_of_products(x_QI: Array, y_QO: Array, sizes_E: Array, rows: int) -> Array:
    """[E, I, O] in f32: of each run of rows, sizes_E long, the sum of x outer y.

    rows: how many are multiplied at a time, at most Q. Only blocks with rows in them are computed.
    """
    end_E = jnp.cumsum(sizes_E)
    num_blocks_E = -(-sizes_E // rows)
    last_block_E = jnp.cumsum(num_blocks_E)
    dtype = jnp.promote_types(x_QI.dtype, jnp.float32)

    def add(block: Array, sums_EIO: Array) -> Array:
        expert = jnp.sum(block >= last_block_E)
        before = last_block_E[expert] - num_blocks_E[expert]
        begin = end_E[expert] - sizes_E[expert] + (block - before) * rows
        first = jnp.minimum(begin, len(x_QI) - rows)
        x, y = (lax.dynamic_slice_in_dim(a, first, rows) for a in (x_QI, y_QO))
        row = first + jnp.arange(rows)[:, None]
        x = jnp.where((row >= begin) & (row < end_E[expert]), x, 0)
        product_IO = lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        return sums_EIO.at[expert].add(product_IO)

    nothing = jnp.zeros((len(sizes_E), x_QI.shape[1], y_QO.shape[1]), dtype)
    return lax.fori_loop(0, last_block_E[-1], add, nothing)


def _over_devices(
    x_TD: Array,
    expert_Tk: Array,
    weight_Tk: Array,
    experts: Mapping[str, Array],
    activation: Activation,
) -> tuple[Array, Array]:
    """The weighted sum [T, D] over devices along `expert`, and 1 where it took the slow way."""
    devices = lax.axis_size(_EXPERT)
    if devices == 1:
        out_TkD = _through_experts(x_TD, expert_Tk, experts, activation, _keep)
        return _weighted(_keep(out_TkD), weight_Tk), jnp.float32(0)
    places = capacity(expert_Tk.size, devices)
    device_P1 = expert_Tk.reshape(-1, 1) // len(experts["w_gate"])
    is_for_PR = device_P1 == jnp.arange(devices)

    def fast(x_TD, weight_Tk, experts):
        return _by_exchange(x_TD, expert_Tk, weight_Tk, experts, activation, is_for_PR, places)

    def slow(x_TD, weight_Tk, experts):
        return _by_turns(x_TD, expert_Tk, weight_Tk, experts, activation)

    if places == expert_Tk.size:  # a device may send all to one: nothing can be too much
        return fast(x_TD, weight_Tk, experts), jnp.float32(0)
    # All devices of the mesh have to take the same way, for they wait for each other on it.
    sent = lax.pmax(jnp.max(jnp.sum(is_for_PR, 0)), (*_TOKENS, _TENSOR))
    overflowed = sent > places
    y_TD = lax.cond(overflowed, slow, fast, x_TD, weight_Tk, experts)
    return y_TD, overflowed.astype(jnp.float32)


def _by_exchange(
    x_TD: Array,
    expert_Tk: Array,
    weight_Tk: Array,
    experts: Mapping[str, Array],
    activation: Activation,
    is_for_PR: Array,
    places: int,
) -> Array:
    """The weighted sum [T, D]; tokens go to their experts, and what these make comes back.

    is_for_PR: the device that a pair is for, as one of R; it is for at most `places` pairs.
    """
    here, pairs, devices = len(experts["w_gate"]), expert_Tk.size, is_for_PR.shape[1]
    exchange = functools.partial(
        lax.all_to_all, axis_name=_EXPERT, split_axis=0, concat_axis=0, tiled=True
    )
    rank_PR = jnp.cumsum(is_for_PR, 0, dtype=jnp.int32) - 1
    place_PR = jnp.where(is_for_PR, places * jnp.arange(devices) + rank_PR, 0)
    is_sent_P = jnp.any(is_for_PR, 1)
    place_P = jnp.where(is_sent_P, jnp.sum(place_PR, 1), places * devices)
    pair_Q = jnp.full(places * devices, pairs).at[place_P].set(jnp.arange(pairs), mode="drop")
    expert_Q = jnp.full(places * devices, here, jnp.int32)
    expert_Q = expert_Q.at[place_P].set(expert_Tk.reshape(-1) % here, mode="drop")

    place_Tk = place_P.reshape(expert_Tk.shape)
    x_QD = exchange(_spread(x_TD, pair_Q, place_Tk))
    out_Q1D = _through_experts(x_QD, exchange(expert_Q)[:, None], experts, activation, _keep)
    out_TkD = _collect(exchange(out_Q1D[:, 0]), pair_Q, place_Tk)
    return _weighted(_keep(out_TkD), weight_Tk)


def _by_turns(
    x_TD: Array,
    expert_Tk: Array,
    weight_Tk: Array,
    experts: Mapping[str, Array],
    activation: Activation,
) -> Array:
    """The weighted sum [T, D]; the tokens of one device at a time are shown to all experts.

    Its backward pass goes the same way, a turn after the other, and keeps nothing between them.
    """
    here, me = len(experts["w_gate"]), lax.axis_index(_EXPERT)

    @jax.checkpoint
    def turn(y_TD: Array, device: Array) -> tuple[Array, None]:
        def shown(x: Array) -> Array:
            return lax.psum(jnp.where(me == device, x, 0), _EXPERT)

        expert = shown(expert_Tk) - me * here
        expert = jnp.where((expert >= 0) & (expert < here), expert, here)
        out_TkD = _through_experts(shown(x_TD), expert, experts, activation, lambda x: x)
        sum_TD = lax.psum(_weighted(out_TkD, shown(weight_Tk)), _EXPERT)
        return jnp.where(me == device, sum_TD, y_TD), None

    dtype = jnp.promote_types(x_TD.dtype, weight_Tk.dtype)
    devices = jnp.arange(lax.axis_size(_EXPERT))
    return lax.scan(turn, jnp.zeros(x_TD.shape, dtype), devices)[0]


@jax.custom_vjp
def _weighted(out_TkD: Array, weight_Tk: Array) -> Array:
    """The sum over a token's experts by their weights, [T, D], in f32 and always in one order.

    Its backward pass keeps what went in; left to JAX, it would keep that in f32.
    """
    return jnp.sum(out_TkD * weight_Tk[..., None], 1)


def _weighted_forward(out_TkD, weight_Tk):
    return _weighted(out_TkD, weight_Tk), (out_TkD, weight_Tk)


def _weighted_backward(residuals, dy_TD):
    out_TkD, weight_Tk = residuals
    dout_TkD = dy_TD[:, None] * weight_Tk[..., None]
    dweight_Tk = jnp.sum(dy_TD[:, None] * out_TkD, -1)
    return dout_TkD.astype(out_TkD.dtype), dweight_Tk.astype(weight_Tk.dtype)


_weighted.defvjp(_weighted_forward, _weighted_backward)


@jax.custom_vjp
def _where(is_used_Q1: Array, x_QI: Array) -> Array:
    """x where it is used, else 0. Left to JAX, the backward pass would keep a bool for each number
    of x, not for each row."""
    return jnp.where(is_used_Q1, x_QI, 0)


def _where_forward(is_used_Q1, x_QI):
    return _where(is_used_Q1, x_QI), is_used_Q1


def _where_backward(is_used_Q1, dy_QI):
    return None, _where(is_used_Q1, dy_QI)


_where.defvjp(_where_forward, _where_backward)


def _gathered(w: Array, axes: tuple[str, ...]) -> Array:
    """An expert's weights with the whole of D; the gradient is summed and split where they lie.

    What is gathered stands outermost: along another axis XLA sums gradients up whole.
    """
    if "expert_embed" not in axes:
        return w
    at = axes.index("expert_embed")
    gathered = lax.all_gather(jnp.moveaxis(w, at, 0), RULES["expert_embed"], axis=0, tiled=True)
    return jnp.moveaxis(gathered, 0, at)


def _rows(x: Array, index: Array) -> Array:
    """x[index], and 0 where that is behind the end."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _spread(x_TD: Array, pair_Q: Array, place_Tk: Array) -> Array:
    """[Q, D]: row q is that of the token of pair_Q[q], or 0; pair place_Tk[t, i] = q is t * k + i.

    The two say the same both ways, and what has no place or no pair has a number behind the end. So
    both passes read rows; left to JAX, the backward pass would add them up by scattering.
    """
    return _rows(x_TD, pair_Q // place_Tk.shape[1])


@jax.custom_vjp
def _collect(x_QD: Array, pair_Q: Array, place_Tk: Array) -> Array:
    """[T, k, D]: the row at each pair's place, the other direction of `_spread`."""
    return _rows(x_QD, place_Tk)


def _spread_forward(x_TD, pair_Q, place_Tk):
    return _spread(x_TD, pair_Q, place_Tk), place_Tk


def _spread_backward(place_Tk, dy_QD):
    return jnp.sum(_rows(dy_QD, place_Tk), 1), None, None


def _collect_forward(x_QD, pair_Q, place_Tk):
    return _collect(x_QD, pair_Q, place_Tk), pair_Q


def _collect_backward(pair_Q, dy_TkD):
    return _rows(dy_TkD.reshape(-1, dy_TkD.shape[-1]), pair_Q), None, None


_spread.defvjp(_spread_forward, _spread_backward)
_collect.defvjp(_collect_forward, _collect_backward)
