"""Vocabulary projection and log-probability in one, without an array of every token's logits.

The logits of a block of tokens by a block of the vocabulary are computed, reduced and dropped; the
backward computes them again. So memory does not grow with the vocabulary, but for the gradient of
the embedding itself. There are two paths: Pallas kernels on TPU (tpu/logprob.py), and plain XLA
(logprob_xla.py) for CPU, and for GPU until it has kernels of its own.

Over a mesh each device works on its tokens and its part of the vocabulary; then maxima, sums and
the gradients of hidden go once over the devices of the vocabulary, the gradient of the embedding
once over those of the tokens, in pieces that travel while others are computed.

Legend: B rows, S tokens a row, T = B S, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from agentx_kernels import logprob_xla
from agentx_kernels.hardware import Hardware, check_hardware
from agentx_kernels.in_turn import in_turn
from agentx_kernels.logits import LogitBlocks

Array = jax.Array

# The embedding's gradient is computed in so many parts where it is summed over devices: that of the
# last has nothing to travel beside.
_NUM_PARTS = 8

# How an array of `_on_devices` lies: over rows and tokens, or as the embedding.
TOKENS, EMBEDDING = "tokens", "embedding"


@dataclasses.dataclass(frozen=True)
class VocabularySplit:
    """The axes of a mesh over which the arrays lie.

    rows, tokens: what B and S are split over. vocab: what V is. embed: what D of the embedding is,
    which is gathered for the product; they must be among those of the rows and tokens.
    """

    rows: tuple[str, ...]
    tokens: str
    vocab: str
    embed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not set(self.embed) <= {*self.rows, self.tokens}:
            raise ValueError(
                f"the embedding is split over {self.embed}, which must be among the axes of the "
                f"rows and tokens, {(*self.rows, self.tokens)}"
            )


def token_logprobs(
    hidden: Array,
    embedding: Array,
    targets: Array,
    *,
    hardware: Hardware,
    temperature: float | Array = 1.0,
    softcap: float | None = None,
    split: VocabularySplit | None = None,
    blocks: LogitBlocks | None = None,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Log-probabilities of the targets and entropies, f32[B, S] each (f64 if hidden is f64).

    hidden: float[B, S, D]; embedding: float[V, D]; targets: integers [B, S], each in [0, V).
    hardware: the device it will run on, from agentx_kernels.hardware.
    temperature: what logits are divided by, above 0: a number, or floats [B, S], one a token.
    softcap: logits become softcap * tanh(logits / softcap), before the temperature divides them;
      None for no cap.
    split: how the arrays lie over the mesh that this is traced under; None for one device.
    blocks: whose logits are in memory at once; chosen by hardware, D and type if None.
    interpret: runs the TPU's kernels in Pallas' interpreter, for tests; as `pallas_call` takes it.

    logprob = logits[target] - logsumexp(logits), with logits = hidden @ embedding.T capped and
    divided, accumulated in f32. It is differentiable in hidden and embedding. The entropy, in nats,
    is a metric: no gradient passes through it (stop_gradient), nor through the temperature.

    Raises ValueError where the shapes do not fit together, the targets are no integers, softcap, a
    block or a temperature that is a number is not positive, and for what the path of this hardware
    lacks. A target outside [0, V) gives minus infinity.
    """
    _check(hidden, embedding, targets)
    if np.shape(temperature) not in ((), targets.shape):
        raise ValueError(
            f"temperature must be a number, or {targets.shape} like the tokens of hidden, not "
            f"{np.shape(temperature)}"
        )
    _check_numbers(hardware, temperature, softcap, blocks)
    if hardware.platform == "tpu":
        _tpu().check(hidden, blocks)
    path = _Path(softcap, hardware, split, blocks, interpret)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    inverse = jnp.broadcast_to(1 / jnp.asarray(temperature, dtype), targets.shape)
    tokens = targets.astype(jnp.int32), lax.stop_gradient(inverse)
    logprob, entropy = _logprobs(hidden, embedding, *tokens, path)
    return logprob, lax.stop_gradient(entropy)


