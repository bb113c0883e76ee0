"""The log-probability kernels for TPU: statistics of the logits, and gradients. Pallas and Mosaic.

Each takes a block of tokens and a block of the vocabulary a grid step. Logits stand as [columns,
tokens], so that what belongs to a token is a row: maxima and sums go down the columns, without
crossing lanes. A kernel keeps what it makes in VMEM while the other side streams by:

    statistics     tokens stay, the vocabulary streams by
    of_hidden      tokens stay, the vocabulary streams by
    of_embedding   columns of the vocabulary stay, tokens stream by

Every gradient is summed by one core in one order: the same bits every time.

Left out: both gradients in one pass, one of them summed in HBM, which would take three matrix
products where these take four.

Legend: T tokens (whole blocks of them), D model, V vocabulary (any), C tokens and W columns of a
block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from agentx_kernels.logits import LOWEST, LogitBlocks, capped, capped_and_slope
from agentx_kernels.tpu.masked_scores import dot

Array = Any

# How much of D a product takes at once: a loop over parts compiles many times as fast as the whole.
_PARTS = (512, 384, 256, 128)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a kernel is compiled with.

    softcap: None for none. vmem_limit: bytes. interpret: as `pallas_call` takes it.
    """

    softcap: float | None
    blocks: LogitBlocks
    vmem_limit: int
    interpret: Any = False


