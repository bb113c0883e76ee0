"""How a layer attends: grouped queries, or multi-head latent attention.

Both give the caller's `attend` rotated queries, keys and values, and project what it looked up.

Legend: B rows, S tokens, N heads, K KV heads, H head size of queries and keys, V of values, P and R
its plain and rotated parts, D model, C rank of the vector that keys and values are products of,
L layers of a place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from agentx.model.config import ModelConfig, Place
from agentx.model.parts import (
    Initializer,
    Project,
    RMSNorm,
    Turn,
    inwards,
    merged,
    outwards,
    parameter,
    project_few,
    rotate,
)
from agentx.sharding import constrain

Array = jax.Array
# (q, k, v, sinks or None) -> what the heads looked up.
Attend = Callable[[Array, Array, Array, Array | None], Array]

# How many times an embedding's length the last layer adds of what it copies.
_COPY_GAIN = 45.0

# What DeepSeek-V3 adds to the mean square in the norms within its attention, whatever config.json
# says of the others.
_LATENT_EPS = 1e-6


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023); how keys are looked up is the caller's."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, place: Place):
        embed, head_dim = config.d_model, config.head_dim
        layers = {"layers": len(place.layers)}
        of_queries = {"heads": config.num_heads, "head_dim": head_dim}
        of_keys = {"kv_heads": config.num_kv_heads, "head_dim": head_dim}
        self.config = config
        self.w_q = parameter(rngs, inwards(embed), config, 1, **layers, embed=embed, **of_queries)
        self.w_k = parameter(rngs, inwards(embed), config, 1, **layers, embed=embed, **of_keys)
        self.w_v = parameter(rngs, inwards(embed), config, 1, **layers, embed=embed, **of_keys)
        out = outwards(config, config.num_heads * head_dim)
        if config.init == "copy":
            is_last = [layer == config.num_layers - 1 for layer in place.layers]
            out = copying_output(self.w_v[...], config.num_heads, is_last)
        self.w_o = parameter(rngs, out, config, 2, **layers, **of_queries, embed=embed)
        if config.qk_norm == "head":
            self.q_norm = RMSNorm(rngs, config, **layers, head_dim=head_dim)
            self.k_norm = RMSNorm(rngs, config, **layers, head_dim=head_dim)
        elif config.qk_norm == "all":
            self.q_norm = RMSNorm(rngs, config, **layers, **of_queries)
            self.k_norm = RMSNorm(rngs, config, **layers, **of_keys)
        if config.qkv_bias:
            self.b_q = parameter(rngs, initializers.zeros, config, **layers, **of_queries)
            self.b_k = parameter(rngs, initializers.zeros, config, **layers, **of_keys)
            self.b_v = parameter(rngs, initializers.zeros, config, **layers, **of_keys)
        if config.output_bias:
            self.b_o = parameter(rngs, initializers.zeros, config, **layers, embed=embed)
        if config.sinks:
            heads = config.num_heads
            self.sink = parameter(rngs, initializers.zeros, config, **layers, heads=heads)

    def qkv(
        self, x_BSD: Array, turn: Turn, project: Project, from_cache: bool
    ) -> tuple[Array, Array, Array]:
        """Rotated queries [B, S, N, H], rotated keys and values [B, S, K, H]."""
        del from_cache  # a cache holds the keys and values themselves
        q_BSNH = project(x_BSD, self.w_q)
        k_BSKH = project(x_BSD, self.w_k)
        v_BSKH = project(x_BSD, self.w_v)
        if self.config.qkv_bias:
            q_BSNH += self.b_q[...].astype(x_BSD.dtype)
            k_BSKH += self.b_k[...].astype(x_BSD.dtype)
            v_BSKH += self.b_v[...].astype(x_BSD.dtype)
        if self.config.qk_norm != "none":
            q_BSNH, k_BSKH = self.q_norm(q_BSNH), self.k_norm(k_BSKH)
        return (
            constrain(rotate(q_BSNH, turn), "batch", "sequence", "heads", None),
            constrain(rotate(k_BSKH, turn), "batch", "sequence", "kv_heads", None),
            constrain(v_BSKH, "batch", "sequence", "kv_heads", None),
        )

    def sinks(self) -> Array | None:
        """[N], in f32, or None where heads have none."""
        return self.sink[...].astype(jnp.float32) if self.config.sinks else None

    def out(self, o_BSNH: Array, project: Project, from_cache: bool) -> Array:
        """What the heads looked up, as a term of the residual stream [B, S, D]."""
        del from_cache
        out_BSD = project(o_BSNH, self.w_o)
        return out_BSD + self.b_o[...].astype(out_BSD.dtype) if self.config.output_bias else out_BSD


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

    In training, keys and values of every head are made from the latent vector. From a cache, which
    holds the vector itself, the product that makes keys is taken with the queries instead, and the
    one that makes values with what was looked up: the same numbers, for all heads then have one
    key in common.
    """

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, place: Place):
        assert config.latent is not None
        latent, embed, layers = config.latent, config.d_model, {"layers": len(place.layers)}
        heads, rank = config.num_heads, latent.key_value_rank
        of_queries = {"heads": heads, "head_dim": config.head_dim}
        self.latent = latent
        read = inwards(embed)
        if latent.query_rank is None:
            self.w_q = parameter(rngs, read, config, 1, **layers, embed=embed, **of_queries)
        else:
            size = latent.query_rank
            self.w_q_a = parameter(rngs, read, config, 1, **layers, embed=embed, latent=size)
            self.q_norm = RMSNorm(rngs, config, eps=_LATENT_EPS, **layers, latent=size)
            self.w_q_b = parameter(
                rngs, inwards(size), config, 1, **layers, embed=size, **of_queries
            )
        size = rank + latent.rotated_dim
        self.w_kv_a = parameter(rngs, read, config, 1, **layers, embed=embed, latent=size)
        self.kv_norm = RMSNorm(rngs, config, eps=_LATENT_EPS, **layers, latent=rank)
        of_both = {"heads": heads, "head_dim": latent.plain_dim + latent.value_dim}
        self.w_kv_b = parameter(rngs, inwards(rank), config, 1, **layers, embed=rank, **of_both)
        of_values = {"heads": heads, "head_dim": latent.value_dim}
        out = outwards(config, heads * latent.value_dim)
        self.w_o = parameter(rngs, out, config, 2, **layers, **of_values, embed=embed)

    def qkv(
        self, x_BSD: Array, turn: Turn, project: Project, from_cache: bool
    ) -> tuple[Array, Array, Array]:
        """Queries and keys, [B, S, N, H] each, and values [B, S, N, V]; or, from a cache, queries
        [B, S, N, C + R], keys [B, S, 1, C + R] and values [B, S, 1, C]."""
        dtype, plain_dim = x_BSD.dtype, self.latent.plain_dim
        if self.latent.query_rank is None:
            q_BSNH = project(x_BSD, self.w_q)
        else:
            short = self.q_norm(project(x_BSD, self.w_q_a))
            q_BSNH = project(short, self.w_q_b)
        q_BSNP, q_BSNR = q_BSNH[..., :plain_dim], q_BSNH[..., plain_dim:]
        q_BSNR = rotate(q_BSNR, turn, neighbours=True)
        both_BSC = project(x_BSD, self.w_kv_a)
        rank = self.latent.key_value_rank
        c_BSC = self.kv_norm(both_BSC[..., :rank])
        k_BS1R = rotate(both_BSC[:, :, None, rank:], turn, neighbours=True)
        if from_cache:
            w_CNP = self._w_kv_b(project, dtype)[..., :plain_dim]
            q_BSNC = jnp.einsum("bsnp,cnp->bsnc", q_BSNP, w_CNP)
            c_BS1C = c_BSC[:, :, None]
            k_BS1C = jnp.concatenate([c_BS1C, k_BS1R], -1)
            return jnp.concatenate([q_BSNC, q_BSNR], -1), k_BS1C, c_BS1C
        kv_BSNH = project(c_BSC, self.w_kv_b)
        k_BSNR = jnp.broadcast_to(k_BS1R, q_BSNR.shape)
        return (
            constrain(jnp.concatenate([q_BSNP, q_BSNR], -1), "batch", "sequence", "heads", None),
            constrain(
                jnp.concatenate([kv_BSNH[..., :plain_dim], k_BSNR], -1),
                "batch",
                "sequence",
                "heads",
                None,
            ),
            constrain(kv_BSNH[..., plain_dim:], "batch", "sequence", "heads", None),
        )

    def sinks(self) -> None:
        """Heads have none."""

    def out(self, o_BSNV: Array, project: Project, from_cache: bool) -> Array:
        """What the heads looked up, as a term of the residual stream [B, S, D]."""
        dtype = o_BSNV.dtype
        if from_cache:  # what was looked up is [B, S, N, C]
            w_CNV = self._w_kv_b(project, dtype)[..., self.latent.plain_dim :]
            o_BSNV = jnp.einsum("bsnc,cnv->bsnv", o_BSNV, w_CNV)
        return project(o_BSNV, self.w_o)

    def _w_kv_b(self, project: Project, dtype: jnp.dtype) -> Array:
        """[C, N, P + V], however it is stored; in one piece, for half of it is taken transposed."""
        w = self.w_kv_b[...].astype(dtype)
        if project is project_few:
            w = jax.tree.map(lambda part: jnp.moveaxis(part, -1, 0), w)
        return merged(w)


