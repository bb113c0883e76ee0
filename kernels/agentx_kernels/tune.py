"""Finds the blocks with which attention is fastest, on the hardware that this runs on.

    python -m agentx_kernels.tune --hardware v5p --length 8192 --head-size 128

Prints a line for each candidate, the fastest first: blocks of queries and keys and the part worked
on at once, and the seconds over one causal row, of the forward pass and of both. What comes out
goes into the tables of blocks.py, where each pass has a part of its own, with the chip and the
shape as its reason. Runs are interleaved, and the figure is the median: so a machine that slows
down slows all of them. A candidate that does not compile, for want of on-chip memory, is listed
with the compiler's words.

Legend: S tokens, N heads, K KV heads, H head size.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentx_kernels.attention import attention
from agentx_kernels.blocks import BlockConfig
from agentx_kernels.hardware import Hardware, hardware
from agentx_kernels.layout import causal

_BLOCKS = {"cpu": (64, 128, 256, 512), "gpu": (128, 256, 512), "tpu": (256, 512, 1024, 2048)}
_PARTS = {"cpu": (), "gpu": (), "tpu": (256, 512, 1024)}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians of the forward pass and of both passes; None where `error` says what failed."""

    config: BlockConfig
    forward_seconds: float | None
    seconds: float | None
    error: str = ""


def candidates(chip: Hardware, length: int) -> list[BlockConfig]:
    """What is tried: square blocks no longer than the row, in parts that divide them."""
    blocks = [block for block in _BLOCKS[chip.platform] if block <= length]
    parts = _PARTS[chip.platform]
    if not parts:
        return [BlockConfig(block, block) for block in blocks]
    pairs = itertools.product(blocks, parts)
    return [BlockConfig(block, block, part, part) for block, part in pairs if block % part == 0]


def tune(
    chip: Hardware,
    *,
    length: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: str = "bfloat16",
    repeats: int = 5,
    configs: Sequence[BlockConfig] | None = None,
) -> list[Timing]:
    """The candidates by their time, the fastest first and those that fail last.

    Raises ValueError where this process does not run on the kind of hardware that is named, or
    nothing is there to try.
    """
    if jax.default_backend() != chip.platform:
        raise ValueError(
            f"{chip.name} is a {chip.platform}, and this process runs on a "
            f"{jax.default_backend()}: tune where the hardware is"
        )
    configs = candidates(chip, length) if configs is None else configs
    if not configs:
        raise ValueError(
            f"a row of {length} tokens is shorter than every block there is to try on a "
            f"{chip.platform}: choose a longer one"
        )
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, length, n, head_size)), dtype)
        for n in (heads, kv_heads, kv_heads)
    )
    layout = causal(1, length)
    passes: dict[tuple[BlockConfig, bool], Callable[[], Any]] = {}
    failed: list[Timing] = []
    for config in configs:

        def loss(q, k, v, config=config):
            o = attention(q, k, v, layout=layout, hardware=chip, config=config)
            return o.astype(jnp.float32).sum()

        try:
            for is_both, f in ((False, loss), (True, jax.grad(loss, (0, 1, 2)))):
                compiled = jax.jit(f).lower(q, k, v).compile()
                jax.block_until_ready(compiled(q, k, v))
                passes[config, is_both] = functools.partial(compiled, q, k, v)
        except jax.errors.JaxRuntimeError as error:
            passes.pop((config, False), None)
            failed.append(Timing(config, None, None, str(error).split("\n", 1)[0]))
    seconds: dict[tuple[BlockConfig, bool], list[float]] = {key: [] for key in passes}
    for _ in range(repeats):
        for key, run in passes.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    timed = [
        Timing(config, medians[config, False], both)
        for (config, is_both), both in medians.items()
        if is_both
    ]
    return sorted(timed, key=lambda timing: timing.seconds or 0) + failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=5)
    given = vars(parser.parse_args())
    for timing in tune(hardware(given.pop("hardware")), **given):
        config = timing.config
        outcome = (
            timing.error or f"forward {timing.forward_seconds:.4f} s, both {timing.seconds:.4f} s"
        )
        part = f" part {config.forward_part}" if config.forward_part else ""
        print(f"queries {config.query} keys {config.key}{part}: {outcome}")
