"""The decoder: embedding, scanned layers, final norm. Training and decoding share every line.

`Transformer(tokens, layout)` gives hidden states, not logits: `token_logprobs` makes those of a
chunk at a time, for trainer and sampler alike. `decode` continues rows whose earlier keys and
values lie in a cache; it returns the new ones and leaves writing to `cache.py`.

Legend: L layers, B rows, S tokens a row or columns of a cache, T new tokens, N heads, K KV heads,
H head size, D model, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.nn import initializers

from agentx.model.cache import new_columns, write_columns
from agentx.model.config import ModelConfig
from agentx.model.layers import (
    Attend,
    Layer,
    RMSNorm,
    outputs_first,
    parameter,
    project_few,
    rotation,
)
from agentx.sharding import RULES, constrain
from agentx_kernels import hardware as chips
from agentx_kernels import logprob
from agentx_kernels.attention import attention
from agentx_kernels.balance import balanced_order, can_balance
from agentx_kernels.blocks import block_config
from agentx_kernels.context_parallel import Split, choose_split, make_split_plan, split_attention
from agentx_kernels.decode import decode_attention
from agentx_kernels.hardware import Hardware
from agentx_kernels.layout import TreeLayout
from agentx_kernels.plan import make_plan

Array = jax.Array
CPU = chips.hardware("cpu")

# How attention lies over the mesh: as the arrays that go in.
_SPLIT = Split(RULES["batch"], RULES["heads"][0], RULES["sequence"][0])

# How hidden states and the unembedding lie over it.
_VOCABULARY_SPLIT = logprob.VocabularySplit(
    rows=RULES["batch"],
    tokens=RULES["sequence"][0],
    vocab=RULES["vocab"][0],
    embed=RULES["embed"],
)


class Transformer(nnx.Module):
    """A decoder as `config` describes it, compiled for `hardware`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, hardware: Hardware = CPU):
        self.config = config
        self.hardware = hardware
        sizes = {"vocab": config.vocab_size, "embed": config.d_model}
        embed = _embed_with_a_shared_direction if config.init == "copy" else _embed
        self.embed = parameter(rngs, embed, config, **sizes)
        self.layers = Layer(rngs, config)
        self.final_norm = RMSNorm(rngs, config, embed=config.d_model)
        if not config.tie_embeddings:
            self.lm_head = parameter(rngs, initializers.normal(0.02), config, **sizes)

    def __call__(self, tokens: Array, layout: TreeLayout) -> Array:
        """Hidden states [B, S, D] after the final norm; tokens i32[B, S], layout [B, S]."""
        config = self.config
        graphdef, weights = nnx.split(self.layers)
        turn = rotation(layout.position, config)

        attend = self._attention(layout)

        def one_layer(x_BSD, layer_weights):
            x_BSD, _ = nnx.merge(graphdef, layer_weights)(x_BSD, turn, attend)
            return x_BSD, None

        if config.remat == "full":
            one_layer = jax.checkpoint(one_layer, prevent_cse=False)
        x_BSD, _ = lax.scan(one_layer, self._embed(tokens), weights)
        return self.final_norm(x_BSD)

    def _attention(self, layout: TreeLayout) -> Attend:
        """Attention over a batch, planned once for all layers, on the mesh if there is one."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            config = block_config(self.hardware, layout.index.shape[1])
            plan = make_plan(layout, config=config)
            return functools.partial(
                attention, layout=layout, plan=plan, config=config, hardware=self.hardware
            )
        split_plan = make_split_plan(layout, self._split(mesh, layout), hardware=self.hardware)
        return functools.partial(split_attention, plan=split_plan, hardware=self.hardware)

    def balanced_order(self, layout: TreeLayout) -> Array | None:
        """i32[B, S], the order of a batch's tokens in which every device attends to as much.

        None where none is better: without devices along the tokens, where they exchange heads for
        all of them, or where a device's part of a row is a single block.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return None
        parts = self._split(mesh, layout).num_groups()
        if not can_balance(layout.index.shape[1], parts, self.hardware):
            return None
        return balanced_order(layout, parts, hardware=self.hardware)

    def _split(self, mesh: jax.sharding.AbstractMesh, layout: TreeLayout) -> Split:
        config = self.config
        rows, length = layout.index.shape
        rows //= math.prod(mesh.shape[axis] for axis in _SPLIT.rows)
        kv_heads = max(1, config.num_kv_heads // mesh.shape[_SPLIT.heads])
        keys_and_values = 2 * kv_heads * config.head_dim * config.compute_dtype.itemsize
        return choose_split(
            config.context_parallel,
            _SPLIT,
            devices=mesh.shape[_SPLIT.tokens],
            kv_heads=kv_heads,
            gathered_bytes=2 * rows * length * keys_and_values,
            hardware=self.hardware,
        )

    def decode(
        self, tokens: Array, positions: Array, cache_k: Array, cache_v: Array, lengths: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        """The hidden states of new tokens, which see a cache and one another causally.

        tokens, positions: i32[B, T]. cache_k, cache_v: [L, B, K, S, H]. lengths: i32[B], how many
        columns of the cache each row sees.

        Returns (hidden [B, T, D], (k [L, B, K, T, H], v [L, B, K, T, H])), the new tokens' keys and
        values, for `cache.write`.
        """
        graphdef, weights = nnx.split(self.layers)
        turn = rotation(positions, self.config)

        def one_layer(x_BTD, layer):
            layer_weights, k_BKSH, v_BKSH = layer

            def attend(q, k, v):
                new = k.swapaxes(1, 2), v.swapaxes(1, 2)
                return decode_attention(q, k_BKSH, v_BKSH, *new, lengths=lengths)

            x_BTD, (k, v) = nnx.merge(graphdef, layer_weights)(x_BTD, turn, attend)
            return x_BTD, (k.swapaxes(1, 2), v.swapaxes(1, 2))

        x_BTD, new_kv = lax.scan(one_layer, self._embed(tokens), (weights, cache_k, cache_v))
        return self.final_norm(x_BTD), new_kv

    def separate_layers(self) -> list[nnx.State]:
        """The weights of each layer in arrays of their own, stored for `project_few`.

        A copy of all weights but the embeddings: make it once for many steps.
        """
        weights = nnx.state(self.layers)

        def of_layer(at: int) -> nnx.State:
            return nnx.map_state(
                lambda path, w: w.replace(outputs_first(path[-1], w[...][at])), weights
            )

        return [of_layer(at) for at in range(self.config.num_layers)]

    def decode_in_place(
        self,
        layers: Sequence[nnx.State],
        tokens: Array,
        cache_k: Sequence[Array],
        cache_v: Sequence[Array],
        lengths: Array,
        new_lengths: Array,
    ) -> tuple[Array, list[Array], list[Array]]:
        """As `decode`, over separate layers and caches; each layer writes its cache as it goes.

        For CPUs. A scan copies each layer's weights and cache out of their stacks at every step,
        which an accelerator fuses into what reads them and a CPU does not.

        layers: `separate_layers()`. tokens: i32[B, T], at the positions from `lengths` on. cache_k,
        cache_v: L arrays [B, K, S, H]. new_lengths: i32[B], how many of the T tokens each row keeps
        (see `cache.write`).

        Returns the hidden states [B, T, D] and the caches.
        """
        num_new, columns = tokens.shape[1], cache_k[0].shape[2]
        columns_BT = new_columns(lengths, new_lengths, num_new, columns)
        turn = rotation(lengths[:, None] + jnp.arange(num_new), self.config)
        graphdef = nnx.graphdef(self.layers)
        caches_k, caches_v = [], []
        x_BTD = self._embed(tokens)
        for weights, k_BKSH, v_BKSH in zip(layers, cache_k, cache_v, strict=True):

            def attend(q, k, v, k_BKSH=k_BKSH, v_BKSH=v_BKSH):
                new = k.swapaxes(1, 2), v.swapaxes(1, 2)
                # Written before it is read, or XLA keeps a copy of what was there before.
                caches_k.append(write_columns(k_BKSH, new[0], columns_BT))
                caches_v.append(write_columns(v_BKSH, new[1], columns_BT))
                return decode_attention(q, caches_k[-1], caches_v[-1], *new, lengths=lengths)

            x_BTD, _ = nnx.merge(graphdef, weights)(x_BTD, turn, attend, project_few)
        return self.final_norm(x_BTD), caches_k, caches_v

    def token_logprobs(
        self, hidden: Array, targets: Array, temperature: float | Array
    ) -> tuple[Array, Array]:
        """Log-probabilities of targets i32[B, S] after hidden states [B, S, D], and entropies.

        f32[B, S] each, on the mesh if there is one; see agentx_kernels.logprob. temperature: a
        number or f32[B, S]. A target of -1 gives minus infinity.
        """
        mesh = jax.sharding.get_abstract_mesh()
        with jax.named_scope("logprob"):
            return logprob.token_logprobs(
                hidden,
                self.unembedding(),
                targets,
                hardware=self.hardware,
                temperature=temperature,
                softcap=self.config.logit_softcap,
                split=None if mesh.empty or mesh.size == 1 else _VOCABULARY_SPLIT,
            )

    def unembedding(self) -> Array:
        """[V, D] in the type of the activations: logits are hidden @ unembedding().T."""
        table = self.embed if self.config.tie_embeddings else self.lm_head
        return table[...].astype(self.config.compute_dtype)

    def _embed(self, tokens_BS: Array) -> Array:
        with jax.named_scope("embed"):
            x_BSD = self.embed[...].astype(self.config.compute_dtype)[tokens_BS]
            return constrain(x_BSD, "batch", "sequence", None)


def _embed(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Vectors [V, D] of length 1 in the mean."""
    return initializers.normal(shape[1] ** -0.5)(key, shape, dtype)


def _embed_with_a_shared_direction(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """`_embed`, and one vector as long added to all: see `layers.copying_output`."""
    of_all, of_each = jax.random.split(key)
    return _embed(of_each, shape, dtype) + _embed(of_all, (1, shape[1]), dtype)


def abstract_transformer(config: ModelConfig, *, hardware: Hardware = CPU) -> Transformer:
    """A Transformer whose parameters have no values yet: what a step is made from."""
    return nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), hardware=hardware))


def init_params(model: Transformer, key: Array, shardings: Any = None) -> nnx.State:
    """Fresh parameters of a model, abstract or not, born under jit with `shardings`.

    The values depend on the key alone, not on the mesh.
    """

    def init(key):
        return nnx.state(Transformer(model.config, nnx.Rngs(key), hardware=model.hardware))

    return jax.jit(init, out_shardings=shardings)(key)
