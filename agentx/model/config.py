"""What a model is, in numbers. Enters: sizes. Leaves: a checked, hashable `ModelConfig`.

Legend: B rows, S tokens a row, N heads, K KV heads, H head size, D model, F feed-forward,
V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp

from agentx.model.rope import RopeScaling

Remat = Literal["none", "dots", "full"]
Init = Literal["normal", "copy"]
ContextParallel = Literal["auto", "all_gather", "ulysses", "ring", "usp"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family (`qk_norm=False`) or Qwen3 (`qk_norm=True`).

    vocab_size V, d_model D, num_layers L, num_heads N, num_kv_heads K, head_dim H, d_ff F: sizes.
    qk_norm: RMS-normalise every head of the queries and keys before the rotation.
    tie_embeddings: the unembedding is the embedding.
    logit_softcap: cap of the logits, cap * tanh(logits / cap), as in Gemma 2; None for none.
    rope_theta: the base of the rotation's wavelengths. rope_scaling: how they are changed for long
      rows (LinearRope, DynamicRope, YarnRope, Llama3Rope, LongRope); None for not at all.
    norm_eps: added to the mean square.
    max_length: the most tokens a row may hold; what caches and data are checked against.
    init: how fresh parameters are drawn: "normal", or "copy" (see `layers.copying_output`), with
      which small models learn to copy from their context several times sooner.
    dtype: of the activations and matrix products ("float32" or "bfloat16"; norms, softmax and
      accumulation are f32 either way). param_dtype: what the parameters are kept in.
    remat: what the backward pass computes again: "none" nothing, "dots" what lies between products
      (norms, rotations, gates), "full" everything of a layer, from its input. "dots" keeps less
      than half of what "none" does, and is faster where memory is slow (a sixth on a CPU).
    context_parallel: how attention meets tokens that lie on other devices: a strategy of
      `agentx_kernels.context_parallel`, or "auto", which chooses by KV heads and memory.

    Raises ValueError where sizes are not positive or do not fit together.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    qk_norm: bool = True
    tie_embeddings: bool = True
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    max_length: int = 2048
    init: Init = "normal"
    logit_softcap: float | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: Remat = "dots"
    context_parallel: ContextParallel = "auto"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "d_ff",
            "max_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}: each KV head serves the same number of heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; the rotation needs an even one")
        if not self.rope_theta > 1 or not self.norm_eps > 0:
            raise ValueError(
                f"rope_theta must be above 1 and norm_eps above 0, not {self.rope_theta} and "
                f"{self.norm_eps}"
            )
        if self.rope_scaling is not None:  # raises where it does not fit the head
            self.rope_scaling.frequencies(self.rope_theta, self.head_dim, self.max_length)
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16", "float64"):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; choose float32, bfloat16 or float64"
                )
        if self.logit_softcap is not None and not self.logit_softcap > 0:
            raise ValueError(
                f"logit_softcap is {self.logit_softcap}; it must be above 0, or None for none"
            )
        if self.init not in ("normal", "copy"):
            raise ValueError(f"init is {self.init!r}; choose normal or copy")
        if self.remat not in ("none", "dots", "full"):
            raise ValueError(f"remat is {self.remat!r}; choose none, dots or full")
        if self.context_parallel not in get_args(ContextParallel):
            raise ValueError(
                f"context_parallel is {self.context_parallel!r}; choose one of "
                f"{', '.join(get_args(ContextParallel))}"
            )

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    def num_params(self) -> int:
        """How many numbers the parameters hold, tied embeddings counted once."""
        d_model, head_dim = self.d_model, self.head_dim
        attention = 2 * d_model * head_dim * (self.num_heads + self.num_kv_heads)
        attention += 2 * head_dim * self.qk_norm
        layer = attention + 3 * d_model * self.d_ff + 2 * d_model
        embeddings = self.vocab_size * d_model * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + d_model

    def train_flops_per_token(self, length: int) -> float:
        """Floating-point operations to train one token of a causal row of `length` tokens.

        6 for each weight of a matrix product (2 forward, 4 backward), the unembedding included and
        the look-up of the embedding not; and for attention 12 L N H for each key seen, of which a
        token sees (length + 1) / 2 in the mean. Recomputation is not counted.
        """
        layer = 2 * self.d_model * self.head_dim * (self.num_heads + self.num_kv_heads)
        layer += 3 * self.d_model * self.d_ff
        products = self.num_layers * layer + self.vocab_size * self.d_model
        attention = self.num_layers * self.num_heads * self.head_dim * (length + 1) / 2
        return 6.0 * products + 12.0 * attention
