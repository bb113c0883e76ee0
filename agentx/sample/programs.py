"""What the engine runs on the device: four programs, each compiled once for every shape.

    decode   steps all rows one token at a time, until enough of them have stopped
    feed     reads given tokens into some rows, a piece of each at once
    copy     copies rows of the cache to others: a group's prompt to its members
    resize   the cache with other rows and other columns

The cache is keys and values, of each place of the model's pattern [L, B, K, S, H] (see
`ModelConfig.places`); if `separate`, of each layer [B, K, S, H].

They are compiled ahead, from shapes alone, and kept by shape: a call can't compile anything unseen,
and `num_compiled` is the whole truth. The cache is donated and changed in place.

Legend: L layers of a place, B rows, K KV heads, S columns, H head size, D model, V vocabulary,
R rows fed at once, T tokens fed to a row at once, I steps of one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agentx.model.cache import KVCache, write
from agentx.model.transformer import Transformer
from agentx.sample.sampling import SamplingParams, divisor, row_uniforms, sample
from agentx.sharding import constrain, spec, tree_shardings
from agentx_kernels.logits import capped

Array = Any

MAX_STEPS = 64
# Of how many steps the log-probabilities are computed at once: steps that were not run cost none.
_SCORED_STEPS = 16
Cache = tuple[list[Any], list[Any]]


class Rows(NamedTuple):
    """The state of every row at the start of `decode`. Each [B].

    token: i32, the last token of the row's sequence, not yet in the cache. length: i32, the columns
    in use. request: u32, which random numbers are the row's. budget: i32, how many tokens it may
    sample, 0 for a row that rests. sampling: how.
    """

    token: Array
    length: Array
    request: Array
    budget: Array
    sampling: SamplingParams


class Decoded(NamedTuple):
    """What `decode` sampled in `steps` steps. Each [I, B].

    ids: i32, -1 where a row rested. logprobs: f32, over the whole vocabulary at the row's
    temperature, of which 0 counts as 1: as the trainer computes them, whatever top_k and top_p
    were; 0 where a row rested. processed_logprobs: see `Sampled`. experts: i32[I, B, L, k], those
    that the token took which was read in that step, the one before the one sampled, of the L layers
    that have experts; None where none has.
    """

    ids: Array
    logprobs: Array
    processed_logprobs: Array
    experts: Array | None
    steps: Array


class Programs:
    """The programs of one model on one mesh.

    vocab_size: only ids below it are drawn. stop_ids: after which a row stops.
    separate: whether each layer has a cache and weights of its own, and decoding no scan, so that
      nothing is copied out of stacks: for CPUs. Compiling then takes longer with every layer.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        vocab_size: int,
        stop_ids: tuple[int, ...],
        *,
        separate: bool,
    ):
        self._graphdef, abstract = nnx.split(model)
        self._config, self._mesh = model.config, mesh
        self._vocab_size, self._stop_ids = vocab_size, stop_ids
        self.param_shardings = tree_shardings(abstract, mesh)
        self._abstract_params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract,
            self.param_shardings,
        )
        self._separate = separate
        self._compiled: dict[tuple, Callable] = {}

    @property
    def num_compiled(self) -> int:
        return len(self._compiled)

    # ------------------------------------------------------------------ calls

    def empty(self, rows: int, columns: int) -> Cache:
        """A cache of nothing."""
        return self._get(("empty", rows, columns), self._empty, (), static=(rows, columns))()

    def decode(
        self, params: Any, cache: Cache, rows: Rows, seed: int, limit: int, floor: int
    ) -> tuple[Cache, Decoded]:
        """Samples in all rows that have a budget.

        Ends after `limit` steps (at most MAX_STEPS), or once no more than `floor` rows go on.
        """
        scalars = np.array([seed, limit, floor], np.int32)
        run = self._get(("decode", *_shape(cache)), self._decode, (cache, rows, scalars))
        return run(params, cache, rows, scalars)

    def feed(
        self,
        params: Any,
        cache: Cache,
        rows_R: np.ndarray,
        tokens_RT: np.ndarray,
        starts_R: np.ndarray,
        counts_R: np.ndarray,
    ) -> tuple[Cache, Array | None]:
        """Appends the keys and values of the first counts[r] of tokens[r] to row rows[r].

        starts: i32[R], the columns in use by those rows. A count of 0 is padding. Also gives the
        experts that the tokens took, i32[R, T, L, k], or None (see `Decoded`).
        """
        arguments = (cache, rows_R, tokens_RT, starts_R, counts_R)
        run = self._get(("feed", *_shape(cache), *tokens_RT.shape), self._feed, arguments)
        return run(params, *arguments)

    def copy(self, cache: Cache, source_R: np.ndarray, target_R: np.ndarray) -> Cache:
        """Row target[r] becomes a copy of row source[r]; targets past the last row are padding."""
        arguments = (cache, source_R, target_R)
        run = self._get(("copy", *_shape(cache)), self._copy, arguments, takes_params=False)
        return run(*arguments)

    def resize(self, cache: Cache, source_B: np.ndarray, columns: int) -> Cache:
        """A cache of len(source) rows, row b a copy of row source[b], in `columns` columns."""
        arguments = (cache, source_B)
        key = ("resize", *_shape(cache), len(source_B), columns)
        run = self._get(
            key, self._resize, arguments, static=(columns,), takes_params=False, donate=False
        )
        return run(*arguments)

    # ------------------------------------------------------------------ compilation

    def _get(
        self,
        key: tuple,
        function: Callable,
        arguments: tuple,
        *,
        static: tuple = (),
        takes_params: bool = True,
        donate: bool = True,
    ) -> Callable:
        if key not in self._compiled:
            self._compiled[key] = self._compile(
                function, arguments, static, takes_params and bool(arguments), donate
            )
        return self._compiled[key]

    def _compile(
        self, function: Callable, arguments: tuple, static: tuple, takes_params: bool, donate: bool
    ) -> Callable:
        def traced(*args):
            with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
                return function(*static, *args)

        replicated = NamedSharding(self._mesh, PartitionSpec())

        def abstract(x: Any) -> jax.ShapeDtypeStruct:
            sharding = self._cache_sharding(x.shape) if isinstance(x, jax.Array) else replicated
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        shapes = jax.tree.map(abstract, arguments)
        if takes_params:
            shapes = (self._abstract_params, *shapes)
        donated = (int(takes_params),) if donate and arguments else ()
        return jax.jit(traced, donate_argnums=donated).lower(*shapes).compile()

    def _cache_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Of one place's cache, or of one layer's."""
        # One head that all heads of the queries share lies with each of them.
        heads = "kv_heads" if shape[-3] > 1 else None
        axes = ("layers", "batch", heads, None, "head_dim")[-len(shape) :]
        return NamedSharding(self._mesh, spec(axes, shape, dict(self._mesh.shape)))

    def _constrain(self, cache: Cache) -> Cache:
        return jax.tree.map(
            lambda x: lax.with_sharding_constraint(x, self._cache_sharding(x.shape)), cache
        )

    # ------------------------------------------------------------------ the programs

    def _empty(self, rows: int, columns: int) -> Cache:
        config = self._config
        kv_heads, *sizes = config.cache_dims
        stacks: list[tuple[int, ...]] = [(len(place.layers),) for place in config.places]
        if self._separate:
            stacks = [()] * config.num_layers
        k, v = (
            [jnp.zeros((*s, rows, kv_heads, columns, size), config.compute_dtype) for s in stacks]
            for size in sizes
        )
        return self._constrain((k, v))

    def _decode(
        self, params: nnx.State, cache: Cache, rows: Rows, scalars: Array
    ) -> tuple[Cache, Decoded]:
        model = nnx.merge(self._graphdef, params)
        seed, limit, floor = scalars
        # A product with a transposed table is slower on a CPU; here it is transposed once a call.
        table_DV = lax.optimization_barrier(model.unembedding().T)
        stop_ids = jnp.array((*self._stop_ids, -1), jnp.int32)
        nothing_IB = jnp.zeros((MAX_STEPS, rows.token.shape[0]), jnp.float32)
        shape = (*nothing_IB.shape, self._config.d_model)
        hidden_IBD = constrain(jnp.zeros(shape, self._config.compute_dtype), None, "batch", None)
        experts_IBLk = None
        if self._config.moe is not None:
            experts_IBLk = jnp.zeros((*nothing_IB.shape, *self._config.routing_shape), jnp.int32)
        out = (nothing_IB.astype(jnp.int32) - 1, nothing_IB, hidden_IBD, experts_IBLk)

        layers = model.separate_layers() if self._separate else ()

        def read(token_B1, cache, counts_B):
            if self._separate:
                hidden, k, v, experts = model.decode_in_place(
                    layers, token_B1, cache.k, cache.v, cache.lengths, counts_B
                )
                cache = KVCache(k, v, cache.lengths + counts_B)
            else:
                positions_B1 = cache.lengths[:, None]
                hidden, new, experts = model.decode(token_B1, positions_B1, *cache)
                cache = write(cache, *new, counts_B)
            k, v = self._constrain((cache.k, cache.v))
            return (hidden, experts), KVCache(k, v, cache.lengths)

        def goes_on(state):
            step, _, _, active_B, _ = state
            return (step < limit) & (active_B.sum() > floor)

        def one_step(state):
            step, cache, token_B, active_B, out = state
            of_read, cache = read(token_B[:, None], cache, active_B.astype(jnp.int32))
            hidden_BD, experts_BLk = jax.tree.map(lambda x_B1: x_B1[:, 0], of_read)
            with jax.named_scope("sample"):
                raw_BV = jnp.dot(hidden_BD, table_DV, preferred_element_type=jnp.float32)
                logits_BV = capped(raw_BV, self._config.logit_softcap)
                if self._vocab_size < self._config.vocab_size:
                    is_id_V = jnp.arange(self._config.vocab_size) < self._vocab_size
                    logits_BV = jnp.where(is_id_V, logits_BV, -jnp.inf)
                # The token to be drawn stands at the position after the one just read.
                uniform_B = row_uniforms(seed, rows.request, cache.lengths)
                drawn = sample(logits_BV, uniform_B, rows.sampling)
            drawn = drawn._replace(token=jnp.where(active_B, drawn.token, -1))
            out = jax.tree.map(
                lambda o_IB, x_B: lax.dynamic_update_index_in_dim(o_IB, x_B, step, 0),
                out,
                (*drawn, hidden_BD, experts_BLk),
            )
            token_B = jnp.where(active_B, drawn.token, token_B)
            stopped_B = (drawn.token[:, None] == stop_ids).any(-1) | (step + 1 >= rows.budget)
            return step + 1, cache, token_B, active_B & ~stopped_B, out

        state = (jnp.int32(0), KVCache(*cache, rows.length), rows.token, rows.budget > 0, out)
        steps, (k, v, _), _, _, out = lax.while_loop(goes_on, one_step, state)
        ids_IB, processed_IB, hidden_IBD, experts_IBLk = out
        temperature_B = divisor(jnp.asarray(rows.sampling.temperature))
        temperature_IB = jnp.broadcast_to(temperature_B, ids_IB.shape)
        of_tokens = hidden_IBD, ids_IB, temperature_IB

        def score(piece, logprobs_IB):
            at = piece * _SCORED_STEPS
            own = (lax.dynamic_slice_in_dim(x, at, _SCORED_STEPS) for x in of_tokens)
            logprobs_BI, _ = model.token_logprobs(*(x.swapaxes(0, 1) for x in own))
            return lax.dynamic_update_slice_in_dim(logprobs_IB, logprobs_BI.T, at, 0)

        num_pieces = -(-steps // _SCORED_STEPS)
        logprobs_IB = lax.fori_loop(0, num_pieces, score, nothing_IB)
        logprobs_IB = jnp.where(ids_IB >= 0, logprobs_IB, 0)
        return (k, v), Decoded(ids_IB, logprobs_IB, processed_IB, experts_IBLk, steps)

    def _feed(
        self,
        params: nnx.State,
        cache: Cache,
        rows_R: Array,
        tokens_RT: Array,
        starts_R: Array,
        counts_R: Array,
    ) -> tuple[Cache, Array | None]:
        model = nnx.merge(self._graphdef, params)
        k, v = jax.tree.map(lambda x: x[..., rows_R, :, :, :], cache)
        if self._separate:
            k, v = self._stacked(k), self._stacked(v)
        steps_T = jnp.arange(tokens_RT.shape[1])
        columns_RT = starts_R[:, None] + steps_T
        _, (k_new, v_new), experts = model.decode(tokens_RT, columns_RT, k, v, starts_R)
        if self._separate:
            k_new, v_new = self._unstacked(k_new), self._unstacked(v_new)
        no_column = _shape(cache)[1]
        columns_RT = jnp.where(steps_T < counts_R[:, None], columns_RT, no_column)

        def append(old: Array, new: Array) -> Array:
            # Indices that are arrays put their axes, R and T, first.
            at = old.at[..., rows_R[:, None], :, columns_RT, :]
            return at.set(jnp.moveaxis(new, (-4, -2), (0, 1)), mode="drop")

        return self._constrain(jax.tree.map(append, cache, (k_new, v_new))), experts

    def _stacked(self, layers: list[Array]) -> list[Array]:
        """Every layer's array -> every place's."""
        return [jnp.stack([layers[i] for i in place.layers]) for place in self._config.places]

    def _unstacked(self, places: list[Array]) -> list[Array]:
        """Every place's array -> every layer's."""
        of_layer = {
            number: stacked[at]
            for place, stacked in zip(self._config.places, places, strict=True)
            for at, number in enumerate(place.layers)
        }
        return [of_layer[number] for number in range(self._config.num_layers)]

    def _copy(self, cache: Cache, source_R: Array, target_R: Array) -> Cache:
        def one(x: Array) -> Array:
            read = x[..., source_R, :, :, :]
            return x.at[..., target_R, :, :, :].set(read, mode="drop")

        return self._constrain(jax.tree.map(one, cache))

    def _resize(self, columns: int, cache: Cache, source_B: Array) -> Cache:
        def one(x: Array) -> Array:
            kept = x[..., source_B, :, :columns, :]
            return jnp.pad(kept, [(0, 0)] * (x.ndim - 2) + [(0, columns - kept.shape[-2]), (0, 0)])

        return self._constrain(jax.tree.map(one, cache))


def _shape(cache: Cache) -> tuple[int, int]:
    """Rows and columns of a cache."""
    shape = jax.tree.leaves(cache)[0].shape
    return shape[-4], shape[-2]
