"""What a model is, in numbers and kinds. Enters: sizes. Leaves: a checked, hashable `ModelConfig`.

A decoder is a stack of layers of few kinds. What all layers share stands in `ModelConfig` itself;
what changes from layer to layer does so by patterns, and `ModelConfig.stacks` cuts the layers into
runs that repeat a pattern, which the model scans over.

Legend: B rows, S tokens a row, N heads, K KV heads, H head size, D model, F feed-forward,
V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp

from agentx.model.moe_config import MoEConfig
from agentx.model.rope import RopeScaling, YarnRope

Remat = Literal["none", "dots", "full"]
Init = Literal["normal", "copy"]
ContextParallel = Literal["auto", "all_gather", "ulysses", "ring", "usp"]
QKNorm = Literal["none", "head", "all"]
Norms = Literal["pre", "post", "both"]
Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
RopeKind = Literal["global", "local", "none"]


class LayerKind(NamedTuple):
    """What one layer has of its own.

    window: a token sees itself and tokens less than this many before it; None for all of them.
    rope: which rotation turns queries and keys (see `ModelConfig.rope_pattern`). is_sparse: its
    feed-forward is a mixture of experts.
    """

    window: int | None
    rope: RopeKind
    is_sparse: bool


class Place(NamedTuple):
    """A place in a repeated pattern: the layers that stand there, and their kind."""

    layers: range
    kind: LayerKind


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads
    are products of one short vector a token, which is all that a cache holds.

    query_rank: the length of the vector that queries are a product of; None for D itself.
    key_value_rank: of the one that keys and values are a product of. plain_dim, rotated_dim: of a
    head of queries and keys, the part that is not rotated and the part that is, which all heads
    share in the keys. value_dim: of a head of the values.

    Raises ValueError where a size is not positive or rotated_dim is odd.
    """

    query_rank: int | None
    key_value_rank: int
    plain_dim: int
    rotated_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size is not None and size < 1:
                raise ValueError(f"{field.name} is {size}; it must be 1 or more")
        if self.rotated_dim % 2:
            raise ValueError(f"rotated_dim is {self.rotated_dim}; the rotation needs an even one")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder. The defaults are Qwen3's; interop/families.py has what others set.

    vocab_size V, d_model D, num_layers L, num_heads N, num_kv_heads K, head_dim H, d_ff F: sizes.
    tie_embeddings: the unembedding is the embedding. scale_embeddings: embeddings are multiplied by
      sqrt(D), rounded to the type of the activations, as in Gemma.
    logit_softcap: cap of the logits, cap * tanh(logits / cap), as in Gemma 2; None for none.

    Attention:
    qk_norm: queries and keys are RMS-normalised before the rotation, each "head" by itself (Qwen3,
      Gemma 3), "all" heads of a token as one (OLMo 2), or "none".
    qkv_bias, output_bias: the projections have biases.
    attention_scale: what the dot products are multiplied by; None for H ** -0.5.
    attention_softcap: cap of the scores, as in Gemma 2; None for none.
    sinks: each head has a score without a value in its softmax, as in gpt-oss.
    latent: multi-head latent attention in place of grouped queries. Then N = K, H is plain_dim +
      rotated_dim, and the pairs of the rotation are neighbours.
    window_pattern: the layers' windows in turn, in tokens, None for none; (4096, None) is a window
      in every other layer, the first among them.
    rope_pattern: the layers' rotations in turn: "global" by rope_theta and rope_scaling, "local" by
      local_rope_theta alone (Gemma 3's windowed layers), "none" (SmolLM3).
    rope_theta, local_rope_theta: bases of the wavelengths. rope_scaling: how they are changed for
      long rows (LinearRope, DynamicRope, YarnRope, Llama3Rope, LongRope); None for not at all.

    Around and after it:
    norms: where a layer normalises: what goes into attention and feed-forward ("pre"), what comes
      out of them ("post", OLMo 2), or "both" (Gemma).
    norm_eps: added to the mean square. norm_plus_one: the norms' weights are offsets from 1, as in
      Gemma.
    activation: in the middle of the feed-forward (see `parts.gated`). mlp_bias: it has biases.
    moe: the feed-forward is a mixture of experts (MoEConfig), but for the first `num_dense_layers`;
      None for none.

    max_length: the most tokens a row may hold; what caches and data are checked against.
    init: how fresh parameters are drawn: "normal", or "copy" (see `attention.copying_output`), with
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
    tie_embeddings: bool = True
    scale_embeddings: bool = False
    logit_softcap: float | None = None
    qk_norm: QKNorm = "head"
    qkv_bias: bool = False
    output_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    sinks: bool = False
    latent: LatentConfig | None = None
    window_pattern: tuple[int | None, ...] = (None,)
    rope_pattern: tuple[RopeKind, ...] = ("global",)
    rope_theta: float = 1e6
    local_rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    norms: Norms = "pre"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    activation: Activation = "silu"
    mlp_bias: bool = False
    moe: MoEConfig | None = None
    num_dense_layers: int = 0
    max_length: int = 2048
    init: Init = "normal"
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: Remat = "dots"
    context_parallel: ContextParallel = "auto"

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}: each KV head serves the same number of heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; the rotation needs an even one")
        if self.latent is not None:
            self._check_latent(self.latent)
        if self.rope_scaling is not None:  # raises where it does not fit the head
            self.rope_scaling.frequencies(self.rope_theta, self.rotated_dim, self.max_length)
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(
                f"num_dense_layers is {self.num_dense_layers} of {self.num_layers} layers"
            )
        if self.init == "copy" and self.norms != "pre":
            raise ValueError(f"init 'copy' is for norms 'pre', not {self.norms!r}")

    def _check_numbers(self) -> None:
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
        for name in ("rope_theta", "local_rope_theta"):
            if not getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 1")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps is {self.norm_eps}; it must be above 0")
        for name in ("logit_softcap", "attention_softcap", "attention_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0, or None for none")
        for name in ("window_pattern", "rope_pattern"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; it needs an entry for each layer of a period")
        for window in self.window_pattern:
            if window is not None and window < 1:
                raise ValueError(f"window_pattern has {window}; a window is 1 or more, or None")

    def _check_choices(self) -> None:
        choices: dict[str, Any] = {
            "qk_norm": QKNorm,
            "norms": Norms,
            "activation": Activation,
            "init": Init,
            "remat": Remat,
            "context_parallel": ContextParallel,
        }
        given = [(name, getattr(self, name), get_args(kind)) for name, kind in choices.items()]
        given += [("rope_pattern", rope, get_args(RopeKind)) for rope in self.rope_pattern]
        dtypes = "float32", "bfloat16", "float64"
        given += [("dtype", self.dtype, dtypes), ("param_dtype", self.param_dtype, dtypes)]
        for name, value, known in given:
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")

    def _check_latent(self, latent: LatentConfig) -> None:
        if self.head_dim != latent.plain_dim + latent.rotated_dim:
            raise ValueError(
                f"head_dim is {self.head_dim}; with latent attention it is plain_dim + rotated_dim "
                f"= {latent.plain_dim} + {latent.rotated_dim}"
            )
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; with latent attention every one of the "
                f"{self.num_heads} heads has keys and values of its own"
            )
        for name, plain in (("qk_norm", "none"), ("qkv_bias", False), ("sinks", False)):
            if getattr(self, name) != plain:
                raise ValueError(f"{name} is {getattr(self, name)!r}, which latent attention lacks")

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def rotated_dim(self) -> int:
        """How much of a head is rotated."""
        return self.latent.rotated_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """The size of a head of the values."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def softmax_scale(self) -> float:
        """What the dot products are multiplied by. With latent attention YaRN's factor is part of
        it, squared, and not of the rotation, for most of a head is not rotated (DeepSeek-V3)."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        if self.latent and isinstance(self.rope_scaling, YarnRope):
            mscale = self.rope_scaling.mscale_all_dim or 0.0
            scale *= (0.1 * mscale * math.log(self.rope_scaling.factor) + 1) ** 2
        return scale

    @property
    def cache_dims(self) -> tuple[int, int, int]:
        """What a cache holds of a token and a layer: KV heads, their key size and value size.

        With latent attention it is one vector that all heads share, and its rotated part: values
        are the vector itself, so they take no room of their own.
        """
        if self.latent:
            return 1, self.latent.key_value_rank + self.latent.rotated_dim, 0
        return self.num_kv_heads, self.head_dim, self.head_dim

    @property
    def routing_shape(self) -> tuple[int, int]:
        """How many layers have experts, and how many of them a token takes in each."""
        if self.moe is None:
            return 0, 0
        return self.num_layers - self.num_dense_layers, self.moe.experts_per_token

    @functools.cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Every layer's."""
        windows, ropes = self.window_pattern, self.rope_pattern
        return tuple(
            LayerKind(windows[i % len(windows)], ropes[i % len(ropes)], self._is_sparse(i))
            for i in range(self.num_layers)
        )

    @functools.cached_property
    def stacks(self) -> tuple[tuple[Place, ...], ...]:
        """The layers as runs that repeat a pattern: of each run, the places of its pattern.

        Layers without experts before those that have them are runs of their own, and so are the
        layers left over where they are no whole number of patterns: with a pattern of three, seven
        layers are (0, 3), (1, 4), (2, 5) and then (6).
        """
        dense = self.num_dense_layers if self.moe else 0
        period = math.lcm(len(self.window_pattern), len(self.rope_pattern))
        runs = []
        for first, stop in ((0, dense), (dense, self.num_layers)):
            whole = stop - (stop - first) % period
            runs += [(first, whole, period), (whole, stop, stop - whole)]
        return tuple(
            tuple(
                Place(range(first + place, stop, period), self.kinds[first + place])
                for place in range(period)
            )
            for first, stop, period in runs
            if stop > first
        )

    def _is_sparse(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.num_dense_layers

    @property
    def places(self) -> tuple[Place, ...]:
        """Those of all runs, in order: the model has one `Layer`, stacked, for each."""
        return tuple(place for stack in self.stacks for place in stack)
