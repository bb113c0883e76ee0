"""How attention is computed, by hardware: Pallas kernels on TPU, plain XLA in blocks elsewhere.

What both take and give is here, so that one device and a ring of them call the same two passes.

Legend: B batch, S tokens, N heads, K KV heads, H head size of q and k, Hv of v.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from agentx_kernels import xla
from agentx_kernels.hardware import Hardware, check_hardware
from agentx_kernels.layout import TreeLayout
from agentx_kernels.plan import BlockPlan
from agentx_kernels.scores import Scores

Array = jax.Array
Layouts = tuple[TreeLayout, TreeLayout]


@dataclasses.dataclass(frozen=True)
class Path:
    """scores: how a dot product becomes a score. interpret: as `pallas_call` takes it."""

    scores: Scores
    hardware: Hardware
    interpret: Any = False

    def __post_init__(self) -> None:
        check_hardware(self.hardware)

    def check(self, q: Array | jax.ShapeDtypeStruct, v: Array, plan: BlockPlan) -> None:
        """Raises ValueError for what the kernels of this hardware lack."""
        if self.hardware.platform == "tpu":
            _tpu().check(q, v, plan, self.hardware)

    def forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        layouts: Layouts,
        plan: BlockPlan,
        sinks: Array | None,
        after: Array | None = None,
    ) -> tuple[Array, Array]:
        """The output [B, S, N, Hv] and its log-sum-exp [B, S, N].

        layouts: of the queries and of the keys. after: any array; on TPU it is not read, but the
          kernel starts when it is there, which tells the compiler what has to be moved before it.
        """
        if self.hardware.platform == "tpu":
            return _tpu().forward(
                q, k, v, layouts, plan, sinks, self.scores, after, self.hardware, self.interpret
            )
        return xla.forward(q, k, v, layouts, plan, sinks, self.scores)

    def backward(
        self,
        q: Array,
        k: Array,
        v: Array,
        layouts: Layouts,
        plan: BlockPlan,
        do: Array,
        lse: Array,
        delta: Array,
        dtype: Any = None,
        after: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """dq, dk and dv.

        lse, delta: [B, S, N], of the whole softmax, of which these keys may be a part. delta: the
          sums of do * o, less the cotangent of lse.
        dtype: of all three, where they are parts of sums; the types of q, k and v if None.
        after: as for `forward`.
        """
        if self.hardware.platform == "tpu":
            return _tpu().backward(
                q,
                k,
                v,
                layouts,
                plan,
                self.scores,
                do,
                lse,
                delta,
                dtype,
                after,
                self.hardware,
                self.interpret,
            )
        return xla.backward(q, k, v, layouts, plan, self.scores, do, lse, delta, dtype)


def sink_gradient(sinks: Array | None, lse: Array, delta: Array) -> Array | None:
    """dsinks [N]: a sink is a score whose value is 0."""
    if sinks is None:
        return None
    share = jnp.exp(sinks.astype(lse.dtype) - lse)  # of the sink in each softmax
    return -jnp.sum(share * delta, (0, 1)).astype(sinks.dtype)


def _tpu() -> Any:
    """The path with Pallas, which takes a second to import where nobody needs it."""
    from agentx_kernels.tpu import attention as tpu

    return tpu