@dataclasses.dataclass(frozen=True)
class _Path:
    softcap: float | None
    hardware: Hardware
    split: VocabularySplit | None
    blocks: LogitBlocks | None
    interpret: Any

    def forward(self, hidden: Array, embedding: Array, *tokens: Array) -> tuple[Array, ...]:
        """tokens: targets and inverse temperatures."""
        if self.hardware.platform == "tpu":
            return _tpu().forward(hidden, embedding, *tokens, self._compiled())
        blocks = self.blocks or logprob_xla.BLOCKS
        return logprob_xla.forward(hidden, embedding, *tokens, softcap=self.softcap, blocks=blocks)

    def backward(
        self, hidden: Array, embedding: Array, *tokens: Array, num_pieces: int
    ) -> tuple[Array, list[Callable[[Array], Array]]]:
        """The gradient of hidden, and that of the embedding in pieces, as `in_turn` takes them.

        tokens: targets, inverse temperatures, maxima, 1 / sums and the log-probabilities'
        cotangents. XLA computes both gradients at once, so there it is one piece.
        """
        if self.hardware.platform == "tpu":
            # In f32 if still to be summed.
            dtype = hidden.dtype if self.split is None else jnp.float32
            given = self._compiled()
            return _tpu().backward(
                hidden, embedding, *tokens, given=given, dtype=dtype, num_pieces=num_pieces
            )
        blocks = self.blocks or logprob_xla.BLOCKS
        dhidden, dembedding = logprob_xla.backward(
            hidden, embedding, *tokens, softcap=self.softcap, blocks=blocks
        )
        return dhidden, [lambda _: dembedding]

    def delayed(self, x: Array, until: Array) -> Array:
        from agentx_kernels.tpu.delayed import delayed  # as `_tpu`

        return delayed(x, until, self.interpret)

    def _compiled(self) -> Any:
        return _tpu().Compiled(self.softcap, self.hardware, self.blocks, self.interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logprobs(
    hidden_BSD: Array,
    embedding_VD: Array,
    targets_BS: Array,
    inverse_temperature_BS: Array,
    path: _Path,
) -> tuple[Array, Array]:
    arrays = hidden_BSD, embedding_VD, targets_BS, inverse_temperature_BS
    return _forward(*arrays, path)[0]


def _forward(
    hidden_BSD: Array,
    embedding_VD: Array,
    targets_BS: Array,
    inverse_temperature_BS: Array,
    path: _Path,
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    arrays = hidden_BSD, embedding_VD, targets_BS, inverse_temperature_BS
    statistics = _on_devices(_statistics, path, (TOKENS,) * 4)
    max_BS, sum_BS, weighted_BS, target_BS = statistics(*arrays)
    log_sum_BS = jnp.log(sum_BS)
    logprob_BS = target_BS - max_BS - log_sum_BS
    entropy_BS = log_sum_BS - weighted_BS / sum_BS
    return (logprob_BS, entropy_BS), (*arrays, max_BS, 1 / sum_BS)


def _backward(
    path: _Path, residuals: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    dlogprob_BS, _ = cotangents
    gradients = _on_devices(_gradients, path, (TOKENS, EMBEDDING))
    dhidden_BSD, dembedding_VD = gradients(*residuals, dlogprob_BS)
    return dhidden_BSD, dembedding_VD, None, None


_logprobs.defvjp(_forward, _backward)


def _on_devices(
    f: Callable[..., Any], path: _Path, outputs: tuple[str, ...]
) -> Callable[..., tuple[Array, ...]]:
    """f(path, hidden, embedding, ...), each device's part by itself; what f sums is whole."""
    f = functools.partial(f, path)
    if path.split is None:
        return f
    split = path.split
    specs = {
        TOKENS: PartitionSpec(split.rows, split.tokens),
        EMBEDDING: PartitionSpec(split.vocab, split.embed),
    }

    def run(hidden: Array, embedding: Array, *tokens: Array) -> tuple[Array, ...]:
        inputs = TOKENS, EMBEDDING, *[TOKENS] * len(tokens)
        return jax.shard_map(
            f,
            in_specs=tuple(specs[name] for name in inputs),
            out_specs=tuple(specs[name] for name in outputs),
            check_vma=False,  # what each makes is its own, which JAX need not check
        )(hidden, embedding, *tokens)

    return run


def _statistics(
    path: _Path, hidden_BSD: Array, embedding_VD: Array, targets_BS: Array, *tokens_BS: Array
) -> tuple[Array, ...]:
    """See `logprob_xla.forward`; of the whole vocabulary, [B, S] each. tokens: as for
    `_Path.forward`."""
    split, shape = path.split, targets_BS.shape
    if split is not None:
        embedding_VD = _gathered(embedding_VD, split)
        targets_BS = targets_BS - _offset(embedding_VD, split)
    hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    flat_T = (x.reshape(-1) for x in (targets_BS, *tokens_BS))
    statistics = path.forward(hidden_TD, embedding_VD, *flat_T)
    max_BS, sum_BS, weighted_BS, target_BS = (x.reshape(shape) for x in statistics)
    if split is None:
        return max_BS, sum_BS, weighted_BS, target_BS
    whole_BS = lax.pmax(max_BS, split.vocab)
    lower_BS = max_BS - whole_BS
    kept_BS = jnp.exp(lower_BS)
    return (
        whole_BS,
        lax.psum(kept_BS * sum_BS, split.vocab),
        lax.psum(kept_BS * (weighted_BS + lower_BS * sum_BS), split.vocab),
        lax.pmax(target_BS, split.vocab),
    )


def _gradients(
    path: _Path, hidden_BSD: Array, embedding_VD: Array, targets_BS: Array, *tokens_BS: Array
) -> tuple[Array, Array]:
    """Of hidden and embedding, in their types. tokens: as for `_Path.backward`."""
    split, dtype = path.split, hidden_BSD.dtype
    if split is not None:
        embedding_VD = _gathered(embedding_VD, split)
        targets_BS = targets_BS - _offset(embedding_VD, split)
    hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    flat_T = (x.reshape(-1) for x in (targets_BS, *tokens_BS))
    sums = [] if split is None else _sums(split)
    num_pieces = max(1, _NUM_PARTS * len(sums))
    of_hidden_TD, pieces = path.backward(hidden_TD, embedding_VD, *flat_T, num_pieces=num_pieces)
    # The layers' backward pass waits for dhidden alone. Left until after it, the embedding's
    # gradient would keep hidden states and the gathered embedding in memory all that while.
    dembedding_VD, dhidden_TD = in_turn(
        pieces,
        sums,
        after=of_hidden_TD,
        held=of_hidden_TD if split is None else _summed_shares(of_hidden_TD, split),
        delayed=path.delayed,
    )
    dhidden_TD = dhidden_TD.astype(dtype)
    if split is not None:
        dhidden_TD = lax.all_gather(dhidden_TD, split.vocab, axis=0, tiled=True)
    dhidden_TD = dhidden_TD[: hidden_TD.shape[0]]
    return dhidden_TD.reshape(hidden_BSD.shape), dembedding_VD.astype(dtype)


def _sums(split: VocabularySplit) -> list[Callable[[Array], Array]]:
    """The sum of the embedding's gradient over the devices of the tokens, in steps; of the sum each
    keeps its part of D.

    One axis of the mesh after the other: where two together are no axis of the slice, XLA for TPU
    sums up whole arrays on all devices, and computes nothing meanwhile.
    """
    scatter = functools.partial(lax.psum_scatter, scatter_dimension=1, tiled=True)
    sums: list[Callable[[Array], Array]] = [
        functools.partial(scatter, axis_name=axis)
        for axis in split.embed
        if lax.axis_size(axis) > 1
    ]
    others = [axis for axis in (*split.rows, split.tokens) if axis not in split.embed]
    if math.prod(map(lax.axis_size, others)) > 1:
        sums.append(functools.partial(lax.psum, axis_name=others))
    return sums


def _summed_shares(dhidden_TD: Array, split: VocabularySplit) -> Array:
    """The sum over the devices of the vocabulary, of which each has a share of the tokens.

    Shares are rounded before they are sent on, so less moves than by one sum of all; and TPUs sum
    up shares while something is computed, which a sum of all they do not.
    """
    missing = -dhidden_TD.shape[0] % lax.axis_size(split.vocab)
    filled_TD = jnp.pad(dhidden_TD, ((0, missing), (0, 0)))
    return lax.psum_scatter(filled_TD, split.vocab, scatter_dimension=0, tiled=True)


def _gathered(embedding_VD: Array, split: VocabularySplit) -> Array:
    """The device's part of the vocabulary, of the whole D; over one axis of the mesh after the
    other, as it is summed up (`_sums`)."""
    for axis in reversed(split.embed):
        embedding_VD = lax.all_gather(embedding_VD, axis, axis=1, tiled=True)
    return embedding_VD


def _offset(embedding_VD: Array, split: VocabularySplit) -> Array:
    """The first column of the device's part of the vocabulary."""
    return lax.axis_index(split.vocab) * embedding_VD.shape[0]


def _tpu() -> Any:
    """The path with Pallas, which takes a second to import where nobody needs it."""
    from agentx_kernels.tpu import logprob as tpu

    return tpu


def _check_numbers(
    hardware: Hardware,
    temperature: float | Array,
    softcap: float | None,
    blocks: LogitBlocks | None,
) -> None:
    check_hardware(hardware)
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0, or None for none")
    if blocks is not None and min(blocks.tokens, blocks.columns) < 1:
        raise ValueError(f"the blocks are {blocks}; each must be 1 or more")


def _check(hidden: Array, embedding: Array, targets: Array) -> None:
    if hidden.ndim != 3 or embedding.ndim != 2 or hidden.shape[2] != embedding.shape[1]:
        raise ValueError(
            f"hidden must be [B, S, D] and embedding [V, D], not {hidden.shape} and "
            f"{embedding.shape}"
        )
    if 0 in hidden.shape + embedding.shape:
        raise ValueError(
            f"no dim of hidden and embedding may be 0, but they are {hidden.shape} and "
            f"{embedding.shape}"
        )
    if targets.shape != hidden.shape[:2] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets must be integers {hidden.shape[:2]} like the tokens of hidden, not "
            f"{targets.dtype} {targets.shape}"
        )
    if hidden.dtype != embedding.dtype or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(
            f"hidden and embedding must share one floating-point type, not {hidden.dtype} and "
            f"{embedding.dtype}: cast one of them"
        )
