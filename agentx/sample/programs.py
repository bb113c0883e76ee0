"""What the engine runs on the device: four programs, each compiled once for every shape.

    decode   steps all rows one token at a time, until enough of them have stopped
    feed     reads given tokens into some rows, a piece of each at once
    copy     copies rows of the cache to others: a group's prompt to its members
    resize   the cache with other rows and other columns

They are compiled ahead, from shapes alone, and kept by shape: a call can't compile anything unseen,
and `num_compiled` is the whole truth. The cache is donated and changed in place.

Legend: L layers, B rows, K KV heads, S columns, H head size, D model, V vocabulary, R rows fed at
once, T tokens fed to a row at once, I steps of one call.
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
from agentx.sample.sampling import SamplingParams, row_uniforms, sample
from agentx.sharding import spec, tree_shardings

Array = Any

MAX_STEPS = 64
CACHE_AXES = ("layers", "batch", "kv_heads", None, "head_dim")


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
    """What `decode` sampled in `steps` steps. Each [I, B]; ids are -1 where a row rested."""

    ids: Array
    logprobs: Array
    processed_logprobs: Array
    steps: Array


class Programs:
    """The programs of one model on one mesh.

    stop_ids: after which a row stops.
    """

    def __init__(self, model: Transformer, mesh: Mesh, stop_ids: tuple[int, ...]):
        self._graphdef, abstract = nnx.split(model)
        self._config, self._mesh, self._stop_ids = model.config, mesh, stop_ids
        self.param_shardings = tree_shardings(abstract, mesh)
        self._abstract_params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract,
            self.param_shardings,
        )
        self._compiled: dict[tuple, Callable] = {}

    @property
    def num_compiled(self) -> int:
        return len(self._compiled)

    # ------------------------------------------------------------------ calls

    def empty(self, rows: int, columns: int) -> tuple[Array, Array]:
        """Keys and values, [L, B, K, S, H] each."""
        return self._get(("empty", rows, columns), self._empty, (), static=(rows, columns))()

    def decode(
        self, params: Any, cache: tuple[Array, Array], rows: Rows, seed: int, limit: int, floor: int
    ) -> tuple[tuple[Array, Array], Decoded]:
        """Samples in all rows that have a budget.

        Ends after `limit` steps (at most MAX_STEPS), or once no more than `floor` rows go on.
        """
        scalars = np.array([seed, limit, floor], np.int32)
        run = self._get(("decode", *_shape(cache)), self._decode, (cache, rows, scalars))
        return run(params, cache, rows, scalars)

    def feed(
        self,
        params: Any,
        cache: tuple[Array, Array],
        rows_R: np.ndarray,
        tokens_RT: np.ndarray,
        starts_R: np.ndarray,
        counts_R: np.ndarray,
    ) -> tuple[Array, Array]:
        """Appends the keys and values of the first counts[r] of tokens[r] to row rows[r].

        starts: i32[R], the columns in use by those rows. A count of 0 is padding.
        """
        arguments = (cache, rows_R, tokens_RT, starts_R, counts_R)
        run = self._get(("feed", *_shape(cache), *tokens_RT.shape), self._feed, arguments)
        return run(params, *arguments)

    def copy(
        self, cache: tuple[Array, Array], source_R: np.ndarray, target_R: np.ndarray
    ) -> tuple[Array, Array]:
        """Row target[r] becomes a copy of row source[r]; targets past the last row are padding."""
        arguments = (cache, source_R, target_R)
        run = self._get(("copy", *_shape(cache)), self._copy, arguments, takes_params=False)
        return run(*arguments)

    def resize(
        self, cache: tuple[Array, Array], source_B: np.ndarray, columns: int
    ) -> tuple[Array, Array]:
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
        return NamedSharding(self._mesh, spec(CACHE_AXES, shape, dict(self._mesh.shape)))

    def _constrain(self, cache: tuple[Array, Array]) -> tuple[Array, Array]:
        k, v = (lax.with_sharding_constraint(x, self._cache_sharding(x.shape)) for x in cache)
        return k, v

    # ------------------------------------------------------------------ the programs

    def _empty(self, rows: int, columns: int) -> tuple[Array, Array]:
        config = self._config
        shape = (config.num_layers, rows, config.num_kv_heads, columns, config.head_dim)
        zeros = jnp.zeros(shape, config.compute_dtype)
        return self._constrain((zeros, jnp.zeros_like(zeros)))

    def _decode(
        self, params: nnx.State, cache: tuple[Array, Array], rows: Rows, scalars: Array
    ) -> tuple[tuple[Array, Array], Decoded]:
        model = nnx.merge(self._graphdef, params)
        seed, limit, floor = scalars
        # A product with a transposed table is slower on a CPU; here it is transposed once a call.
        table_DV = lax.optimization_barrier(model.unembedding().T)
        stop_ids = jnp.array((*self._stop_ids, -1), jnp.int32)
        nothing_IB = jnp.zeros((MAX_STEPS, rows.token.shape[0]), jnp.float32)
        out = (nothing_IB.astype(jnp.int32) - 1, nothing_IB, nothing_IB)

        def goes_on(state):
            step, _, _, active_B, _ = state
            return (step < limit) & (active_B.sum() > floor)

        def one_step(state):
            step, cache, token_B, active_B, out = state
            hidden_B1D, new = model.decode(
                token_B[:, None], cache.lengths[:, None], cache.k, cache.v, cache.lengths
            )
            cache = write(cache, *new, active_B.astype(jnp.int32))
            k, v = self._constrain((cache.k, cache.v))
            cache = KVCache(k, v, cache.lengths)
            with jax.named_scope("sample"):
                logits_BV = jnp.dot(hidden_B1D[:, 0], table_DV, preferred_element_type=jnp.float32)
                # The token to be drawn stands at the position after the one just read.
                uniform_B = row_uniforms(seed, rows.request, cache.lengths)
                drawn = sample(logits_BV, uniform_B, rows.sampling)
            drawn = drawn._replace(token=jnp.where(active_B, drawn.token, -1))
            out = tuple(
                lax.dynamic_update_index_in_dim(o_IB, x_B, step, 0)
                for o_IB, x_B in zip(out, drawn, strict=True)
            )
            token_B = jnp.where(active_B, drawn.token, token_B)
            stopped_B = (drawn.token[:, None] == stop_ids).any(-1) | (step + 1 >= rows.budget)
            return step + 1, cache, token_B, active_B & ~stopped_B, out

        state = (jnp.int32(0), KVCache(*cache, rows.length), rows.token, rows.budget > 0, out)
        steps, cache_, _, _, out = lax.while_loop(goes_on, one_step, state)
        return (cache_.k, cache_.v), Decoded(*out, steps)

    def _feed(
        self,
        params: nnx.State,
        cache: tuple[Array, Array],
        rows_R: Array,
        tokens_RT: Array,
        starts_R: Array,
        counts_R: Array,
    ) -> tuple[Array, Array]:
        model = nnx.merge(self._graphdef, params)
        k_LBKSH, v_LBKSH = cache
        read = k_LBKSH[:, rows_R], v_LBKSH[:, rows_R]
        steps_T = jnp.arange(tokens_RT.shape[1])
        columns_RT = starts_R[:, None] + steps_T
        _, new = model.decode(tokens_RT, columns_RT, *read, starts_R)
        columns_RT = jnp.where(steps_T < counts_R[:, None], columns_RT, k_LBKSH.shape[3])

        def append(old_LBKSH: Array, new_LRKTH: Array) -> Array:
            # Indices that are arrays put their axes, R and T, first.
            new_RTLKH = new_LRKTH.transpose(1, 3, 0, 2, 4)
            at = old_LBKSH.at[:, rows_R[:, None], :, columns_RT]
            return at.set(new_RTLKH, mode="drop")

        return self._constrain((append(k_LBKSH, new[0]), append(v_LBKSH, new[1])))

    def _copy(
        self, cache: tuple[Array, Array], source_R: Array, target_R: Array
    ) -> tuple[Array, Array]:
        k, v = (x.at[:, target_R].set(x[:, source_R], mode="drop") for x in cache)
        return self._constrain((k, v))

    def _resize(
        self, columns: int, cache: tuple[Array, Array], source_B: Array
    ) -> tuple[Array, Array]:
        def one(x_LBKSH: Array) -> Array:
            kept = x_LBKSH[:, source_B, :, :columns]
            missing = columns - kept.shape[3]
            return jnp.pad(kept, ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0)))

        return self._constrain((one(cache[0]), one(cache[1])))


def _shape(cache: tuple[Array, Array]) -> tuple[int, int]:
    """Rows and columns of a cache."""
    return cache[0].shape[1], cache[0].shape[3]
