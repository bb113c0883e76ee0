"""How logits come about, which every path and the sampler have to follow; and their blocks.

    softcap * tanh(raw / softcap) / temperature, of raw = hidden @ embedding.T

The cap belongs to the model, the temperature to what is done with it; so the cap comes first, as in
Gemma 2 (arXiv:2408.00118). Each token has its own temperature; every path takes its inverse.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array

# Below any logit, and finite, so that 0 times it is 0.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class LogitBlocks:
    """How many tokens, and columns of the vocabulary, have their logits in memory at once."""

    tokens: int
    columns: int


def capped(raw: Array, softcap: float | None) -> Array:
    """softcap * tanh(raw / softcap); raw itself where softcap is None."""
    return raw if softcap is None else softcap * jnp.tanh(raw / softcap)


def capped_and_slope(raw: Array, softcap: float | None) -> tuple[Array, Array | float]:
    """`capped`, and its derivative by raw."""
    if softcap is None:
        return raw, 1.0
    tanh = jnp.tanh(raw / softcap)
    return softcap * tanh, 1 - tanh * tanh
