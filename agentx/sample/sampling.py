"""From logits to a token: temperature, top-k and top-p, without a sort and without a random array.

In: the logits of one position a row, the row's own sampling parameters, one uniform number. Out:
the token and the log-probability of the draw. What the trainer compares, the token's
log-probability over the whole vocabulary, is `Transformer.token_logprobs`, the trainer's own. A
token is drawn by inverting the
cumulative distribution at the uniform number, first over blocks of the vocabulary and then inside
the block, so that a row costs one exponential pass. Top-k and top-p find the smallest probability
they keep by bisection over the bits of the floats, 30 passes over the row whatever k and p are, and
only where a row asks for them.

A uniform number has 23 random bits, so probabilities under 1e-7 are drawn as if rounded to that
grid.

Legend: B rows, V vocabulary, C blocks of the vocabulary, E tokens of one block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

_BLOCK = 64
_BITS_OF_ONE = 0x3F800000


class SamplingParams(NamedTuple):
    """How a row is sampled; each field a number for all rows or an array [B]. All may be traced.

    temperature: what logits are divided by; 0 takes the most probable token.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: then keep the fewest most probable tokens that hold this share of what top_k left, in
      (0, 1]; 1 keeps all (nucleus sampling, Holtzman et al. 2020). Tokens as probable as the last
      one kept are kept too.
    """

    temperature: Array | np.ndarray | float = 1.0
    top_k: Array | np.ndarray | int = 0
    top_p: Array | np.ndarray | float = 1.0


class Sampled(NamedTuple):
    """What was drawn. Each [B].

    token: i32.
    processed_logprob: f32, the log-probability of the draw itself: renormalised over the
      tokens that top_k and top_p kept; 0 where the temperature is 0.
    """

    token: Array
    processed_logprob: Array


def check_sampling(params: SamplingParams) -> None:
    """Raises ValueError where one row's parameters (plain numbers) make no distribution."""
    if not params.temperature >= 0 or not params.top_k >= 0 or not 0 < params.top_p <= 1:
        raise ValueError(
            f"temperature must be 0 or more, top_k 0 or more and top_p in (0, 1], got "
            f"{params.temperature}, {params.top_k} and {params.top_p}"
        )


def check_seed(name: str, seed: int) -> None:
    """Raises ValueError for a seed that JAX would not take as it is, or that numpy would refuse."""
    if not 0 <= seed < 2**31:
        raise ValueError(f"{name} is {seed}; it must be in [0, 2^31)")


def row_uniforms(seed: Array | int, request_B: Array, position_B: Array) -> Array:
    """f32[B] in [0, 1): a pure function of (seed, request, position of the token in its sequence).

    Independent of the row that a sequence occupies, of its neighbours and of their number.
    """

    def one(request: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), request), position)
        return jax.random.uniform(key)

    return jax.vmap(one)(request_B, position_B)


def sample(logits_BV: Array, uniform_B: Array, params: SamplingParams) -> Sampled:
    """Draws one token a row. logits: float[B, V], capped where the model caps them; uniform: f32[B]
    from `row_uniforms`.
    """
    batch, vocab = logits_BV.shape
    temperature_B, top_k_B, top_p_B = (jnp.broadcast_to(x, (batch,)) for x in params)
    greedy_B = temperature_B <= 0
    divisor_B = divisor(temperature_B)
    scaled_BV = logits_BV.astype(jnp.float32) / divisor_B[:, None]
    shifted_BV = scaled_BV - scaled_BV.max(-1, keepdims=True)
    p_BV = jnp.exp(shifted_BV)

    truncates_B = ~greedy_B & (((top_k_B > 0) & (top_k_B < vocab)) | (top_p_B < 1))
    kept_BV, kept_total_B = lax.cond(
        jnp.any(truncates_B),
        lambda: _truncate(p_BV, truncates_B, top_k_B, top_p_B),
        lambda: (p_BV, p_BV.sum(-1)),
    )
    token_B = lax.cond(
        jnp.any(greedy_B),
        lambda: jnp.where(greedy_B, _first(shifted_BV == 0), _invert(kept_BV, uniform_B)),
        lambda: _invert(kept_BV, uniform_B),
    )
    at_token_B = jnp.take_along_axis(shifted_BV, token_B[:, None], -1)[:, 0]
    return Sampled(token_B, jnp.where(greedy_B, 0.0, at_token_B - jnp.log(kept_total_B)))


