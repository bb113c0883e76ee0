"""One decoder layer: attention and a gated feed-forward, each a term of the residual stream.

A layer is declared for all layers of a place at once (see `ModelConfig.stacks`), with `layers` as
the leading axis; `transformer.py` scans over that axis, so what runs here is one layer.

The mathematics is that of each family in Hugging Face's transformers, so that export is a renaming.

Legend: B rows, S tokens, N heads, K KV heads, H and Hv head sizes, D model, F feed-forward.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from flax import nnx
from jax.nn import initializers

from agentx.model.attention import Attend, Attention, LatentAttention
from agentx.model.config import ModelConfig, Place
from agentx.model.moe import MoE, Routing
from agentx.model.parts import (
    Project,
    RMSNorm,
    Turn,
    gated,
    inwards,
    outwards,
    parameter,
    project,
)
from agentx.sharding import constrain

Array = jax.Array

# The backward pass finds the results of `project` saved, and computes again what lies between them.
_keep_products = functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names("product"),
    prevent_cse=False,
)


class MLP(nnx.Module):
    """gated(x W_gate, x W_up) W_down (Shazeer, 2020)."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, place: Place):
        embed, mlp, layers = config.d_model, config.d_ff, {"layers": len(place.layers)}
        self.config = config
        self.w_gate = parameter(rngs, inwards(embed), config, 1, **layers, embed=embed, mlp=mlp)
        self.w_up = parameter(rngs, inwards(embed), config, 1, **layers, embed=embed, mlp=mlp)
        out = outwards(config, mlp)
        self.w_down = parameter(rngs, out, config, 1, **layers, mlp=mlp, embed=embed)
        if config.mlp_bias:
            self.b_gate = parameter(rngs, initializers.zeros, config, **layers, mlp=mlp)
            self.b_up = parameter(rngs, initializers.zeros, config, **layers, mlp=mlp)
            self.b_down = parameter(rngs, initializers.zeros, config, **layers, embed=embed)

    def __call__(self, x_BSD: Array, project: Project) -> Array:
        dtype, has_bias = x_BSD.dtype, self.config.mlp_bias
        gate_BSF = project(x_BSD, self.w_gate)
        up_BSF = project(x_BSD, self.w_up)
        if has_bias:
            gate_BSF += self.b_gate[...].astype(dtype)
            up_BSF += self.b_up[...].astype(dtype)
        gated_BSF = gated(self.config.activation, gate_BSF, up_BSF)
        gated_BSF = constrain(gated_BSF, "batch", "sequence", "mlp")
        down_BSD = project(gated_BSF, self.w_down)
        return down_BSD + self.b_down[...].astype(dtype) if has_bias else down_BSD


class Layered(NamedTuple):
    """What a layer leaves: its output [B, S, D], its rotated keys and its values, [B, S, K, H]
    each, and where its tokens went, if it has experts."""

    x: Array
    k: Array
    v: Array
    routing: Routing | None


class Layer(nnx.Module):
    """x + attention(x), then x + mlp(x), normalised where `config.norms` says.

    "pre": x + f(norm(x)). "post": x + norm(f(x)). "both": x + norm(f(norm(x))).
    """

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, place: Place):
        sizes = {"layers": len(place.layers), "embed": config.d_model}
        self.remat, self.is_sparse = config.remat, place.kind.is_sparse
        self.normalises_input = config.norms != "post"
        self.normalises_output = config.norms != "pre"
        attention = LatentAttention if config.latent else Attention
        if self.normalises_input:
            self.attention_norm = RMSNorm(rngs, config, **sizes)
        self.attention = attention(rngs, config, place)
        if self.normalises_input:
            self.mlp_norm = RMSNorm(rngs, config, **sizes)
        if place.kind.is_sparse:
            self.moe = MoE(rngs, config, len(place.layers))
        else:
            self.mlp = MLP(rngs, config, place)
        if self.normalises_output:
            self.attention_post_norm = RMSNorm(rngs, config, **sizes)
            self.mlp_post_norm = RMSNorm(rngs, config, **sizes)

    def __call__(
        self,
        x_BSD: Array,
        turn: Turn,
        attend: Attend,
        *,
        useful_BS: Array | None = None,
        chosen_BSk: Array | None = None,
        project: Project = project,
        from_cache: bool = False,
    ) -> Layered:
        """What one layer makes of x [B, S, D].

        attend(q [B, S, N, H], k [B, S, K, H], v [B, S, K, Hv], sinks) -> [B, S, N, Hv].
        useful_BS, chosen_BSk: see `MoE`.
        project: makes the products; `project_few` if the weights are stored for it.
        from_cache: keys and values are what a cache holds (see `ModelConfig.cache_dims`).
        """

        def before(x_BSD):
            with jax.named_scope("qkv"):
                x_BSD = self.attention_norm(x_BSD) if self.normalises_input else x_BSD
                return self.attention.qkv(x_BSD, turn, project, from_cache)

        def after(x_BSD, o_BSNH):
            with jax.named_scope("out"):
                term_BSD = self.attention.out(o_BSNH, project, from_cache)
                if self.normalises_output:
                    term_BSD = self.attention_post_norm(term_BSD)
                x_BSD = constrain(x_BSD + term_BSD, "batch", "sequence", None)
            with jax.named_scope("mlp"):
                term_BSD = self.mlp_norm(x_BSD) if self.normalises_input else x_BSD
                routing = None
                if self.is_sparse:
                    term_BSD, routing = self.moe(
                        term_BSD, useful_BS=useful_BS, chosen_BSk=chosen_BSk
                    )
                else:
                    term_BSD = self.mlp(term_BSD, project)
                if self.normalises_output:
                    term_BSD = self.mlp_post_norm(term_BSD)
            return constrain(x_BSD + term_BSD, "batch", "sequence", None), routing

        if self.remat == "dots":
            before, after = _keep_products(before), _keep_products(after)
        q_BSNH, k_BSKH, v_BSKH = before(x_BSD)
        with jax.named_scope("attention"):
            o_BSNH = attend(q_BSNH, k_BSKH, v_BSKH, self.attention.sinks())
        x_BSD, routing = after(x_BSD, o_BSNH)
        return Layered(x_BSD, k_BSKH, v_BSKH, routing)
