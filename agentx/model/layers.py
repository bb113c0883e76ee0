"""The parts of one decoder layer: RMSNorm, rotated attention, SwiGLU.

Every parameter is declared once, by `parameter`: its name, logical axes, sizes, initialiser and
dtype. `sharding.py` reads the axes. A layer is declared for all layers at once, with `layers` as
the leading axis; `transformer.py` scans over that axis, so what runs here is one layer.

The mathematics is Hugging Face's Llama and, with QK-norm, Qwen3, so that export is a renaming.

Legend: B rows, S tokens, N heads, K KV heads, H head size, D model, F feed-forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers

from agentx.model.config import ModelConfig
from agentx.sharding import constrain

# How many times an embedding's length the last layer adds of what it copies.
_COPY_GAIN = 45.0

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]
# (x, w, num_inputs) -> their product: see `project`.
Project = Callable[..., Array]
# (key, shape, dtype) -> fresh values.
Initializer = Callable[[Array, tuple[int, ...], jnp.dtype], Array]


def parameter(rngs: nnx.Rngs, init: Initializer, config: ModelConfig, **sizes: int) -> nnx.Param:
    """A parameter whose axes are the names of `sizes`: parameter(..., vocab=V, embed=D)."""
    value = init(rngs.params(), tuple(sizes.values()), jnp.dtype(config.param_dtype))
    return nnx.Param(value, axes=tuple(sizes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: Array, w: Array, num_inputs: int = 1) -> Array:
    """x [B, S, *inputs] times w [*inputs, *outputs]: [B, S, *outputs]; `num_inputs` axes of each.

    Its gradient is JAX's, but for the order of the operands of dw: XLA on a CPU transposes the
    first of them in memory, and here that is the smaller of the two. Left to JAX, those are the
    large gradients of the gate and up projections, a third of the time of a training step.
    """
    inputs = tuple(range(num_inputs))
    return lax.dot_general(x, w, ((tuple(2 + i for i in inputs), inputs), ((), ())))


def _project_forward(x: Array, w: Array, num_inputs: int) -> tuple[Array, tuple[Array, Array]]:
    return checkpoint_name(project(x, w, num_inputs), "product"), (x, w)


def _project_backward(
    num_inputs: int, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = residuals
    outputs = tuple(range(num_inputs, w.ndim))
    dy_outputs = tuple(range(2, dy.ndim))
    dx = lax.dot_general(dy, w, ((dy_outputs, outputs), ((), ())))
    tokens = (((0, 1), (0, 1)), ((), ()))
    if x.size <= dy.size:
        return dx, lax.dot_general(x, dy, tokens)
    dw = lax.dot_general(dy, x, tokens)
    return dx, jnp.moveaxis(dw, tuple(range(len(outputs))), outputs)


project.defvjp(_project_forward, _project_backward)


def project_few(x: Array, w: Array, num_inputs: int = 1) -> Array:
    """`project` for weights from `outputs_first`; for a few tokens on a CPU, and no gradient.

    XLA there packs the second operand of a product anew every time, in the order in which it reads
    it. With few tokens that should not be the weights, and of them it should read whole rows.
    """
    w_inputs = tuple(range(w.ndim - num_inputs, w.ndim))
    x_inputs = tuple(range(2, 2 + num_inputs))
    y = lax.dot_general(w, x, ((w_inputs, x_inputs), ((), ())))
    return jnp.moveaxis(y, (-2, -1), (0, 1))


def outputs_first(name: str, w: Array) -> Array:
    """Parameter `name` of one layer, [*inputs, *outputs], as [*outputs, *inputs]."""
    num_inputs = 0 if w.ndim == 1 else 2 if name == "w_o" else 1
    return jnp.moveaxis(w, range(num_inputs), range(-num_inputs, 0))


# The backward pass finds the results of `project` saved, and computes again what lies between them.
_keep_products = functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names("product"),
    prevent_cse=False,
)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in f32 (Zhang and Sennrich, 2019)."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, **sizes: int):
        self.eps = config.norm_eps
        self.scale = parameter(rngs, initializers.ones, config, **sizes)

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), -1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]
        return normed.astype(x.dtype)


def rotation(position_BS: Array, config: ModelConfig) -> tuple[Array, Array]:
    """Cosines and sines of RoPE's angles, [B, S, H / 2] in f32 (Su et al., 2021).

    Pair i of a head turns by position * theta^(-2i / H), or as `config.rope_scaling` changes that;
    the pairs are (i, i + H / 2).
    """
    dtype = jnp.promote_types(config.compute_dtype, jnp.float32)
    position_BS1 = position_BS[..., None].astype(dtype)
    if config.rope_scaling is None:
        exponent = jnp.arange(0, config.head_dim, 2, dtype=dtype) / config.head_dim
        angle = position_BS1 / config.rope_theta**exponent
        return jnp.cos(angle), jnp.sin(angle)
    frequencies, factor = config.rope_scaling.frequencies(
        config.rope_theta, config.head_dim, config.max_length
    )
    angle = position_BS1 * jnp.asarray(frequencies, dtype)
    return factor * jnp.cos(angle), factor * jnp.sin(angle)


def rotate(x_BSNH: Array, turn: tuple[Array, Array]) -> Array:
    """Every head of x turned by `rotation`'s angles."""
    cos, sin = (t[:, :, None] for t in turn)
    first, second = jnp.split(x_BSNH.astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x_BSNH.dtype)


