"""What layers are made of: parameters, products, RMSNorm, rotation.

Every parameter is declared once, by `parameter`: its name, logical axes, sizes, initialiser, dtype
and how many of its axes a product sums over. `sharding.py` reads the axes. A layer is declared for
all layers of a place at once (see `ModelConfig.stacks`), with `layers` as the leading axis;
`transformer.py` scans over that axis, so what runs here is one layer.

Legend: B rows, S tokens, N heads, H head size, R rank of an adapter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers

from agentx.model.config import Activation, ModelConfig, RopeKind
from agentx.sharding import gathered

Array = jax.Array

# gpt-oss's: where gate and up are cut off, and how steep its sigmoid is.
_LIMIT, _STEEPNESS = 7.0, 1.702

# Cosines and sines of a rotation; None where nothing is rotated.
Turn = tuple[Array, Array] | None
# (x, w) -> their product: see `project`.
Project = Callable[[Array, Any], Array]
# (key, shape, dtype) -> fresh values.
Initializer = Callable[[Array, tuple[int, ...], jnp.dtype], Array]


def parameter(
    rngs: nnx.Rngs, init: Initializer, config: ModelConfig, num_inputs: int = 0, **sizes: int
) -> nnx.Param:
    """A parameter whose axes are the names of `sizes`: parameter(..., vocab=V, embed=D).

    num_inputs: how many axes, after `layers` and `experts`, a product of it sums over; 0 for what
    is added, multiplied or looked up.
    """
    value = init(rngs.params(), tuple(sizes.values()), jnp.dtype(config.param_dtype))
    return nnx.Param(value, axes=tuple(sizes), num_inputs=num_inputs)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["w", "a", "b"], meta_fields=["scale"]
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A frozen weight and its adapter, in the place of one: w + scale * a b (Hu et al., 2021).

    w: [*inputs, *outputs]. a: [*inputs, R]. b: [R, *outputs]. All may have `layers` before these.
    """

    w: Array
    a: Array
    b: Array
    scale: float

    def astype(self, dtype: Any) -> LowRank:
        return jax.tree.map(lambda part: part.astype(dtype), self)


# A parameter's array, or one with an adapter.
Weight = Array | LowRank


class Parameter(Protocol):
    """What a product takes: what `parameter` makes, or that with an adapter (`lora.Adapted`)."""

    def __getitem__(self, index: Any) -> Weight: ...

    def get_metadata(self, name: str) -> Any: ...


def project(x: Array, w: Parameter) -> Array:
    """x [B, S, *inputs] times one layer of w, [*inputs, *outputs], in x's type: [B, S, *outputs].

    A weight with an adapter is never summed up: two thin products are taken beside its own, and
    what is frozen of it has no gradient.
    """
    return _with_adapter(_product, x, w)


