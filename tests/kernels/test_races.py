"""No kernel reads what is still on its way, nor do two cores write to one place.

Pallas' interpreter keeps the order of events of every core and copy; "on_wait" lets a copy arrive
as late as it may, "eager" as early. No kernel here moves data between devices: XLA does that.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from agentx_kernels.attention import attention
from agentx_kernels.blocks import BlockConfig
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import ROOT, prefix_tree

LENGTH = 300
LAYOUT = prefix_tree([[(100, ROOT), (60, 0), (80, 0)], [(30, ROOT), (200, ROOT)]], LENGTH)


def found_a_race() -> bool:
    """What the interpreter's last run found."""
    return interpret_pallas_call.races.races_found


def with_gradients(interpret):
    rng = np.random.default_rng(0)
    q, k, v, do = (
        jnp.asarray(rng.standard_normal((2, LENGTH, heads, 64), np.float32))
        for heads in (4, 2, 2, 4)
    )

    def attend(q, k, v):
        return attention(
            q,
            k,
            v,
            layout=LAYOUT,
            hardware=hardware("v5p"),
            config=BlockConfig(128, 128),
            interpret=interpret,
        )

    o, vjp = jax.vjp(attend, q, k, v)
    return o, *vjp(do)


@pytest.mark.parametrize(("cores", "arrival"), [(1, "on_wait"), (2, "eager")])
def test_attention_has_no_race_forward_or_backward(cores, arrival):
    detecting = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=cores, dma_execution_mode=arrival
    )
    got = with_gradients(detecting)
    assert not found_a_race()
    for x, y in zip(got, with_gradients(True), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_copy_that_nobody_waits_for_is_found():
    def kernel(x_hbm, o_ref, arrived):
        copy = pltpu.make_async_copy(x_hbm, o_ref, arrived)
        copy.start()
        o_ref[...] = o_ref[...] + 1.0
        copy.wait()

    pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(
            detect_races=True, dma_execution_mode="eager", uninitialized_memory="zero"
        ),
    )(jnp.ones((8, 128)))
    assert found_a_race()
