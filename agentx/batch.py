"""The one thing that a train step eats: a pytree of fixed shape. Legend: B rows, S tokens a row."""

from __future__ import annotations

from typing import NamedTuple

import jax

from agentx_kernels.layout import TreeLayout

Array = jax.Array


class Batch(NamedTuple):
    """Rows of packed trajectories, with what the loss needs to know of every target.

    tokens, targets: i32[B, S]; `targets[b, s]` is what the hidden state at `s` must predict (the
      next token of its branch), 0 where `weights` is 0.
    weights: f32[B, S], the loss weight of that target.
    layout: who sees whom, see `agentx_kernels.layout`.
    from_policy: f32[B, S], 1 where the target was sampled by the policy and is trained by its
      advantage, 0 where it is data and trained by its log-probability alone.
    advantages, sampler_logprobs: f32[B, S], of the target.
    old_logprobs: f32[B, S], by the trainer before the first update on this batch; None means that
      this is the first update, so that the current ones serve.
    reference_logprobs: f32[B, S], by a frozen model, for a KL term.
    experts: i32[B, S, L, k], which experts each token took when it was sampled, of the L layers
      that have experts; they are taken again. None where the router is to choose.
    """

    tokens: Array
    targets: Array
    weights: Array
    layout: TreeLayout
    from_policy: Array | None = None
    advantages: Array | None = None
    sampler_logprobs: Array | None = None
    old_logprobs: Array | None = None
    reference_logprobs: Array | None = None
    experts: Array | None = None
