"""Mixture of experts: a feed-forward of many parts, of which every token takes a few.

A router gives every token k of E experts and a weight for each; what the experts make of the token
is summed by these weights (`experts.py`). No token is ever dropped. On a mesh all of it runs inside
one shard_map, where every device routes its own tokens; what is told about the routing is summed
over all of them.

Legend: B rows, S tokens a row, D model, E experts, k experts of a token, G groups of experts, N
experts of a group, F feed-forward of an expert; T tokens of a device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.nn import initializers
from jax.sharding import PartitionSpec

from agentx.model.config import Activation, ModelConfig
from agentx.model.experts import weighted_experts
from agentx.model.moe_config import MoEConfig
from agentx.model.parts import (
    Initializer,
    gated,
    inwards,
    merged,
    outwards,
    parameter,
    project,
)
from agentx.sharding import RULES, constrain, spec

Array = jax.Array

# The mesh axes that tokens lie over.
_TOKENS = (*RULES["batch"], *RULES["sequence"])

# The axes of one layer's experts.
_EXPERT_AXES = {
    "w_gate": ("experts", "expert_embed", "mlp"),
    "w_up": ("experts", "expert_embed", "mlp"),
    "w_down": ("experts", "mlp", "expert_embed"),
    "b_gate": ("experts", "mlp"),
    "b_up": ("experts", "mlp"),
    "b_down": ("experts", "expert_embed"),
}


class Routing(NamedTuple):
    """Where the tokens of one layer went. Padding counts in none of the numbers.

    chosen: i32[B, S, k], the experts of every token, the best first; keep it to replay it. None
    where nobody is to keep it.
    tokens_E: f32[E], how many tokens took each expert; their sum is k times the tokens.
    balance_loss: f32[], to be added to the loss: balance_rate where all experts get as much, and
      more elsewhere; 0 unless balance is "loss".
    entropy: f32[], of the router's distribution, in nats, the mean over tokens; no gradient.
    overflowed: f32[], 1 where the buffers of the all-to-all were too small for the batch, and so
      the slow way was taken; else 0.
    """

    chosen: Array | None
    tokens_E: Array
    balance_loss: Array
    entropy: Array
    overflowed: Array


class CorrectionBias(nnx.Param):
    """[layers, E] in f32: added to the scores by which experts are chosen, and to nothing else.

    So its gradient is exactly 0, and no part of the optimizer moves it: Adam's update of a gradient
    of 0 is 0, and weight decay is for matrices. `updated_correction_bias` does. The type is how
    a step finds it among the parameters.
    """


def updated_correction_bias(bias_E: Array, tokens_E: Array, rate: float) -> Array:
    """The bias after a step in which tokens_E tokens took each expert; leading axes are allowed.

    Experts with fewer than the mean get `rate` more, those with more get `rate` less (Wang et al.,
    2024, arXiv:2408.15664). tokens_E: of the whole batch, all its micro-batches.
    """
    missing_E = jnp.mean(tokens_E, -1, keepdims=True) - tokens_E
    return bias_E + rate * jnp.sign(missing_E).astype(bias_E.dtype)


def move_correction_biases(params: Any, model: ModelConfig, tokens_LE: Array) -> None:
    """Moves the biases among the parameters of a model after a step, in place, if it is balanced
    by them. tokens_LE: of the step, of the layers that have experts, in order."""
    if model.moe is None or model.moe.balance != "bias":
        return
    for number, place in enumerate(model.places):
        if place.kind.is_sparse:
            layers = np.array(place.layers) - model.num_dense_layers
            bias = params["layers"][number]["moe"]["correction_bias"]
            moved = updated_correction_bias(bias[...], tokens_LE[layers], model.moe.balance_rate)
            params["layers"][number]["moe"]["correction_bias"] = bias.replace(moved)


def router_metrics(routing: Routing) -> dict[str, Array]:
    """What a step says of its routers, f32[] each. routing: [M, L, ...], of M micro-batches.

    router/entropy: the mean over layers, in nats. router/max_load: of the layer that is worst off,
    how many times the mean the busiest expert has. router/idle_experts: how many experts no token
    took, of all layers. router/balance_loss: summed over layers. router/overflowed: of how many
    layers and micro-batches the tokens went the slow way (see `Routing`).
    """
    tokens_LE = routing.tokens_E.sum(0)
    mean_L = jnp.maximum(tokens_LE.mean(-1), 1e-9)
    return {
        "router/entropy": routing.entropy.mean(),
        "router/max_load": jnp.max(tokens_LE.max(-1) / mean_L),
        "router/idle_experts": jnp.sum(tokens_LE == 0, dtype=jnp.float32),
        "router/balance_loss": routing.balance_loss.sum(1).mean(),
        "router/overflowed": routing.overflowed.sum(),
    }


class Experts(nnx.Module):
    """The parameters of E gated feed-forwards. What computes with them is `MoE`."""

    def __init__(self, rngs: nnx.Rngs, model: ModelConfig, config: MoEConfig, layers: int):
        sizes = {"experts": config.num_experts, "expert_embed": model.d_model, "mlp": config.d_ff}
        read, out, zeros = inwards(model.d_model), outwards(model, config.d_ff), initializers.zeros

        def declared(name: str, init: Initializer, num_inputs: int) -> nnx.Param:
            of_layer = {axis: sizes[axis] for axis in _EXPERT_AXES[name]}
            return parameter(rngs, init, model, num_inputs, layers=layers, **of_layer)

        self.w_gate = declared("w_gate", read, 1)
        self.w_up = declared("w_up", read, 1)
        self.w_down = declared("w_down", out, 1)
        if config.expert_bias:
            self.b_gate = declared("b_gate", zeros, 0)
            self.b_up = declared("b_up", zeros, 0)
            self.b_down = declared("b_down", zeros, 0)

    def weights(self) -> dict[str, Array]:
        """Of one layer, by name. An adapter is added to its weight, not to the product: rows of
        many experts go through one product, whose weights it takes whole."""
        weights = {name: getattr(self, name)[...] for name in _EXPERT_AXES if hasattr(self, name)}
        return {name: merged(w, num_stacked=1) for name, w in weights.items()}

    def axes(self) -> dict[str, tuple[str, ...]]:
        """Those of `weights`."""
        return {name: axes for name, axes in _EXPERT_AXES.items() if hasattr(self, name)}


class SharedExpert(nnx.Module):
    """The gated feed-forward that every token takes beside its experts."""

    def __init__(self, rngs: nnx.Rngs, model: ModelConfig, size: int, layers: int):
        embed, mlp = {"embed": model.d_model}, {"mlp": size}
        self.activation = model.activation
        read, out = inwards(model.d_model), outwards(model, size)
        self.w_gate = parameter(rngs, read, model, 1, layers=layers, **embed, **mlp)
        self.w_up = parameter(rngs, read, model, 1, layers=layers, **embed, **mlp)
        self.w_down = parameter(rngs, out, model, 1, layers=layers, **mlp, **embed)

    def __call__(self, x_BSD: Array) -> Array:
        gate_BSF = project(x_BSD, self.w_gate)
        up_BSF = project(x_BSD, self.w_up)
        gated_BSF = gated(self.activation, gate_BSF, up_BSF)
        gated_BSF = constrain(gated_BSF, "batch", "sequence", "mlp")
        return project(gated_BSF, self.w_down)


class MoE(nnx.Module):
    """Router, experts and shared expert, of `layers` layers at once, as `model.moe` has them.

    A call computes one layer: what a scan over the parameters' leading axis merges.
    """

    def __init__(self, rngs: nnx.Rngs, model: ModelConfig, layers: int):
        assert model.moe is not None
        config = self.config = model.moe
        self.activation = model.activation
        sizes = {"layers": layers, "routes": config.num_experts}
        self.w_router = parameter(
            rngs,
            inwards(model.d_model),
            model,
            1,
            layers=layers,
            embed=model.d_model,
            routes=config.num_experts,
        )
        if config.router_bias:
            self.b_router = parameter(rngs, initializers.zeros, model, **sizes)
        if config.has_correction_bias:
            zeros = jnp.zeros(tuple(sizes.values()), jnp.float32)
            self.correction_bias = CorrectionBias(zeros, axes=tuple(sizes), num_inputs=0)
        self.experts = Experts(rngs, model, config, layers)
        if config.shared_d_ff:
            self.shared = SharedExpert(rngs, model, config.shared_d_ff, layers)

    def __call__(
        self, x_BSD: Array, *, useful_BS: Array | None = None, chosen_BSk: Array | None = None
    ) -> tuple[Array, Routing]:
        """What the experts of one layer make of x, [B, S, D], and where its tokens went.

        useful_BS: bool, False at padding, which goes to no expert and counts in no statistic.
        chosen_BSk: i32, experts recorded earlier, as `Routing.chosen`, to be taken again; where it
          is -1 the router chooses. Their weights are made of the present scores, so gradients reach
          the router (routing replay, Ma et al., 2025, arXiv:2510.11370).
        """
        if useful_BS is None:
            useful_BS = jnp.ones(x_BSD.shape[:2], bool)
        names = [n for n in ("w_router", "b_router", "correction_bias") if hasattr(self, n)]
        router = {name: merged(getattr(self, name)[...]) for name in names}
        experts = self.experts.weights()
        axes = self.experts.axes()

        mesh = jax.sharding.get_abstract_mesh()
        on_mesh = not mesh.empty and mesh.size > 1
        run = functools.partial(_mixture, self.config, self.activation, axes if on_mesh else None)
        if on_mesh:
            tokens = spec(("batch", "sequence"), x_BSD.shape[:2], mesh.shape)
            whole = PartitionSpec()
            of_experts = {n: spec(axes[n], w.shape, mesh.shape) for n, w in experts.items()}
            run = jax.shard_map(
                run,
                in_specs=(tokens, tokens, tokens, whole, of_experts),
                out_specs=(tokens, tokens, whole, whole, whole, whole),
                check_vma=False,  # what is said to be whole is a sum over all devices
            )
        y_BSD, *routing = run(x_BSD, useful_BS, chosen_BSk, router, experts)
        if self.config.shared_d_ff:
            with jax.named_scope("shared_expert"):
                y_BSD += self.shared(x_BSD)
        return y_BSD, Routing(*routing)


def _mixture(
    config: MoEConfig,
    activation: Activation,
    axes: Mapping[str, tuple[str, ...]] | None,
    x_BSD: Array,
    useful_BS: Array,
    chosen_BSk: Array | None,
    router: Mapping[str, Array],
    experts: Mapping[str, Array],
) -> tuple[Array, ...]:
    """y [B, S, D] of one device's tokens, and what `Routing` holds.

    axes: of the experts' weights, by name; None without a mesh.
    """
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    useful_T1 = useful_BS.reshape(-1, 1)
    chosen_Tk = None if chosen_BSk is None else chosen_BSk.reshape(len(x_TD), -1)
    with jax.named_scope("router"):
        chosen_Tk, weight_Tk, probability_TE = _route(config, x_TD, router, chosen_Tk)
    # Padding goes to the expert after the last, which nobody holds.
    expert_Tk = jnp.where(useful_T1, chosen_Tk, config.num_experts)

    with jax.named_scope("experts"):
        y_TD, overflowed = weighted_experts(
            x_TD, expert_Tk, weight_Tk, experts, axes, activation=activation
        )

    total = (lambda v: v) if axes is None else functools.partial(lax.psum, axis_name=_TOKENS)
    num_tokens = jnp.maximum(total(jnp.sum(useful_T1, dtype=jnp.float32)), 1)
    is_taken_TkE = expert_Tk[..., None] == jnp.arange(config.num_experts)
    tokens_E = total(jnp.sum(is_taken_TkE, (0, 1), dtype=jnp.float32))
    entropy_T = jnp.sum(jax.scipy.special.entr(lax.stop_gradient(probability_TE)), -1)
    entropy = total(jnp.sum(entropy_T, where=useful_T1[:, 0])) / num_tokens
    loss = jnp.float32(0)
    if config.balance == "loss":
        probability_E = total(jnp.sum(probability_TE, 0, where=useful_T1)) / num_tokens
        share_E = tokens_E / (num_tokens * config.experts_per_token)
        loss = config.balance_rate * config.num_experts * jnp.sum(share_E * probability_E)
    chosen_BSk = chosen_Tk.reshape(*x_BSD.shape[:2], -1)
    return y_TD.reshape(x_BSD.shape), chosen_BSk, tokens_E, loss, entropy, overflowed


def _route(
    config: MoEConfig, x_TD: Array, router: Mapping[str, Array], chosen_Tk: Array | None
) -> tuple[Array, Array, Array]:
    """Chosen experts i32[T, k], their weights [T, k], and the router's distribution [T, E].

    In f32 and by exact products, for a small error changes which experts are chosen.
    """
    dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
    w_DE = router["w_router"].astype(dtype)
    logits_TE = jnp.dot(x_TD.astype(dtype), w_DE, precision=lax.Precision.HIGHEST)
    if config.router_bias:
        logits_TE += router["b_router"].astype(dtype)
    if config.scores == "sigmoid":
        scores_TE = jax.nn.sigmoid(logits_TE)
        probability_TE = scores_TE / (jnp.sum(scores_TE, -1, keepdims=True) + 1e-20)
    else:
        probability_TE = jax.nn.softmax(logits_TE)
        scores_TE = logits_TE if config.scores == "softmax_of_chosen" else probability_TE
    own_Tk = _choose(config, lax.stop_gradient(scores_TE + router.get("correction_bias", 0)))
    chosen_Tk = own_Tk if chosen_Tk is None else jnp.where(chosen_Tk < 0, own_Tk, chosen_Tk)
    weight_Tk = jnp.take_along_axis(scores_TE, chosen_Tk, -1)
    if config.scores == "softmax_of_chosen":
        weight_Tk = jax.nn.softmax(weight_Tk)
    if config.normalize:
        weight_Tk /= jnp.sum(weight_Tk, -1, keepdims=True) + 1e-20
    return chosen_Tk, config.scale * weight_Tk, probability_TE


def _choose(config: MoEConfig, scores_TE: Array) -> Array:
    """i32[T, k], the experts with the highest scores, in the groups with the highest."""
    if config.num_groups > 1:
        scores_TGN = scores_TE.reshape(len(scores_TE), config.num_groups, -1)
        best_TG = jnp.sum(lax.top_k(scores_TGN, 2)[0], -1)
        group_Tg = lax.top_k(best_TG, config.groups_per_token)[1]
        is_chosen_TG = jnp.any(group_Tg[..., None] == jnp.arange(config.num_groups), 1)
        scores_TGN = jnp.where(is_chosen_TG[..., None], scores_TGN, -jnp.inf)
        scores_TE = scores_TGN.reshape(scores_TE.shape)
    return lax.top_k(scores_TE, config.experts_per_token)[1]
