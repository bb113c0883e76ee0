"""Statistics of the logits, and gradients through them, in plain XLA: for CPU, and so far GPU.

The logits of some tokens and some columns of the vocabulary are computed, reduced and dropped, and
computed again for the gradients. A vocabulary of one block has no loop over blocks.

Legend: T tokens, D model, V vocabulary, I chunks of C tokens, W columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from agentx_kernels.logits import LOWEST, LogitBlocks, capped, capped_and_slope

Array = jax.Array

# 512 tokens by 2,048 columns stay in a server core's cache. On CPU, forward and backward, they take
# as long as 512 tokens by a whole vocabulary do, but where a large one has but a single chunk of
# tokens: 512 tokens of V65536 take an eighth longer.
BLOCKS = LogitBlocks(512, 2048)


def forward(
    hidden_TD: Array,
    embedding_VD: Array,
    targets_T: Array,
    inverse_temperature_T: Array,
    *,
    softcap: float | None,
    blocks: LogitBlocks,
) -> tuple[Array, Array, Array, Array]:
    """Of each token: the maximum m of its logits, the sums of exp(x - m) and of exp(x - m)(x - m),
    and the target's logit, [T] each, in f32 (f64 if hidden is f64).

    hidden [T, D]; embedding [V, D]; targets i32[T], whose logit is minus infinity beyond [0, V);
    inverse_temperature [T], in the type of what comes out. softcap: None for none.
    """
    dtype = _accumulation_dtype(hidden_TD)
    columns = _columns(embedding_VD.shape[0], blocks)

    def one_chunk(_: None, chunk: tuple[Array, ...]) -> tuple[None, Any]:
        hidden_CD, targets_C, inverse_temperature_C = chunk

        def one_block(start: Array | int, seen: Array | int, state: Any) -> Any:
            old_C, sum_C, weighted_C, target_C = state
            raw_CW = _einsum("cd,wd->cw", hidden_CD, _rows(embedding_VD, start, columns))
            x_CW = capped(raw_CW, softcap) * inverse_temperature_C[:, None]
            column_W = start + jnp.arange(columns, dtype=targets_C.dtype)
            if embedding_VD.shape[0] % columns:
                x_CW = jnp.where(column_W >= seen, x_CW, LOWEST)
            max_C = jnp.maximum(old_C, x_CW.max(-1))
            shifted_CW = x_CW - max_C[:, None]
            p_CW = jnp.exp(shifted_CW)
            kept_C = jnp.exp(old_C - max_C)
            weighted_C = kept_C * (weighted_C + (old_C - max_C) * sum_C)
            hit_CW = column_W == targets_C[:, None]
            return (
                max_C,
                kept_C * sum_C + p_CW.sum(-1),
                weighted_C + (p_CW * shifted_CW).sum(-1),
                jnp.maximum(target_C, jnp.max(x_CW, -1, where=hit_CW, initial=-jnp.inf)),
            )

        zeros_C = jnp.zeros(targets_C.shape, dtype)
        nothing = zeros_C + LOWEST, zeros_C, zeros_C, zeros_C - jnp.inf
        return None, _over_blocks(embedding_VD.shape[0], columns, one_block, nothing)

    tokens = hidden_TD, targets_T, inverse_temperature_T
    chunks = tuple(_cut(x, blocks.tokens) for x in tokens)
    _, statistics = lax.scan(one_chunk, None, chunks)
    length = hidden_TD.shape[0]
    maxima, sums, weighted, target = (x.reshape(-1)[:length] for x in statistics)
    return maxima, sums, weighted, target


def backward(
    hidden_TD: Array,
    embedding_VD: Array,
    targets_T: Array,
    inverse_temperature_T: Array,
    max_T: Array,
    inverse_sum_T: Array,
    dlogprob_T: Array,
    *,
    softcap: float | None,
    blocks: LogitBlocks,
) -> tuple[Array, Array]:
    """The gradients of hidden and embedding, in f32 (f64 if hidden is f64).

    max, inverse_sum: the maximum and 1 / the sum of exp(x - max), of the logits x of the whole
    vocabulary, of which embedding may be a part. The others as for `forward`.
    """
    dtype = _accumulation_dtype(hidden_TD)
    columns = _columns(embedding_VD.shape[0], blocks)

    # The embedding's gradient is kept as [D, V] within the loop: as [V, D] the matrix product has
    # its large operand transposed, which takes half as long again on CPU.
    def one_chunk(dembedding_DV: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden_CD, targets_C, inverse_temperature_C, max_C, inverse_sum_C, dlogprob_C = chunk
        dlogit_C = inverse_temperature_C * dlogprob_C

        def one_block(start: Array | int, seen: Array | int, state: Any) -> Any:
            dhidden_CD, dembedding_DV = state
            block_WD = _rows(embedding_VD, start, columns)
            raw_CW = _einsum("cd,wd->cw", hidden_CD, block_WD)
            capped_CW, slope_CW = capped_and_slope(raw_CW, softcap)
            x_CW = capped_CW * inverse_temperature_C[:, None]
            p_CW = jnp.exp(x_CW - max_C[:, None]) * inverse_sum_C[:, None]
            column_W = start + jnp.arange(columns, dtype=targets_C.dtype)
            hit_CW = column_W == targets_C[:, None]
            draw_CW = dlogit_C[:, None] * slope_CW * (hit_CW - p_CW)
            if embedding_VD.shape[0] % columns:
                draw_CW = jnp.where(column_W >= seen, draw_CW, 0)
            draw_CW = draw_CW.astype(hidden_CD.dtype)
            dhidden_CD += _einsum("cw,wd->cd", draw_CW, block_WD)
            dblock_DW = _einsum("cd,cw->dw", hidden_CD, draw_CW)
            if columns == embedding_VD.shape[0]:
                return dhidden_CD, dembedding_DV + dblock_DW
            dblock_DW += lax.dynamic_slice_in_dim(dembedding_DV, start, columns, 1)
            return dhidden_CD, lax.dynamic_update_slice_in_dim(dembedding_DV, dblock_DW, start, 1)

        state = jnp.zeros(hidden_CD.shape, dtype), dembedding_DV
        dhidden_CD, dembedding_DV = _over_blocks(embedding_VD.shape[0], columns, one_block, state)
        return dembedding_DV, dhidden_CD

    tokens = hidden_TD, targets_T, inverse_temperature_T, max_T, inverse_sum_T, dlogprob_T
    chunks = tuple(_cut(x, blocks.tokens) for x in tokens)
    zeros_DV = jnp.zeros(embedding_VD.shape[::-1], dtype)
    dembedding_DV, dhidden_ICD = lax.scan(one_chunk, zeros_DV, chunks)
    dhidden_TD = dhidden_ICD.reshape(-1, hidden_TD.shape[1])[: hidden_TD.shape[0]]
    return dhidden_TD, dembedding_DV.T


def _over_blocks(vocab_size: int, columns: int, one_block: Callable[..., Any], state: Any) -> Any:
    """state, after one_block(first column, columns seen before, state) of each block in turn.

    Blocks have one size, so the last begins early, among columns that were seen before.
    """
    if columns == vocab_size:
        return one_block(0, 0, state)

    def step(i: Array, state: Any) -> Any:
        seen = i * columns
        return one_block(jnp.minimum(seen, vocab_size - columns), seen, state)

    return lax.fori_loop(0, -(-vocab_size // columns), step, state)


def _columns(vocab_size: int, blocks: LogitBlocks) -> int:
    """Of each block: as even as they come, so that little is computed twice."""
    num_blocks = -(-vocab_size // blocks.columns)
    return -(-vocab_size // num_blocks)


def _rows(embedding_VD: Array, start: Array | int, columns: int) -> Array:
    return lax.dynamic_slice_in_dim(embedding_VD, start, columns)


def _cut(x_T: Array, most: int) -> Array:
    """[T, ...] -> [I, C, ...] in even chunks of at most `most`; the last is filled with zeros."""
    length = x_T.shape[0]
    num_chunks = -(-length // most)
    tokens = -(-length // num_chunks)
    filled = ((0, tokens * num_chunks - length), *((0, 0),) * (x_T.ndim - 1))
    return jnp.pad(x_T, filled).reshape(num_chunks, tokens, *x_T.shape[1:])


def _accumulation_dtype(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _einsum(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=_accumulation_dtype(x))
