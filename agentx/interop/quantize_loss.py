"""What weights in eight bits cost: their own error, and what the model then says otherwise."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from agentx.interop.families import family_of
from agentx.interop.quantize import (
    Quantization,
    check_quantization,
    dequantized,
    is_linear,
    quantized,
)
from agentx.interop.tensors import Tensor, family_tensors, flatten_params
from agentx.model.config import ModelConfig
from agentx.model.transformer import abstract_transformer
from agentx_kernels.layout import causal


class AccuracyLoss(NamedTuple):
    """What quantization changed.

    weights: of each kind of weight, over all layers, the norm of the error by that of the weight.
    divergence: the mean Kullback-Leibler divergence of the distributions of the next token, from
    the model's to the quantized one's, in nats a token. loss, quantized_loss: the mean -log p of
    the next token of the rows, of both, in nats. num_tokens: how many next tokens that is over.
    """

    weights: dict[str, float]
    divergence: float
    loss: float
    quantized_loss: float
    num_tokens: int

    def table(self) -> str:
        """A line for every figure."""
        width = max(len(name) for name in ("KL, nats a token", *self.weights))
        lines = [f"{name:<{width}}  {error:10.4%}" for name, error in self.weights.items()]
        figures = {
            "KL, nats a token": self.divergence,
            "-log p before": self.loss,
            "-log p after": self.quantized_loss,
            "difference": self.quantized_loss - self.loss,
        }
        lines += [f"{name:<{width}}  {figure:10.6f}" for name, figure in figures.items()]
        return "\n".join(lines)


def accuracy_loss(
    params: Any,
    config: ModelConfig,
    tokens: np.ndarray,
    quantize: Quantization,
    *,
    dtype: str = "float32",
) -> AccuracyLoss:
    """Runs a model and the same with quantized weights over rows of tokens.

    params: as of `export_huggingface`. tokens: i32[B, S], a text a row, -1 behind its end.
    dtype: of the scales. Only quantization is measured: what else an export rounds to dtype stays
    as it is here. Both models are held at once, and the logits of one row.

    Raises ValueError where the rows have no next token, or one that the model does not know, and
    what `check_quantization` does.
    """
    tensors = list(family_tensors(family_of(config), config).values())
    check_quantization(quantize, tensors, config)
    count = int(np.sum(tokens[:, 1:] >= 0)) if tokens.ndim == 2 else 0
    if not count:
        raise ValueError(f"tokens has shape {tokens.shape}; give rows of 2 tokens or more")
    if tokens.max() >= config.vocab_size:
        raise ValueError(f"tokens has an id {tokens.max()}; the model has {config.vocab_size}")
    arrays = flatten_params(params)
    rounded, weights = _rounded(arrays, tensors, quantize, jnp.dtype(dtype))
    before, after = _as_state(arrays, config), _as_state(rounded, config)
    graphdef = nnx.graphdef(abstract_transformer(config))

    @jax.jit
    def of_row(before: nnx.State, after: nnx.State, row_S: jax.Array) -> jax.Array:
        # What stands behind the end is seen by nothing before it, and not counted.
        known_S, row_S = row_S[1:] >= 0, jnp.maximum(row_S, 0)
        log_p_SV, log_q_SV = (_log_p(nnx.merge(graphdef, x), row_S) for x in (before, after))
        divergence_S = jnp.sum(jnp.exp(log_p_SV) * (log_p_SV - log_q_SV), 1)
        lost = (-jnp.take_along_axis(x, row_S[1:, None], 1)[:, 0] for x in (log_p_SV, log_q_SV))
        return jnp.stack([jnp.sum(x, where=known_S) for x in (divergence_S, *lost)])

    # Summed in the host's 64 bits: a difference of two sums is asked for.
    sums = np.zeros(3)
    for row in tokens:
        sums += np.asarray(of_row(before, after, jnp.asarray(row, jnp.int32)), np.float64)
    divergence, loss, quantized_loss = (float(x) for x in sums / count)
    return AccuracyLoss(weights, divergence, loss, quantized_loss, count)


def random_rows(vocab_size: int, max_length: int) -> np.ndarray:
    """Rows for `accuracy_loss` where no text is at hand, i32[4, S], S at most 256. Seed 0.

    A model is no good at them, so the divergence says more than the loss.
    """
    shape = 4, min(max_length, 256)
    return np.random.default_rng(0).integers(0, vocab_size, shape, np.int32)


def _rounded(
    arrays: dict[str, Any], tensors: list[Tensor], quantize: Quantization, dtype: np.dtype
) -> tuple[dict[str, Any], dict[str, float]]:
    """The parameters as a server of the quantized weights has them, and `AccuracyLoss.weights`."""
    rounded = dict(arrays)
    new: dict[str, np.ndarray] = {}
    error: dict[str, float] = {}
    norm: dict[str, float] = {}
    for tensor in tensors:
        if not is_linear(tensor):
            continue
        (piece,) = tensor.pieces
        weight = tensor.joined(arrays, np.dtype(np.float32))
        again = dequantized(*quantized(weight, quantize, dtype)).astype(np.float32)
        if piece.param not in new:
            # A copy, and one that is filled piece by piece.
            new[piece.param] = np.array(arrays[piece.param])
        new[piece.param][piece.at] = piece.of_theirs(again)
        kind = ".".join(part for part in piece.param.split(".")[1:] if not part.isdigit())
        error[kind] = error.get(kind, 0.0) + float(np.sum(np.square(again - weight)))
        norm[kind] = norm.get(kind, 0.0) + float(np.sum(np.square(weight)))
    for name, array in new.items():
        where = getattr(arrays[name], "sharding", None)
        rounded[name] = jax.device_put(array, where)
    return rounded, {kind: (error[kind] / norm[kind]) ** 0.5 for kind in error}


def _as_state(arrays: dict[str, Any], config: ModelConfig) -> nnx.State:
    """A flat dict as the model's state."""
    state = nnx.state(abstract_transformer(config))
    leaves = [arrays[name] for name in flatten_params(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _log_p(model: Any, row_S: jax.Array) -> jax.Array:
    """[S - 1, V]: of every token but the first, in f32."""
    tokens_1S = row_S[None, :-1]
    hidden_SD = model(tokens_1S, causal(*tokens_1S.shape)).hidden[0]
    logits_SV = (hidden_SD @ model.unembedding().T).astype(jnp.float32)
    cap = model.config.logit_softcap
    if cap is not None:
        logits_SV = cap * jnp.tanh(logits_SV / cap)
    return jax.nn.log_softmax(logits_SV)
