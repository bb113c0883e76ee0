"""What each target costs. A loss is a frozen config that is called once per micro-batch:

    loss(logprobs [B, S], entropy [B, S], batch) -> (values f32[B, S], metrics)

The step multiplies `values` by the batch's weights and divides by the global sum of weights; a loss
never averages. Metrics are sums and counts (`Mean`) or maxima (`Max`), so that they add up over
micro-batches exactly.

`PolicyGradientLoss` treats targets that the policy did not sample as data: so one batch can hold
both, and `NextTokenLoss` is what it becomes when nothing was sampled.

Legend: B rows, S tokens a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from agentx.batch import Batch

Array = jax.Array


class Mean(NamedTuple):
    """A mean over tokens, as a sum and a number, which may have further axes to add up."""

    total: Array
    number: Array

    def result(self) -> Array:
        """The mean, 0 where nothing was counted."""
        return self.total.sum() / jnp.maximum(self.number.sum(), 1)


class Max(NamedTuple):
    """A maximum over tokens, 0 where there are none, of values that are not negative."""

    value: Array

    def result(self) -> Array:
        return self.value.max()


Metric = Mean | Max
Loss = Callable[[Array, Array, Batch], tuple[Array, dict[str, Metric]]]


@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """-log p of every target: pretraining and SFT."""

    def __call__(
        self, logprobs_BS: Array, entropy_BS: Array, batch: Batch
    ) -> tuple[Array, dict[str, Metric]]:
        return -logprobs_BS, {"entropy": _mean(entropy_BS, batch.weights > 0)}


@dataclasses.dataclass(frozen=True)
class PolicyGradientLoss:
    """The clipped policy gradient of GRPO (arXiv:2402.03300) with asymmetric clipping (DAPO,
    arXiv:2503.14476) and truncated importance weights (as in IMPALA's, arXiv:1802.01561).

    With r = p / p_old, A the advantage and c = min(p_old / p_sampler, importance_cap), a target
    that the policy sampled costs

        -c min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coefficient k3(p, p_reference)

    where k3 = q - log q - 1 with q = p_reference / p (Schulman, 2020); any other target costs
    -log p.

    p_old is batch.old_logprobs, or where that is None the current p without its gradient, so that r
    is 1. importance_cap: None leaves c out. negative_scale: what advantages below 0 are multiplied
    by. `batch.from_policy` None means that the policy sampled every target.

    Metrics are over the policy's targets with weight: clip_fraction (where the clip cuts the
    gradient), ratio, kl, sampler_difference and its maximum (|log p - log p_sampler|), importance,
    policy_entropy.

    Raises ValueError where a setting is out of range, and, when called, where the batch lacks the
    advantages, sampler_logprobs or reference_logprobs that the settings need.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.0
    importance_cap: float | None = None
    negative_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"clip_low must be in [0, 1] and clip_high 0 or more, not {self.clip_low} and "
                f"{self.clip_high}"
            )
        if self.kl_coefficient < 0 or self.negative_scale < 0:
            raise ValueError(
                f"kl_coefficient and negative_scale must be 0 or more, not {self.kl_coefficient} "
                f"and {self.negative_scale}"
            )
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(
                f"importance_cap is {self.importance_cap}; it must be above 0, or None for none"
            )

    def __call__(
        self, logprobs_BS: Array, entropy_BS: Array, batch: Batch
    ) -> tuple[Array, dict[str, Metric]]:
        self._check(batch)
        current_BS = jax.lax.stop_gradient(logprobs_BS)
        sampled_BS = (batch.weights if batch.from_policy is None else batch.from_policy) > 0
        counted_BS = sampled_BS & (batch.weights > 0)

        def of_policy(recorded_BS: Array | None) -> Array:
            """What was recorded; where nothing was, the current value: differences are then 0."""
            if recorded_BS is None:
                return current_BS
            return jnp.where(sampled_BS, recorded_BS, current_BS)

        old_BS = of_policy(batch.old_logprobs)
        sampler_BS = of_policy(batch.sampler_logprobs)
        advantage_BS = jnp.asarray(batch.advantages)
        advantage_BS *= jnp.where(advantage_BS < 0, self.negative_scale, 1.0)

        ratio_BS = jnp.exp(logprobs_BS - old_BS)
        clipped_BS = jnp.clip(ratio_BS, 1 - self.clip_low, 1 + self.clip_high)
        surrogate_BS = jnp.minimum(ratio_BS * advantage_BS, clipped_BS * advantage_BS)
        difference_BS = jnp.abs(current_BS - sampler_BS)
        metrics: dict[str, Metric] = {
            "entropy": _mean(entropy_BS, batch.weights > 0),
            "policy_entropy": _mean(entropy_BS, counted_BS),
            "ratio": _mean(ratio_BS, counted_BS),
            "clip_fraction": _mean(surrogate_BS < ratio_BS * advantage_BS, counted_BS),
            "sampler_difference": _mean(difference_BS, counted_BS),
            "sampler_difference_max": Max(jnp.max(difference_BS, where=counted_BS, initial=0)),
        }
        if self.importance_cap is not None:
            importance_BS = jnp.minimum(jnp.exp(old_BS - sampler_BS), self.importance_cap)
            surrogate_BS *= importance_BS
            metrics["importance"] = _mean(importance_BS, counted_BS)
        values_BS = -surrogate_BS
        if batch.reference_logprobs is not None:
            log_q_BS = of_policy(batch.reference_logprobs) - logprobs_BS
            k3_BS = jnp.exp(log_q_BS) - log_q_BS - 1
            values_BS += self.kl_coefficient * k3_BS
            metrics["kl"] = _mean(k3_BS, counted_BS)
        return jnp.where(sampled_BS, values_BS, -logprobs_BS), metrics

    def _check(self, batch: Batch) -> None:
        needed = {
            "advantages": True,
            "sampler_logprobs": self.importance_cap is not None,
            "reference_logprobs": self.kl_coefficient > 0,
        }
        for field, is_needed in needed.items():
            if is_needed and getattr(batch, field) is None:
                raise ValueError(
                    f"{self} needs batch.{field}, which is None: give it, or use another loss"
                )


def _mean(values_BS: Array, counted_BS: Array) -> Mean:
    values_BS = jax.lax.stop_gradient(values_BS).astype(jnp.float32)
    return Mean(jnp.sum(values_BS, where=counted_BS), jnp.sum(counted_BS, dtype=jnp.float32))