def _with_adapter(product: Callable[..., Array], x: Array, w: Parameter) -> Array:
    value, num_inputs = w[...].astype(x.dtype), w.get_metadata("num_inputs")
    axes = tuple(axis for axis in w.get_metadata("axes") if axis != "layers")
    if not isinstance(value, LowRank):
        return product(x, value, num_inputs, axes)
    y = product(x, lax.stop_gradient(value.w), num_inputs, axes)
    thin = product(x, value.a, num_inputs, (*axes[:num_inputs], "rank"))
    return y + value.scale * product(thin, value.b, 1, ("rank", *axes[num_inputs:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, w: Array, num_inputs: int, axes: tuple[str, ...]) -> Array:
    """`project` of a plain array, whose axes have these names.

    Its gradient is JAX's, but for where w is gathered (`sharding.gathered`) and for the order of
    the operands of dw: XLA on a CPU transposes the first of them in memory, and here that is the
    smaller of the two. Left to JAX, those are the large gradients of the gate and up projections, a
    third of the time of a training step.
    """
    inputs = tuple(range(num_inputs))
    return lax.dot_general(x, w, ((tuple(2 + i for i in inputs), inputs), ((), ())))


def _product_forward(
    x: Array, w: Array, num_inputs: int, axes: tuple[str, ...]
) -> tuple[Array, tuple[Array, Array]]:
    return checkpoint_name(_product(x, w, num_inputs, axes), "product"), (x, w)


def _product_backward(
    num_inputs: int, axes: tuple[str, ...], residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = residuals
    w = gathered(w, *axes)
    outputs = tuple(range(num_inputs, w.ndim))
    dy_outputs = tuple(range(2, dy.ndim))
    dx = lax.dot_general(dy, w, ((dy_outputs, outputs), ((), ())))
    tokens = (((0, 1), (0, 1)), ((), ()))
    if x.size <= dy.size:
        return dx, lax.dot_general(x, dy, tokens)
    dw = lax.dot_general(dy, x, tokens)
    return dx, jnp.moveaxis(dw, tuple(range(len(outputs))), outputs)


_product.defvjp(_product_forward, _product_backward)


def project_few(x: Array, w: Parameter) -> Array:
    """`project` for weights from `outputs_first`; for a few tokens on a CPU, and no gradient.

    The parts of a weight with an adapter are stored so each by itself, a with the inputs of w, b
    with one. XLA on a CPU packs the second operand of a product anew every time, in the order in
    which it reads it. With few tokens that should not be the weights, and of them it should read
    whole rows.
    """
    return _with_adapter(_product_few, x, w)


def _product_few(x: Array, w: Array, num_inputs: int, axes: tuple[str, ...]) -> Array:
    del axes  # of the weight as it was trained, on one device now
    w_inputs = tuple(range(w.ndim - num_inputs, w.ndim))
    x_inputs = tuple(range(2, 2 + num_inputs))
    y = lax.dot_general(w, x, ((w_inputs, x_inputs), ((), ())))
    return jnp.moveaxis(y, (-2, -1), (0, 1))


def outputs_first(w: Array, num_inputs: int) -> Array:
    """[*inputs, *outputs] as [*outputs, *inputs]."""
    return jnp.moveaxis(w, range(num_inputs), range(-num_inputs, 0))


def merged(w: Weight, num_inputs: int = 1, num_stacked: int = 0) -> Array:
    """A weight [*stacked, *inputs, *outputs] as one array of its type, its adapter added.

    Summed in f32 and then rounded. In bf16 the sum keeps 8 bits: of an adapter that moves a number
    by less than a 512th of itself nothing is left of it there, so a merged model is not bit for bit
    the one that was trained.
    """
    if not isinstance(w, LowRank):
        return w
    stacked = tuple(range(num_stacked))
    wide = jnp.promote_types(w.w.dtype, jnp.float32)
    delta = lax.dot_general(
        w.a.astype(wide),
        w.b.astype(wide),
        (((num_stacked + num_inputs,), (num_stacked,)), (stacked, stacked)),
        precision=lax.Precision.HIGHEST,
    )
    return (lax.stop_gradient(w.w).astype(wide) + w.scale * delta).astype(w.w.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axes, in f32 (Zhang and Sennrich, 2019).

    Over all axes of `sizes` but the layers. With `config.norm_plus_one` the parameter is scale - 1.
    """

    def __init__(
        self, rngs: nnx.Rngs, config: ModelConfig, *, eps: float | None = None, **sizes: int
    ):
        self.eps = config.norm_eps if eps is None else eps
        self.plus_one = config.norm_plus_one
        self.axes = tuple(range(-len([name for name in sizes if name != "layers"]), 0))
        init = initializers.zeros if config.norm_plus_one else initializers.ones
        self.scale = parameter(rngs, init, config, **sizes)

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), self.axes, keepdims=True)
        scale = 1 + self.scale[...].astype(wide.dtype) if self.plus_one else self.scale[...]
        normed = wide * jax.lax.rsqrt(mean_square + self.eps) * scale
        return normed.astype(x.dtype)


def rotation(position_BS: Array, config: ModelConfig, kind: RopeKind = "global") -> Turn:
    """Cosines and sines of RoPE's angles, [B, S, H / 2] in f32 (Su et al., 2021).

    Pair i of a head turns by position * theta^(-2i / H), or as `config.rope_scaling` changes that.
    H is what is rotated of a head.
    """
    if kind == "none":
        return None
    dtype = jnp.promote_types(config.compute_dtype, jnp.float32)
    position_BS1 = position_BS[..., None].astype(dtype)
    head_dim = config.rotated_dim
    if kind == "local" or config.rope_scaling is None:
        exponent = jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim
        theta = config.rope_theta if kind == "global" else config.local_rope_theta
        angle = position_BS1 / theta**exponent
        return jnp.cos(angle), jnp.sin(angle)
    frequencies, factor = config.rope_scaling.frequencies(
        config.rope_theta, head_dim, config.max_length
    )
    angle = position_BS1 * jnp.asarray(frequencies, dtype)
    return factor * jnp.cos(angle), factor * jnp.sin(angle)


def rotate(x_BSNH: Array, turn: Turn, *, neighbours: bool = False) -> Array:
    """Every head of x turned by `rotation`'s angles.

    The pairs are (i, i + H / 2); with `neighbours` (2i, 2i + 1), and pair i goes to (i, i + H / 2).
    """
    if turn is None:
        return x_BSNH
    cos, sin = (t[:, :, None] for t in turn)
    wide_BSNH = x_BSNH.astype(cos.dtype)
    if neighbours:
        first, second = wide_BSNH[..., 0::2], wide_BSNH[..., 1::2]
    else:
        first, second = jnp.split(wide_BSNH, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x_BSNH.dtype)


def inwards(num_inputs: int) -> Initializer:
    """For what reads the residual stream: the results have the variance of the inputs."""
    return initializers.normal(num_inputs**-0.5)


def outwards(config: ModelConfig, num_inputs: int) -> Initializer:
    """For what is added to the residual stream: every layer adds two terms, and its scale does not
    grow with depth."""
    return initializers.normal((2 * config.num_layers * num_inputs) ** -0.5)


def gated(activation: Activation, gate: Array, up: Array) -> Array:
    """The middle of a gated feed-forward, of the shape of gate and up (Shazeer, 2020).

    "silu": silu(gate) * up, SwiGLU. "gelu_tanh": gelu(gate) * up with the tanh form, GeGLU.
    "clamped_swiglu": gpt-oss's, with gate at most 7 and up in [-7, 7]:
    gate * sigmoid(1.702 gate) * (up + 1).
    """
    if activation == "silu":
        return jax.nn.silu(gate) * up
    if activation == "gelu_tanh":
        return jax.nn.gelu(gate, approximate=True) * up
    gate, up = jnp.minimum(gate, _LIMIT), jnp.clip(up, -_LIMIT, _LIMIT)
    return gate * jax.nn.sigmoid(_STEEPNESS * gate) * (up + 1)
