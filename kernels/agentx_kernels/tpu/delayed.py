"""An order between what does not depend on one another, for TPU. Pallas."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import pallas as pl

Array = jax.Array


def delayed(x: Array, until: Array, interpret: Any = False) -> Array:
    """x, in the same memory, when until is there: a kernel that does nothing.

    XLA's optimization_barrier is gone by the time that a program is scheduled for TPU.
    """
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        lambda *_: None,
        in_specs=[anywhere, anywhere],
        out_specs=anywhere,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        input_output_aliases={0: 0},
        interpret=interpret,
        name="delayed",
    )(x, until)
