"""Arrays that are computed in pieces and travel to other devices while later pieces are computed.

XLA for TPU, left to itself, computes all pieces first and moves everything after; or it computes
several beside one journey and none beside the next. So each piece waits for a step of a journey
before it, and each step for a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def in_turn(
    pieces: Sequence[Callable[[Array], Array]],
    journey: Sequence[Callable[[Array], Array]],
    *,
    after: Array,
    held: Array,
    delayed: Callable[[Array, Array], Array],
) -> tuple[Array, Array]:
    """The pieces at the end of their journey, joined along the outermost dim; and `held`.

    pieces: functions, each of an array that it waits for and need not read.
    journey: the steps of a part's journey, functions of the part. A part is as many pieces as there
      are steps, so that beside each step a piece of the next part is computed; none is beside those
      of the last part.
    after: what the first pieces wait for.
    held: an array that what comes after gets when the last piece is computed, not sooner.
    delayed: (x, until) -> x, when until is there.

    Of pieces that wait for their journey, or are on it, no more are in memory than two parts'.
    """
    journey = journey or [lambda part: part]
    size = len(journey)
    # What each piece in turn waits for: after the first ones, the steps as they are made.
    waits = [after] * (size + 1)
    made: list[Array] = []
    parts: list[Array] = []

    def make() -> None:
        made.append(pieces[len(made)](waits[len(made)]))

    for first in range(0, len(pieces), size):
        while len(made) < min(first + size, len(pieces)):
            make()
        if first + size >= len(pieces):
            held, made[first:], parts[-1:] = lax.optimization_barrier(
                (held, made[first:], parts[-1:])
            )
        part = jnp.concatenate(made[first : first + size])
        for i, step in enumerate(journey):
            if i > 0 and len(made) < len(pieces):
                make()
                part = delayed(part, made[-1])
            part = step(part)
            waits.append(part)
        parts.append(part)
    return jnp.concatenate(parts), held
