"""Compiles one thing for a chip, so that the compiler writes its schedule to a folder.

    python kernels/bench/kernels_alone.py v5p DUMP ours HEAD_SIZE [PART] attention's two kernels
    python kernels/bench/kernels_alone.py v5p DUMP splash HEAD_SIZE PART tokamax's splash attention
    python kernels/bench/kernels_alone.py v5p DUMP plan LENGTH           a plan; as text, plan.txt

For schedule.py, which starts it: splash in an environment that has tokamax, with agentx_kernels on
its path. Attention is causal, over 8,192 tokens, with 4 heads and 2 KV heads, in bf16, forward and
backward. The plan is an argument of ours, so that nothing but the kernels is of any size. PART is
how much of a block of 1,024 is worked on at once; ours is by its table if not given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from agentx_kernels import ahead
from agentx_kernels.attention import attention
from agentx_kernels.blocks import BlockConfig, block_config
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import TreeLayout
from agentx_kernels.plan import make_plan

_LENGTH, _HEADS, _KV_HEADS, _BLOCK = 8192, 4, 2, 1024

# A function to compile, and the shapes of its arguments.
Program = tuple[Any, list[Any]]


def with_gradients(attend: Any) -> Any:
    """A function of q, k, v and the output's cotangent that runs `attend` forward and backward."""

    def run(q, k, v, do, *others):
        o, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, *others), q, k, v)
        return o, vjp(do)

    return run


def ours(chip: str, head_size: int, part: int | None = None) -> Program:
    layout = TreeLayout(*[jax.ShapeDtypeStruct((1, _LENGTH), jnp.int32)] * 3)
    config = BlockConfig(_BLOCK, _BLOCK, part, part)
    plan = jax.eval_shape(lambda layout: make_plan(layout, config=config), layout)
    q, k = (
        jax.ShapeDtypeStruct((1, _LENGTH, heads, head_size), jnp.bfloat16)
        for heads in (_HEADS, _KV_HEADS)
    )

    def attend(q, k, v, layout, plan):
        return attention(q, k, v, layout=layout, plan=plan, config=config, hardware=hardware(chip))

    return with_gradients(attend), [q, k, k, q, layout, plan]


def splash(chip: str, head_size: int, part: int) -> Program:
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    blocks = kernel.SplashConfig(
        block_q=_BLOCK,
        block_kv=_BLOCK,
        block_kv_compute=part,
        block_q_dkv=_BLOCK,
        block_kv_dkv=_BLOCK,
        block_kv_dkv_compute=part,
    )
    mask = masks.CausalMask((_LENGTH, _LENGTH))
    q, k = (
        jax.ShapeDtypeStruct((heads, _LENGTH, head_size), jnp.bfloat16)
        for heads in (_HEADS, _KV_HEADS)
    )
    return with_gradients(kernel.make_splash_mha(mask, config=blocks, q_seq_shards=1)), [q, k, k, q]


def plan(chip: str, length: int) -> Program:
    layout = TreeLayout(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 3)
    config = block_config(hardware(chip), length)
    return lambda layout: make_plan(layout, config=config), [layout]


def main(chip: str, dump: str, what: str, *sizes: str) -> None:
    ahead.prepare(Path(dump))
    here = SingleDeviceSharding(ahead.devices(ahead.SMALLEST[chip])[0])
    program, shapes = {"ours": ours, "splash": splash, "plan": plan}[what](chip, *map(int, sizes))
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes
    )
    compiled = jax.jit(program).lower(*arguments).compile()
    if what == "plan":
        (Path(dump) / "plan.txt").write_text(compiled.as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
