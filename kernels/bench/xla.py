"""Times attention and token_logprobs on this machine's CPU against plain JAX, forward and backward.

    PYTHONPATH=kernels JAX_PLATFORMS=cpu python kernels/bench/xla.py [--repeats 15]

Prints one JSON line per function and shape: the medians, in milliseconds, of runs that take turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from agentx_kernels import reference
from agentx_kernels.attention import attention
from agentx_kernels.decode import decode_attention
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import causal, packed
from agentx_kernels.logits import LogitBlocks
from agentx_kernels.logprob import token_logprobs

# Batch, length, heads, KV heads, head size, model size, vocabulary.
SHAPES = [(32, 128, 4, 2, 32, 128, 1024), (8, 512, 8, 4, 32, 256, 4096)]


def median_ms(functions: dict, arguments: tuple, repeats: int) -> dict[str, float]:
    """Medians of interleaved runs, after one that compiles."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(each), 2) for name, each in times.items()}


def forward_and_backward(function, num_arguments: int):
    """function's outputs and the gradients of its first output's weighted sum."""

    def run(weights, *arguments):
        def loss(*differentiated):
            outputs = function(*differentiated, *arguments[num_arguments:])
            first = outputs[0] if isinstance(outputs, tuple) else outputs
            return (first * weights).sum(), outputs

        return jax.grad(loss, tuple(range(num_arguments)), has_aux=True)(*arguments[:num_arguments])

    return jax.jit(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def report(what: str, shape: tuple, functions: dict, arguments: tuple) -> None:
        milliseconds = median_ms(functions, arguments, repeats)
        print(json.dumps({"what": what, "shape": shape, "ms": milliseconds}), flush=True)

    on_cpu = functools.partial(attention, hardware=hardware("cpu"))
    for shape in SHAPES:
        batch, length, heads, kv_heads, size, model, vocab = shape
        q, do = normal(batch, length, heads, size), normal(batch, length, heads, size)
        k, v = normal(batch, length, kv_heads, size), normal(batch, length, kv_heads, size)
        layouts = {
            "causal": causal(batch, length),
            "packed": packed([[length // 4] * 4] * batch, length),
        }
        for name, layout in layouts.items():
            functions = {
                "blockwise": lambda q, k, v, layout: on_cpu(q, k, v, layout=layout),
                "plain": lambda q, k, v, layout: reference.attention(q, k, v, layout=layout),
            }
            forward = {key: jax.jit(f) for key, f in functions.items()}
            report(f"attention {name} forward", shape[:5], forward, (q, k, v, layout))
            both = {key: forward_and_backward(f, 3) for key, f in functions.items()}
            report(f"attention {name} forward+backward", shape[:5], both, (do, q, k, v, layout))

        hidden, embedding = normal(batch, length, model), normal(vocab, model) * model**-0.5
        targets = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
        blockwise = functools.partial(token_logprobs, hardware=hardware("cpu"))
        functions = {
            "blockwise": blockwise,
            "whole vocabulary": functools.partial(blockwise, blocks=LogitBlocks(512, vocab)),
            "plain": reference.token_logprobs,
        }
        forward = {key: jax.jit(f) for key, f in functions.items()}
        shape_logits = (batch, length, model, vocab)
        report("token_logprobs forward", shape_logits, forward, (hidden, embedding, targets))
        both = {key: forward_and_backward(f, 2) for key, f in functions.items()}
        arguments = (normal(batch, length), hidden, embedding, targets)
        report("token_logprobs forward+backward", shape_logits, both, arguments)

        caches = [normal(batch, kv_heads, length, size) for _ in range(2)]
        new = [normal(batch, kv_heads, 1, size) for _ in range(2)]
        lengths = jnp.full(batch, length // 2)
        functions = {"decode": decode_attention, "plain": reference.decode_attention}
        forward = {
            key: jax.jit(lambda *x, f=f: f(*x[:-1], lengths=x[-1])) for key, f in functions.items()
        }
        report("decode_attention T=1", shape[:5], forward, (q[:, :1], *caches, *new, lengths))


if __name__ == "__main__":
    main()