def statistics(
    hidden: Array, embedding: Array, targets: Array, inverse_temperature: Array, options: Options
) -> Array:
    """f32[4, T]: maximum m, sums of exp(x - m) and exp(x - m)(x - m), the target's logit.

    hidden [T, D], embedding [V, D], targets i32[1, T], inverse_temperature f32[1, T]. A target
    beyond [0, V) has LOWEST.
    """
    blocks, (length, size) = options.blocks, hidden.shape
    rows = pl.BlockSpec((1, blocks.tokens), lambda i, j: (0, i))
    return pl.pallas_call(
        functools.partial(_statistics_kernel, options=options, vocab_size=embedding.shape[0]),
        grid=(length // blocks.tokens, pl.cdiv(embedding.shape[0], blocks.columns)),
        in_specs=[
            pl.BlockSpec((blocks.tokens, size), lambda i, j: (i, 0)),
            pl.BlockSpec((blocks.columns, size), lambda i, j: (j, 0)),
            rows,
            rows,
        ],
        out_specs=pl.BlockSpec((4, blocks.tokens), lambda i, j: (0, i)),
        out_shape=jax.ShapeDtypeStruct((4, length), jnp.float32),
        scratch_shapes=[pltpu.VMEM((blocks.columns, blocks.tokens), jnp.float32)],
        name="logprob_statistics",
        **_compiled_with(options),
    )(hidden, embedding, targets, inverse_temperature)


def of_hidden(
    hidden: Array,
    embedding: Array,
    targets: Array,
    rows: Array,
    dtype: Any,
    options: Options,
) -> Array:
    """The gradient of hidden, [T, D] in dtype.

    rows: f32[4, T], the inverse temperature, the maximum, 1 / sum and the cotangent of the
    log-probability times the inverse temperature.
    """
    blocks, (length, size) = options.blocks, hidden.shape
    own = pl.BlockSpec((blocks.tokens, size), lambda i, j: (i, 0))
    return pl.pallas_call(
        functools.partial(_of_hidden_kernel, options=options, vocab_size=embedding.shape[0]),
        grid=(length // blocks.tokens, pl.cdiv(embedding.shape[0], blocks.columns)),
        in_specs=[
            own,
            pl.BlockSpec((blocks.columns, size), lambda i, j: (j, 0)),
            pl.BlockSpec((1, blocks.tokens), lambda i, j: (0, i)),
            pl.BlockSpec((4, blocks.tokens), lambda i, j: (0, i)),
        ],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct(hidden.shape, dtype),
        scratch_shapes=_gradient_scratch(own, hidden, options),
        name="logprob_of_hidden",
        **_compiled_with(options),
    )(hidden, embedding, targets, rows)


def of_embedding(
    hidden: Array,
    embedding: Array,
    targets: Array,
    rows: Array,
    after: Array,
    columns: range,
    dtype: Any,
    options: Options,
) -> Array:
    """The gradient of embedding[columns], in dtype. rows: as for `of_hidden`.

    after: any array; it is not read, but the kernel starts when it is there.
    columns: of the vocabulary; the first is that of a block, the last of a block or of all.
    """
    blocks, (length, size) = options.blocks, hidden.shape
    own = pl.BlockSpec((blocks.columns, size), lambda j, i, first: (j, 0))
    of_tokens = [pl.BlockSpec((n, blocks.tokens), lambda j, i, first: (0, i)) for n in (1, 4)]
    return pl.pallas_call(
        functools.partial(_of_embedding_kernel, options=options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(len(columns), blocks.columns), length // blocks.tokens),
            in_specs=[
                pl.BlockSpec((blocks.tokens, size), lambda j, i, first: (i, 0)),
                pl.BlockSpec((blocks.columns, size), lambda j, i, first: (first[0] + j, 0)),
                *of_tokens,
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=own,
            scratch_shapes=_gradient_scratch(own, hidden, options),
        ),
        out_shape=jax.ShapeDtypeStruct((len(columns), size), dtype),
        name="logprob_of_embedding",
        **_compiled_with(options),
    )(
        # An operand, not a constant: so kernels of other columns are one to the compiler.
        jnp.array([columns.start // blocks.columns], jnp.int32),
        *(hidden, embedding, targets, rows, after),
    )


def _gradient_scratch(own: Any, hidden: Array, options: Options) -> list[Any]:
    """The gradient's sum; raw products; their gradients."""
    shape = options.blocks.columns, options.blocks.tokens
    return [
        pltpu.VMEM(own.block_shape, jnp.float32),
        pltpu.VMEM(shape, jnp.float32),
        pltpu.VMEM(shape, hidden.dtype),
    ]


def _compiled_with(options: Options) -> dict[str, Any]:
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=options.vmem_limit
        ),
        "interpret": options.interpret,
    }


def _statistics_kernel(
    hidden_ref: Any,
    block_ref: Any,
    target_ref: Any,
    inverse_temperature_ref: Any,
    o_ref: Any,
    raw_ref: Any,
    *,
    options: Options,
    vocab_size: int,
) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        o_ref[0:1] = jnp.full_like(o_ref[0:1], LOWEST)
        o_ref[1:3] = jnp.zeros_like(o_ref[1:3])
        o_ref[3:4] = jnp.full_like(o_ref[3:4], LOWEST)

    _products(hidden_ref, block_ref, raw_ref)
    x = capped(raw_ref[...], options.softcap) * inverse_temperature_ref[...]
    column = _columns(x.shape, pl.program_id(1), options)
    x = jnp.where(column < vocab_size, x, LOWEST)
    old, total, weighted = o_ref[0:1], o_ref[1:2], o_ref[2:3]
    m = jnp.maximum(old, x.max(0, keepdims=True))
    shifted = x - m
    p = jnp.exp(shifted)
    kept = jnp.exp(old - m)
    at_target = jnp.where(column == target_ref[...], x, LOWEST).max(0, keepdims=True)
    o_ref[0:1] = m
    o_ref[1:2] = kept * total + p.sum(0, keepdims=True)
    weighted = kept * (weighted + (old - m) * total)
    o_ref[2:3] = weighted + (p * shifted).sum(0, keepdims=True)
    o_ref[3:4] = jnp.maximum(o_ref[3:4], at_target)


def _of_hidden_kernel(
    hidden_ref: Any,
    block_ref: Any,
    target_ref: Any,
    rows_ref: Any,
    o_ref: Any,
    acc_ref: Any,
    raw_ref: Any,
    draw_ref: Any,
    *,
    options: Options,
    vocab_size: int,
) -> None:
    j, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(j == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    if vocab_size % options.blocks.columns:
        # What lies beyond the vocabulary is no number, and 0 times it is not 0.
        @pl.when(j == last)
        def _() -> None:
            is_real = _columns(block_ref.shape, j, options) < vocab_size
            block_ref[...] = jnp.where(is_real, block_ref[...], 0)

    _products(hidden_ref, block_ref, raw_ref)
    draw, column = _draw(raw_ref, target_ref, rows_ref, j, options)
    draw_ref[...] = jnp.where(column < vocab_size, draw, 0).astype(draw_ref.dtype)

    def add(at: Any) -> None:
        acc_ref[:, at] += dot(draw_ref[...], block_ref[:, at], 0, 0)

    _over_parts(add, acc_ref.shape[1])

    @pl.when(j == last)
    def _() -> None:
        o_ref[...] = acc_ref[...].astype(o_ref.dtype)


def _of_embedding_kernel(
    first_ref: Any,
    hidden_ref: Any,
    block_ref: Any,
    target_ref: Any,
    rows_ref: Any,
    after_ref: Any,
    o_ref: Any,
    acc_ref: Any,
    raw_ref: Any,
    draw_ref: Any,
    *,
    options: Options,
) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    # Rows beyond the vocabulary hold no numbers, here and in what is stored: those are dropped.
    _products(hidden_ref, block_ref, raw_ref)
    draw, _ = _draw(raw_ref, target_ref, rows_ref, first_ref[0] + pl.program_id(0), options)
    draw_ref[...] = draw.astype(draw_ref.dtype)

    def add(at: Any) -> None:
        acc_ref[:, at] += dot(draw_ref[...], hidden_ref[:, at], 1, 0)

    _over_parts(add, acc_ref.shape[1])

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        o_ref[...] = acc_ref[...].astype(o_ref.dtype)


def _products(hidden_ref: Any, block_ref: Any, raw_ref: Any) -> None:
    """raw [W, C] = block @ hidden.T"""
    raw_ref[...] = jnp.zeros_like(raw_ref)

    def add(at: Any) -> None:
        raw_ref[...] += dot(block_ref[:, at], hidden_ref[:, at], 1, 1)

    _over_parts(add, hidden_ref.shape[1])


def _draw(
    raw_ref: Any, target_ref: Any, rows_ref: Any, j: Array, options: Options
) -> tuple[Array, Array]:
    """The gradients of the raw products f32[W, C], and their columns."""
    inverse_temperature, maximum, inverse_sum, dlogit = (rows_ref[i : i + 1] for i in range(4))
    x, slope = capped_and_slope(raw_ref[...], options.softcap)
    p = jnp.exp(x * inverse_temperature - maximum) * inverse_sum
    column = _columns(x.shape, j, options)
    hit = jnp.where(column == target_ref[...], 1.0, 0.0)
    return (hit - p) * slope * dlogit, column


def _columns(shape: tuple[int, ...], j: Array, options: Options) -> Array:
    """Of the vocabulary, i32: those of its j-th block, down an array of `shape`."""
    return j * options.blocks.columns + lax.broadcasted_iota(jnp.int32, shape, 0)


def _over_parts(add: Callable[[Any], None], size: int) -> None:
    """add(slice) for each part of D in turn; all at once if D has no parts that a loop can take."""
    part = next((part for part in _PARTS if size % part == 0), None)
    if part is None:
        add(slice(None))
        return

    @pl.loop(0, size // part)
    def _(i: Array) -> None:
        add(pl.ds(pl.multiple_of(i * part, part), part))