def copying_output(w_v_LDKH: Array, heads: int, is_last: Sequence[bool]) -> Initializer:
    """What draws w_o [L, N, H, D] for ModelConfig.init = "copy", given w_v.

    is_last: of each of the L layers, whether it is the model's last.

    Copying from context takes two layers: one marks every token with the token before it, the next
    finds the mark that is like the last token and repeats what stands there (an induction head,
    Olsson et al., 2022). Drawn at random, neither is of use before the other is there, and hundreds
    of steps pass. Here each begins with its half:

    - In the last layer w_o is w_v transposed, an alignment that Trockman and Kolter (2023) found in
      trained layers, and outweighs the token itself: a head repeats whatever it attends to.
    - In the layers before, w_o is random, and what a head adds as long as an embedding: it can be
      told from the token that was there, and does not drown it.
    - All embeddings share a direction (`transformer.py`), since this family has no biases: so
      a head can attend by position alone, which marking the token before needs.

    docs/log.md has what each of them is worth.
    """
    _, embed, kv_heads, head_dim = w_v_LDKH.shape
    groups = heads // kv_heads

    def draw(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        marking = initializers.normal((embed * heads * head_dim) ** -0.5)(key, shape, dtype)
        repeating = jnp.repeat(w_v_LDKH, groups, axis=2).transpose(0, 2, 3, 1)
        repeating *= _COPY_GAIN * embed**-0.5 / groups
        is_last_L111 = jnp.array(is_last)[:, None, None, None]
        return jnp.where(is_last_L111, repeating, marking).astype(dtype)

    return draw
