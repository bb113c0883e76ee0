"""The decoder: embedding, scanned layers, final norm. Training and decoding share the layers.

Layers that repeat a pattern are scanned over, a period of it at a time (`ModelConfig.stacks`).

`Transformer(tokens, layout)` gives hidden states, not logits: `token_logprobs` makes those of a
chunk at a time, for trainer and sampler alike. `decode` continues rows whose earlier keys and
values lie in a cache; it returns the new ones and leaves writing to `cache.py`.

Legend: L layers of a place, B rows, S tokens a row or columns of a cache, T new tokens, N heads,
K KV heads, H head size, D model, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.nn import initializers

from agentx.model.attention import Attend
from agentx.model.cache import new_columns, write_columns
from agentx.model.config import LayerKind, ModelConfig, RopeKind
from agentx.model.embedding import look_up
from agentx.model.layers import Layer
from agentx.model.moe import Routing
from agentx.model.parts import RMSNorm, Turn, outputs_first, parameter, project_few, rotation
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


class Forward(NamedTuple):
    """hidden: [B, S, D], after the final norm. routing: where tokens went, of all layers that have
    experts, in order and stacked; None where there are none."""

    hidden: Array
    routing: Routing | None

    @property
    def experts(self) -> Array | None:
        """i32[B, S, L, k], those that every token took."""
        chosen = None if self.routing is None else self.routing.chosen
        return None if chosen is None else jnp.moveaxis(chosen, 0, 2)


class Transformer(nnx.Module):
    """A decoder as `config` describes it, compiled for `hardware`.

    layers: one `Layer` for each of `config.places`, stacked over the layers that stand there.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, hardware: Hardware = CPU):
        self.config = config
        self.hardware = hardware
        sizes = {"vocab": config.vocab_size, "embed": config.d_model}
        embed = _embed_with_a_shared_direction if config.init == "copy" else _embed
        self.embed = parameter(rngs, embed, config, **sizes)
        self.layers = nnx.List([Layer(rngs, config, place) for place in config.places])
        self.final_norm = RMSNorm(rngs, config, embed=config.d_model)
        if not config.tie_embeddings:
            self.lm_head = parameter(rngs, initializers.normal(0.02), config, **sizes)

    def __call__(self, tokens: Array, layout: TreeLayout, experts: Array | None = None) -> Forward:
        """The hidden states of rows of tokens i32[B, S], laid out by layout [B, S].

        experts: i32[B, S, L, k] as `Forward.experts` gives them, to be taken again; the router
        chooses if None.
        """
        config = self.config
        turns = self._turns(layout.position)
        windows = {kind.window for kind in config.kinds}
        attends = {window: self._attention(layout, window) for window in windows}
        useful_BS = layout.subtree_end > 0

        def one_layer(x_BSD, weights, chosen_BSk, graphdef, kind):
            layer = nnx.merge(graphdef, weights)
            taken = {"useful_BS": useful_BS, "chosen_BSk": chosen_BSk}
            layered = layer(x_BSD, turns[kind.rope], attends[kind.window], **taken)
            return layered.x, layered.routing

        if config.remat == "full":
            one_layer = jax.checkpoint(one_layer, prevent_cse=False, static_argnums=(3, 4))

        x_BSD = self._embed(tokens)
        routing: list[Routing | None] = []
        replayed = iter(self._replayed(experts))
        for stack in self._stacks():

            def one_period(x_BSD, layers, stack=stack):
                taken = []
                for (kind, graphdef, _), (weights, chosen_BSk) in zip(stack, layers, strict=True):
                    x_BSD, of_layer = one_layer(x_BSD, weights, chosen_BSk, graphdef, kind)
                    taken.append(of_layer)
                return x_BSD, taken

            inputs = [(weights, next(replayed)) for _, _, weights in stack]
            x_BSD, of_stack = lax.scan(one_period, x_BSD, inputs)
            routing += of_stack
        return Forward(self.final_norm(x_BSD), self._in_order(routing))

    def _in_order(self, routing: list[Routing | None]) -> Routing | None:
        """Every place's routing as one, of the layers in order."""
        places = [place for place in self.config.places if place.kind.is_sparse]
        taken = [each for each in routing if each is not None]
        if not taken:
            return None
        order = np.argsort([layer for place in places for layer in place.layers])
        return jax.tree.map(lambda *of_places: jnp.concatenate(of_places)[order], *taken)

    def _replayed(self, experts: Array | None) -> list[Array | None]:
        """`Forward.experts` as every place's layers take them, [L, B, S, k] each."""
        config = self.config
        if experts is None:
            return [None] * len(config.places)
        first = config.num_dense_layers
        return [
            jnp.stack([experts[:, :, layer - first] for layer in place.layers])
            if place.kind.is_sparse
            else None
            for place in config.places
        ]

    def _stacks(self) -> list[list[tuple[LayerKind, nnx.GraphDef, nnx.State]]]:
        """Of each of `config.stacks`, every place's kind, structure and stacked weights."""
        layers = iter(self.layers)
        return [
            [(place.kind, *nnx.split(next(layers))) for place in stack]
            for stack in self.config.stacks
        ]

    def _turns(self, positions: Array) -> dict[RopeKind, Turn]:
        """The rotation of every kind that a layer has."""
        kinds = {kind.rope for kind in self.config.kinds}
        return {kind: rotation(positions, self.config, kind) for kind in kinds}

    def _attention(self, layout: TreeLayout, window: int | None) -> Attend:
        """Attention over a batch, planned once for all layers of a window, on the mesh if any."""
        mesh = jax.sharding.get_abstract_mesh()
        options: dict[str, Any] = {
            "hardware": self.hardware,
            "softcap": self.config.attention_softcap,
            "scale": self.config.softmax_scale,
        }
        if mesh.empty or mesh.size == 1:
            blocks = block_config(self.hardware, layout.index.shape[1])
            plan = make_plan(layout, config=blocks, window=window)
            options |= {"layout": layout, "plan": plan, "config": blocks, "window": window}
            return lambda q, k, v, sinks: attention(q, k, v, sinks=sinks, **options)
        split = self._split(mesh, layout)
        split_plan = make_split_plan(layout, split, hardware=self.hardware, window=window)
        options["plan"] = split_plan
        return lambda q, k, v, sinks: split_attention(q, k, v, sinks=sinks, **options)

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
        size = config.head_dim + config.value_dim
        keys_and_values = kv_heads * size * config.compute_dtype.itemsize
        return choose_split(
            config.context_parallel,
            _SPLIT,
            devices=mesh.shape[_SPLIT.tokens],
            kv_heads=kv_heads,
            gathered_bytes=2 * rows * length * keys_and_values,
            hardware=self.hardware,
        )

    def decode(
        self,
        tokens: Array,
        positions: Array,
        cache_k: Sequence[Array],
        cache_v: Sequence[Array],
        lengths: Array,
    ) -> tuple[Array, tuple[list[Array], list[Array]]]:
        """The hidden states of new tokens, which see a cache and one another causally.

        tokens, positions: i32[B, T]. cache_k, cache_v: of each of `config.places` [L, B, K, S, H]
        (see `config.cache_dims`). lengths: i32[B], how many columns of the cache each row sees.

        Returns (hidden [B, T, D], (k, v)), the new tokens' keys and values, [L, B, K, T, H] of each
        place, for `cache.write`.
        """
        turns = self._turns(positions)
        caches = zip(cache_k, cache_v, strict=True)
        x_BTD = self._embed(tokens)
        new_k: list[Array] = []
        new_v: list[Array] = []
        for stack in self._stacks():

            def one_period(x_BTD, layers, stack=stack):
                new = []
                for (kind, graphdef, _), (weights, k_BKSH, v_BKSH) in zip(
                    stack, layers, strict=True
                ):
                    attend = functools.partial(
                        self._attend_cache, k_BKSH, v_BKSH, lengths, kind.window
                    )
                    layer = nnx.merge(graphdef, weights)
                    layered = layer(x_BTD, turns[kind.rope], attend, from_cache=True)
                    x_BTD = layered.x
                    new.append(self._cached(layered.k, layered.v))
                return x_BTD, new

            layers = [(weights, *next(caches)) for _, _, weights in stack]
            x_BTD, new = lax.scan(one_period, x_BTD, layers)
            new_k += [k for k, _ in new]
            new_v += [v for _, v in new]
        return self.final_norm(x_BTD), (new_k, new_v)

    def separate_layers(self) -> list[nnx.State]:
        """The weights of each layer in arrays of their own, stored for `project_few`.

        A copy of all weights but the embeddings: make it once for many steps.
        """

        def stored(path: Any, w: nnx.Variable, at: int) -> nnx.Variable:
            # Experts are no concern of `project_few`'s.
            num_inputs = 0 if "moe" in path else w.get_metadata("num_inputs")
            return w.replace(outputs_first(w[...][at], num_inputs))

        separate = {}
        for place, layer in zip(self.config.places, self.layers, strict=True):
            for at, number in enumerate(place.layers):
                of_layer = functools.partial(stored, at=at)
                separate[number] = nnx.map_state(of_layer, nnx.state(layer))
        return [separate[number] for number in range(self.config.num_layers)]

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
        cache_v: of every layer [B, K, S, H]. new_lengths: i32[B], how many of the T tokens each row
        keeps (see `cache.write`).

        Returns the hidden states [B, T, D] and the caches.
        """
        num_new, columns = tokens.shape[1], cache_k[0].shape[2]
        columns_BT = new_columns(lengths, new_lengths, num_new, columns)
        turns = self._turns(lengths[:, None] + jnp.arange(num_new))
        graphdefs = {
            number: nnx.graphdef(layer)
            for place, layer in zip(self.config.places, self.layers, strict=True)
            for number in place.layers
        }
        caches_k, caches_v = list(cache_k), list(cache_v)
        x_BTD = self._embed(tokens)
        for number, kind in enumerate(self.config.kinds):

            def attend(q, k, v, sinks, number=number, window=kind.window):
                new_k, new_v = self._cached(k, v)
                # Written before it is read, or XLA keeps a copy of what was there before.
                caches_k[number] = write_columns(caches_k[number], new_k, columns_BT)
                caches_v[number] = write_columns(caches_v[number], new_v, columns_BT)
                cache = caches_k[number], caches_v[number]
                return self._attend_cache(*cache, lengths, window, q, k, v, sinks)

            layer = nnx.merge(graphdefs[number], layers[number])
            options: dict[str, Any] = {"project": project_few, "from_cache": True}
            x_BTD = layer(x_BTD, turns[kind.rope], attend, **options).x
        return self.final_norm(x_BTD), caches_k, caches_v

    def _attend_cache(
        self,
        k_BKSH: Array,
        v_BKSH: Array,
        lengths: Array,
        window: int | None,
        q_BTNH: Array,
        k_BTKH: Array,
        v_BTKH: Array,
        sinks_N: Array | None,
    ) -> Array:
        """What new tokens look up, of one layer's cache and of one another."""
        latent = self.config.latent
        return decode_attention(
            q_BTNH,
            k_BKSH,
            k_BKSH[..., : latent.key_value_rank] if latent else v_BKSH,
            k_BTKH.swapaxes(1, 2),
            v_BTKH.swapaxes(1, 2),
            lengths=lengths,
            window=window,
            softcap=self.config.attention_softcap,
            sinks=sinks_N,
            scale=self.config.softmax_scale,
        )

    def _cached(self, k_BTKH: Array, v_BTKH: Array) -> tuple[Array, Array]:
        """What a cache holds of new keys and values, [B, K, T, H] each (`config.cache_dims`)."""
        value_size = self.config.cache_dims[2]
        return k_BTKH.swapaxes(1, 2), v_BTKH[..., :value_size].swapaxes(1, 2)

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
            config = self.config
            x_BSD = look_up(self.embed[...], tokens_BS, config.compute_dtype)
            if config.scale_embeddings:
                x_BSD *= jnp.asarray(config.d_model**0.5, config.compute_dtype)
            return constrain(x_BSD, "batch", "sequence", None)


def _embed(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Vectors [V, D] of length 1 in the mean."""
    return initializers.normal(shape[1] ** -0.5)(key, shape, dtype)


def _embed_with_a_shared_direction(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """`_embed`, and one vector as long added to all: see `attention.copying_output`."""
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
