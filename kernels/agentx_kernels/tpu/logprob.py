"""The face of the log-probability kernels for TPU: chooses blocks, takes any number of tokens.

Legend: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from agentx_kernels.hardware import Hardware
from agentx_kernels.logits import LOWEST, LogitBlocks
from agentx_kernels.tpu import logprob_kernels
from agentx_kernels.tpu.logprob_kernels import Options

Array = Any

# Of a core's VMEM: the rest is the compiler's.
_VMEM_SHARE = 0.9

# The most that a block has of the side that stays and of the one that streams by, by bytes of a
# number. The side that stays decides how much is computed with a byte that streams by: 1,024 tokens
# make 1,024 operations in bf16, and no chip has over 600 for a byte of its bandwidth. In f32 a
# product takes six passes, so half will do, and compiles sooner.
_MOST = {2: (1024, 512), 4: (512, 256)}


def check(hidden: Array, blocks: LogitBlocks | None) -> None:
    """Raises ValueError for what the kernels lack."""
    if hidden.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"token_logprobs on TPU takes float32 and bfloat16, not {hidden.dtype}: cast hidden "
            f"and embedding"
        )
    if blocks is not None and (blocks.tokens % 128 or blocks.columns % 128):
        raise ValueError(f"token_logprobs on TPU takes blocks that 128 divides, not {blocks}")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What all kernels of a call are compiled with. blocks: None to choose them."""

    softcap: float | None
    hardware: Hardware
    blocks: LogitBlocks | None
    interpret: Any


def forward(
    hidden: Array, embedding: Array, targets: Array, inverse_temperature: Array, given: Compiled
) -> tuple[Array, ...]:
    """As `logprob_xla.forward`."""
    options = _options(given, hidden, embedding, stays="tokens", held=0)
    targets, inverse_temperature = (
        _filled(x, options)[None] for x in (targets, inverse_temperature)
    )
    length = hidden.shape[0]
    statistics = logprob_kernels.statistics(
        _filled(hidden, options), embedding, targets, inverse_temperature, options
    )
    maxima, sums, weighted, target = statistics[:, :length]
    return maxima, sums, weighted, jnp.where(target > LOWEST, target, -jnp.inf)


def backward(
    hidden: Array,
    embedding: Array,
    targets: Array,
    inverse_temperature: Array,
    maxima: Array,
    inverse_sum: Array,
    dlogprob: Array,
    *,
    given: Compiled,
    dtype: Any,
    num_pieces: int,
) -> tuple[Array, list[Callable[[Array], Array]]]:
    """The gradient of hidden, and that of the embedding in pieces, as `in_turn` takes them; in
    dtype. The arrays are as for `logprob_xla.backward`.

    A piece is of columns of the vocabulary, of whole blocks for each tensor core, so there may be
    fewer than num_pieces.
    """
    tokens = inverse_temperature, maxima, inverse_sum, inverse_temperature * dlogprob
    vocab_size = embedding.shape[0]

    def inputs(stays: str) -> tuple[Options, tuple[Array, Array, Array, Array]]:
        # A sum in f32, and two blocks on their way out.
        held = 4 + 2 * jnp.dtype(dtype).itemsize
        options = _options(given, hidden, embedding, stays, held)
        rows = jnp.stack([_filled(x, options) for x in tokens])
        return options, (
            _filled(hidden, options),
            embedding,
            _filled(targets, options)[None],
            rows,
        )

    options, arrays = inputs("tokens")
    dhidden = logprob_kernels.of_hidden(*arrays, dtype, options)[: hidden.shape[0]]
    options, arrays = inputs("columns")
    shared = options.blocks.columns * given.hardware.tensor_cores
    step = -(-vocab_size // (num_pieces * shared)) * shared

    def of_columns(start: int, after: Array) -> Array:
        columns = range(start, min(start + step, vocab_size))
        return logprob_kernels.of_embedding(*arrays, after, columns, dtype, options)

    return dhidden, [functools.partial(of_columns, x) for x in range(0, vocab_size, step)]


def _options(given: Compiled, hidden: Array, embedding: Array, stays: str, held: int) -> Options:
    """held: bytes of VMEM for each number of the block that stays, next to the block itself."""
    limit = int(_VMEM_SHARE * given.hardware.vmem_bytes)
    blocks = given.blocks or _blocks(hidden, stays, held, limit)
    # No larger than what there is, in whole tiles.
    tokens = min(blocks.tokens, -(-hidden.shape[0] // 128) * 128)
    columns = min(blocks.columns, -(-embedding.shape[0] // 128) * 128)
    return Options(given.softcap, LogitBlocks(tokens, columns), limit, given.interpret)


def _blocks(hidden: Array, stays: str, held: int, limit: int) -> LogitBlocks:
    """The largest blocks that fit VMEM: of the side that stays first, then of the other."""
    size, width = hidden.shape[1], hidden.dtype.itemsize
    most_staying, most_streaming = _MOST[width]
    for staying in _halves(most_staying):
        for streaming in _halves(most_streaming):
            inputs = 2 * (staying + streaming) * size * width  # one at work, one on its way
            logits = 8 * 4 * staying * streaming  # logits and what becomes of them
            if inputs + held * staying * size + logits <= limit:
                of_tokens, of_columns = staying, streaming
                if stays == "columns":
                    of_tokens, of_columns = streaming, staying
                return LogitBlocks(of_tokens, of_columns)
    raise ValueError(
        f"hidden has D = {size} in {hidden.dtype}, of which no block fits into {limit} bytes of "
        f"VMEM: use a smaller D or bfloat16"
    )


def _halves(most: int) -> list[int]:
    """most and its halves, down to a tile's 128 lanes."""
    return [size for size in (1024, 512, 256, 128) if size <= most]


def _filled(x: Array, options: Options) -> Array:
    """[T, ...] filled up with zeros to whole blocks of tokens."""
    beyond = -x.shape[0] % options.blocks.tokens
    return jnp.pad(x, ((0, beyond), *((0, 0),) * (x.ndim - 1))) if beyond else x
