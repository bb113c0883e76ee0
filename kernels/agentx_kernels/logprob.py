"""Vocabulary projection and log-probability in one, without an array of every token's logits.

The logits of one chunk of tokens at a time are computed, reduced and dropped; the backward computes
them again. So memory grows with the chunk times the vocabulary, not with the batch. The embedding
may be sharded over the vocabulary and the batch over rows: every step is a plain product or
reduction, which the partitioner splits.

Legend: B rows, S tokens a row, D model, V vocabulary, I chunks, C columns of one chunk.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def token_logprobs(
    hidden: Array,
    embedding: Array,
    targets: Array,
    *,
    temperature: float = 1.0,
    block_size: int = 512,
) -> tuple[Array, Array]:
    """Log-probabilities of the targets and entropies, f32[B, S] each (f64 if hidden is f64).

    hidden: float[B, S, D]; embedding: float[V, D]; targets: integers [B, S], each in [0, V).
    temperature: what logits are divided by, above 0.
    block_size: how many tokens of the whole batch have their logits in memory at once. A chunk
      takes at least one token of every row.

    logprob = logits[target] - logsumexp(logits), with logits = hidden @ embedding.T / temperature,
    accumulated in f32. It is differentiable in hidden and embedding. The entropy, in nats, is a
    metric: no gradient passes through it (stop_gradient).

    Raises ValueError where the shapes do not fit together, the targets are no integers, or
    temperature or block_size is not positive. A target outside [0, V) gives minus infinity.
    """
    if hidden.ndim != 3 or embedding.ndim != 2 or hidden.shape[2] != embedding.shape[1]:
        raise ValueError(
            f"hidden must be [B, S, D] and embedding [V, D], not {hidden.shape} and "
            f"{embedding.shape}"
        )
    if targets.shape != hidden.shape[:2] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets must be integers {hidden.shape[:2]} like the tokens of hidden, not "
            f"{targets.dtype} {targets.shape}"
        )
    if hidden.dtype != embedding.dtype or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(
            f"hidden and embedding must share one floating-point type, not {hidden.dtype} and "
            f"{embedding.dtype}: cast one of them"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be 1 or more")
    logprob_BS, entropy_BS = _logprobs(hidden, embedding, targets, temperature, block_size)
    return logprob_BS, lax.stop_gradient(entropy_BS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _logprobs(
    hidden_BSD: Array, embedding_VD: Array, targets_BS: Array, temperature: float, block_size: int
) -> tuple[Array, Array]:
    return _forward(hidden_BSD, embedding_VD, targets_BS, temperature, block_size)[0]


def _forward(
    hidden_BSD: Array, embedding_VD: Array, targets_BS: Array, temperature: float, block_size: int
) -> tuple[tuple[Array, Array], tuple]:
    def one_chunk(_, chunk):
        hidden_BCD, targets_BC = chunk
        logits_BCV = _logits(hidden_BCD, embedding_VD, temperature)
        max_BC = logits_BCV.max(-1)
        shifted_BCV = logits_BCV - max_BC[..., None]
        p_BCV = jnp.exp(shifted_BCV)
        sum_BC = p_BCV.sum(-1)
        log_sum_BC = jnp.log(sum_BC)
        target_BC = _at_target(shifted_BCV, targets_BC)
        entropy_BC = log_sum_BC - (p_BCV * shifted_BCV).sum(-1) / sum_BC
        return None, (target_BC - log_sum_BC, entropy_BC, max_BC + log_sum_BC)

    chunks = tuple(_cut(x, block_size) for x in (hidden_BSD, targets_BS))
    _, outputs = lax.scan(one_chunk, None, chunks)
    length = hidden_BSD.shape[1]
    logprob_BS, entropy_BS, lse_BS = (_join(x, length) for x in outputs)
    residuals = (hidden_BSD, embedding_VD, targets_BS, lse_BS)
    return (logprob_BS, entropy_BS), residuals


def _backward(
    temperature: float, block_size: int, residuals: tuple, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    hidden_BSD, embedding_VD, targets_BS, lse_BS = residuals
    dlogprob_BS, _ = cotangents
    dtype = hidden_BSD.dtype

    # The embedding's gradient is kept as [D, V] within the loop: as [V, D] the matrix product has
    # its large operand transposed, which takes half as long again on CPU.
    def one_chunk(dembedding_DV, chunk):
        hidden_BCD, targets_BC, lse_BC, dlogprob_BC = chunk
        logits_BCV = _logits(hidden_BCD, embedding_VD, temperature)
        p_BCV = jnp.exp(logits_BCV - lse_BC[..., None])
        onehot_BCV = _is_target(targets_BC, p_BCV.shape[-1])
        scaled_BC1 = (dlogprob_BC / temperature)[..., None]
        dlogits_BCV = (scaled_BC1 * (onehot_BCV - p_BCV)).astype(dtype)
        dhidden_BCD = _einsum("bcv,vd->bcd", dlogits_BCV, embedding_VD)
        dembedding_DV += _einsum("bcd,bcv->dv", hidden_BCD, dlogits_BCV)
        return dembedding_DV, dhidden_BCD.astype(dtype)

    chunks = tuple(_cut(x, block_size) for x in (hidden_BSD, targets_BS, lse_BS, dlogprob_BS))
    zeros_DV = jnp.zeros(embedding_VD.shape[::-1], lse_BS.dtype)
    dembedding_DV, dhidden_IBCD = lax.scan(one_chunk, zeros_DV, chunks)
    dhidden_BSD = _join(dhidden_IBCD, hidden_BSD.shape[1])
    return dhidden_BSD, dembedding_DV.T.astype(embedding_VD.dtype), None


_logprobs.defvjp(_forward, _backward)


def _logits(hidden_BCD: Array, embedding_VD: Array, temperature: float) -> Array:
    return _einsum("bcd,vd->bcv", hidden_BCD, embedding_VD) / temperature


def _is_target(targets_BC: Array, vocab_size: int) -> Array:
    return targets_BC[..., None] == jnp.arange(vocab_size, dtype=targets_BC.dtype)


def _at_target(x_BCV: Array, targets_BC: Array) -> Array:
    """x[b, c, targets[b, c]] as a reduction, which splits over a sharded vocabulary."""
    return jnp.max(x_BCV, -1, where=_is_target(targets_BC, x_BCV.shape[-1]), initial=-jnp.inf)


def _cut(x_BS: Array, block_size: int) -> Array:
    """[B, S, ...] -> [I, B, C, ...]; the last chunk is filled up with zeros.

    A chunk takes every I-th token, not neighbours: so a row that is sharded over the devices stays
    so within each chunk, and all of them work at every step of the scan.
    """
    batch, length = x_BS.shape[:2]
    columns = min(length, max(1, block_size // batch))
    num_chunks = -(-length // columns)
    columns = -(-length // num_chunks)
    filled = ((0, 0), (0, columns * num_chunks - length), *((0, 0),) * (x_BS.ndim - 2))
    x_BCI = jnp.pad(x_BS, filled).reshape(batch, columns, num_chunks, *x_BS.shape[2:])
    return jnp.moveaxis(x_BCI, 2, 0)


def _join(x_IBC: Array, length: int) -> Array:
    """What `_cut` cut, without its filling."""
    x_BCI = jnp.moveaxis(x_IBC, 0, 2)
    return x_BCI.reshape(x_BCI.shape[0], -1, *x_BCI.shape[3:])[:, :length]


def _einsum(subscripts: str, x: Array, y: Array) -> Array:
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, y, preferred_element_type=acc_dtype)