def divisor(temperature_B: Array) -> Array:
    """What logits are divided by, f32[B]: temperature 0 counts as 1."""
    return jnp.where(temperature_B > 0, temperature_B, 1.0).astype(jnp.float32)


def _invert(p_BV: Array, uniform_B: Array) -> Array:
    """The first token at which the running sum of `p` (not normalised) exceeds uniform * sum."""
    batch, vocab = p_BV.shape
    p_BCE = jnp.pad(p_BV, ((0, 0), (0, -vocab % _BLOCK))).reshape(batch, -1, _BLOCK)
    sum_BC = p_BCE.sum(-1)
    running_BC = jnp.cumsum(sum_BC, -1)
    target_B1 = uniform_B[:, None] * running_BC.max(-1, keepdims=True)
    # Logits that are not finite find no block; the last one keeps the token inside the vocabulary.
    found_B = _first((running_BC > target_B1) & (sum_BC > 0))
    block_B1 = jnp.minimum(found_B, sum_BC.shape[-1] - 1)[:, None]
    before_B1 = jnp.take_along_axis(running_BC - sum_BC, block_B1, -1)
    p_BE = jnp.take_along_axis(p_BCE, block_B1[:, :, None], 1)[:, 0]
    offset_B = _first((jnp.cumsum(p_BE, -1) > target_B1 - before_B1) & (p_BE > 0))
    # Rounding can leave nothing beyond the target; the block's last possible token is meant then.
    last_B = jnp.max(jnp.where(p_BE > 0, jnp.arange(_BLOCK, dtype=jnp.int32), 0), -1)
    return block_B1[:, 0] * _BLOCK + jnp.minimum(offset_B, last_B)


def _first(mask_BV: Array) -> Array:
    """The column of each row's first True, i32[B]; V where there is none.

    A plain minimum: XLA's argmax reduces pairs, which is 7 times as slow on a CPU.
    """
    vocab = mask_BV.shape[-1]
    return jnp.min(jnp.where(mask_BV, jnp.arange(vocab, dtype=jnp.int32), vocab), -1)


def _truncate(
    p_BV: Array, truncates_B: Array, top_k_B: Array, top_p_B: Array
) -> tuple[Array, Array]:
    """`p` with what top_k and top_p drop set to 0, and its sum. Rows that don't truncate stay."""
    vocab = p_BV.shape[-1]
    k_B = jnp.where(truncates_B & (top_k_B > 0), top_k_B, vocab)
    share_B = jnp.where(truncates_B, top_p_B, 1.0)
    least_B = _largest_threshold(p_BV, lambda keep_BV: keep_BV.sum(-1) >= k_B)
    p_BV = jnp.where(p_BV >= least_B[:, None], p_BV, 0.0)
    wanted_B = jnp.where(share_B < 1, share_B * p_BV.sum(-1), 0.0)
    least_B = _largest_threshold(p_BV, lambda keep_BV: jnp.sum(p_BV, -1, where=keep_BV) >= wanted_B)
    p_BV = jnp.where((p_BV >= least_B[:, None]) | (share_B >= 1)[:, None], p_BV, 0.0)
    return p_BV, p_BV.sum(-1)


def _largest_threshold(p_BV: Array, enough) -> Array:
    """The largest t for which `enough(p >= t)` holds, f32[B]; p in [0, 1], and enough(p >= 0).

    Non-negative floats are ordered as their bits are, so t is found bit by bit.
    """

    def halve(_, bounds):
        low_B, high_B = bounds
        middle_B = (low_B + high_B + 1) // 2
        threshold_B = lax.bitcast_convert_type(middle_B, jnp.float32)
        holds_B = enough(p_BV >= threshold_B[:, None])
        return jnp.where(holds_B, middle_B, low_B), jnp.where(holds_B, high_B, middle_B - 1)

    zeros_B = jnp.zeros(p_BV.shape[:1], jnp.int32)
    low_B, _ = lax.fori_loop(0, 30, halve, (zeros_B, zeros_B + _BITS_OF_ONE))
    return lax.bitcast_convert_type(low_B, jnp.float32)