def copying_output(w_v_LDKH: Array, heads: int) -> Initializer:
    """What draws w_o [L, N, H, D] for ModelConfig.init = "copy", given w_v.

    Copying from context takes two layers: one marks every token with the token before it, the next
    finds the mark that is like the last token and repeats what stands there (an induction head,
    Olsson et al., 2022). Drawn at random, neither is of use before the other is there, and hundreds
    of steps pass. Here each begins with its half:

    - In the last layer w_o is w_v transposed, an alignment that Trockman and Kolter (2023) found in
      trained layers, and outweighs the token itself: a head repeats whatever it attends to.
    - In the layers before, w_o is random, and what a head adds as long as an embedding: it can be
      told from the token that was there, and does not drown it.
    - All embeddings share a direction (`transformer.py`), since this family has no biases: so
      a head can attend by position alone, which marking the token before needs.

    docs/log.md has what each of them is worth.
    """
    layers, embed, kv_heads, head_dim = w_v_LDKH.shape
    groups = heads // kv_heads

    def draw(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        marking = initializers.normal((embed * heads * head_dim) ** -0.5)(key, shape, dtype)
        repeating = jnp.repeat(w_v_LDKH, groups, axis=2).transpose(0, 2, 3, 1)
        repeating *= _COPY_GAIN * embed**-0.5 / groups
        is_last_L = jnp.arange(layers) == layers - 1
        return jnp.where(is_last_L[:, None, None, None], repeating, marking).astype(dtype)

    return draw


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023); how keys are looked up is the caller's."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        layers, embed, head_dim = config.num_layers, config.d_model, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.config = config
        inwards = initializers.normal(embed**-0.5)
        # Every layer adds two terms to the residual stream: so its scale does not grow with depth.
        outwards: Initializer = initializers.normal((2 * layers * heads * head_dim) ** -0.5)
        self.w_q = parameter(
            rngs, inwards, config, layers=layers, embed=embed, heads=heads, head_dim=head_dim
        )
        self.w_k = parameter(
            rngs, inwards, config, layers=layers, embed=embed, kv_heads=kv_heads, head_dim=head_dim
        )
        self.w_v = parameter(
            rngs, inwards, config, layers=layers, embed=embed, kv_heads=kv_heads, head_dim=head_dim
        )
        if config.init == "copy":
            outwards = copying_output(self.w_v[...], heads)
        self.w_o = parameter(
            rngs, outwards, config, layers=layers, heads=heads, head_dim=head_dim, embed=embed
        )
        if config.qk_norm:
            self.q_norm = RMSNorm(rngs, config, layers=layers, head_dim=head_dim)
            self.k_norm = RMSNorm(rngs, config, layers=layers, head_dim=head_dim)

    def qkv(
        self, x_BSD: Array, turn: tuple[Array, Array], project: Project
    ) -> tuple[Array, Array, Array]:
        """Rotated queries [B, S, N, H], rotated keys and values [B, S, K, H]."""
        q_BSNH = project(x_BSD, self.w_q[...].astype(x_BSD.dtype))
        k_BSKH = project(x_BSD, self.w_k[...].astype(x_BSD.dtype))
        v_BSKH = project(x_BSD, self.w_v[...].astype(x_BSD.dtype))
        if self.config.qk_norm:
            q_BSNH, k_BSKH = self.q_norm(q_BSNH), self.k_norm(k_BSKH)
        return (
            constrain(rotate(q_BSNH, turn), "batch", "sequence", "heads", None),
            constrain(rotate(k_BSKH, turn), "batch", "sequence", "kv_heads", None),
            constrain(v_BSKH, "batch", "sequence", "kv_heads", None),
        )

    def out(self, o_BSNH: Array, project: Project) -> Array:
        """What the heads looked up, as a term of the residual stream [B, S, D]."""
        return project(o_BSNH, self.w_o[...].astype(o_BSNH.dtype), 2)


class MLP(nnx.Module):
    """SwiGLU: (silu(x W_gate) * x W_up) W_down (Shazeer, 2020)."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        layers, embed, mlp = config.num_layers, config.d_model, config.d_ff
        inwards = initializers.normal(embed**-0.5)
        outwards = initializers.normal((2 * layers * mlp) ** -0.5)
        self.w_gate = parameter(rngs, inwards, config, layers=layers, embed=embed, mlp=mlp)
        self.w_up = parameter(rngs, inwards, config, layers=layers, embed=embed, mlp=mlp)
        self.w_down = parameter(rngs, outwards, config, layers=layers, mlp=mlp, embed=embed)

    def __call__(self, x_BSD: Array, project: Project) -> Array:
        dtype = x_BSD.dtype
        gate_BSF = project(x_BSD, self.w_gate[...].astype(dtype))
        up_BSF = project(x_BSD, self.w_up[...].astype(dtype))
        gated_BSF = constrain(jax.nn.silu(gate_BSF) * up_BSF, "batch", "sequence", "mlp")
        return project(gated_BSF, self.w_down[...].astype(dtype))


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        sizes = {"layers": config.num_layers, "embed": config.d_model}
        self.remat = config.remat
        self.attention_norm = RMSNorm(rngs, config, **sizes)
        self.attention = Attention(rngs, config)
        self.mlp_norm = RMSNorm(rngs, config, **sizes)
        self.mlp = MLP(rngs, config)

    def __call__(
        self,
        x_BSD: Array,
        turn: tuple[Array, Array],
        attend: Attend,
        project: Project = project,
    ) -> tuple[Array, tuple[Array, Array]]:
        """The layer's output [B, S, D], and its rotated keys and its values, [B, S, K, H] each.

        attend(q [B, S, N, H], k [B, S, K, H], v [B, S, K, H]) -> [B, S, N, H].
        project: makes the products; `project_few` if the weights are stored for it.
        """

        def before(x_BSD):
            with jax.named_scope("qkv"):
                return self.attention.qkv(self.attention_norm(x_BSD), turn, project)

        def after(x_BSD, o_BSNH):
            with jax.named_scope("out"):
                attended_BSD = self.attention.out(o_BSNH, project)
                x_BSD = constrain(x_BSD + attended_BSD, "batch", "sequence", None)
            with jax.named_scope("mlp"):
                x_BSD = x_BSD + self.mlp(self.mlp_norm(x_BSD), project)
            return constrain(x_BSD, "batch", "sequence", None)

        if self.remat == "dots":
            before, after = _keep_products(before), _keep_products(after)
        q_BSNH, k_BSKH, v_BSKH = before(x_BSD)
        with jax.named_scope("attention"):
            o_BSNH = attend(q_BSNH, k_BSKH, v_BSKH)
        return after(x_BSD, o_BSNH), (k_BSKH, v_BSKH)
