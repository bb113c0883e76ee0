"""From a config to an optax transformation.

The learning rate warms up linearly and then stays, or decays over the rest of the run. Gradients
are clipped to a global norm. AdamW, or Muon for the layers' matrices with AdamW for the rest.

Parameters are `nnx.Variable`s with their axes' names: a matrix is one with two or more axes besides
`layers` and `experts`, so that a stack of vectors is not taken for one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

Array = jax.Array

# Axes along which parameters are stacked, and those that stand for the residual stream.
_STACKS = ("layers", "experts")
_RESIDUAL = ("embed", "expert_embed")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    name: "adamw" (Loshchilov and Hutter, 2019), or "muon" (Jordan, 2024) for the matrices of the
      layers and adamw for embeddings and norms.
    learning_rate: at its highest. warmup_steps: it rises linearly to there in so many steps.
    schedule: what it does after: stays, or falls to end_fraction of itself along half a cosine or a
      line, reached at the last step of the run.
    b1, b2, eps: Adam's. weight_decay: decoupled, of matrices alone (embeddings included).
    muon_momentum: of Muon. muon_rms: the root mean square of its updates at learning rate 1;
      AdamW's is about 0.2 (Liu et al., 2025, arXiv:2502.16982).
    max_grad_norm: gradients with a larger global norm are scaled down to it; None for never.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    end_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    muon_momentum: float = 0.95
    muon_rms: float = 0.2
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optimizer is {self.name!r}; choose adamw or muon")
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(f"schedule is {self.schedule!r}; choose constant, cosine or linear")
        if not self.learning_rate >= 0 or not math.isfinite(self.learning_rate):
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be 0 or more")
        if self.warmup_steps < 0 or not 0 <= self.end_fraction <= 1:
            raise ValueError(
                f"warmup_steps must be 0 or more and end_fraction in [0, 1], not "
                f"{self.warmup_steps} and {self.end_fraction}"
            )
        for field in ("b1", "b2", "muon_momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be in [0, 1)")
        if self.eps <= 0 or self.muon_rms <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"eps and muon_rms must be above 0 and weight_decay 0 or more, not {self.eps}, "
                f"{self.muon_rms} and {self.weight_decay}"
            )
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm}; it must be above 0, or None for no limit"
            )


class Optimizer(NamedTuple):
    """transform: on trees of parameters. learning_rate: of the update that step number makes."""

    transform: optax.GradientTransformation
    learning_rate: optax.Schedule


def make_optimizer(config: OptimizerConfig, num_steps: int) -> Optimizer:
    """The optimizer of a run of `num_steps` steps."""
    schedule = make_schedule(config, num_steps)
    if config.name == "adamw":
        update = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: _map_variables(_is_matrix, params),
        )
    else:
        update = contrib.muon(
            schedule,
            beta=config.muon_momentum,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            muon_weight_dimension_numbers=lambda params: _map_variables(_muon_dims, params),
            consistent_rms=config.muon_rms,
        )
    if config.max_grad_norm is None:
        return Optimizer(update, schedule)
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    return Optimizer(optax.chain(clip, update), schedule)


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate f32[] of step i32[], counted from 0.

    Raises ValueError where the warm-up is longer than the run.
    """
    if config.warmup_steps > num_steps:
        raise ValueError(
            f"warmup_steps is {config.warmup_steps}, more than the {num_steps} steps of the run"
        )

    def learning_rate(step: Array) -> Array:
        # The first step has a rate above 0 and step number `warmup_steps` has the highest.
        warmup = jnp.minimum(1.0, (step + 1) / (config.warmup_steps + 1))
        done = jnp.clip(
            (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps), 0.0, 1.0
        )
        left = {
            "constant": jnp.ones_like(done),
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "linear": 1 - done,
        }[config.schedule]
        return (
            config.learning_rate * warmup * (config.end_fraction + (1 - config.end_fraction) * left)
        )

    return learning_rate


def _is_matrix(axes: tuple[str, ...]) -> bool:
    return len([axis for axis in axes if axis not in _STACKS]) >= 2


def _muon_dims(axes: tuple[str, ...]) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a stack of matrices go in and which come out; None for Adam's parameters.

    What a product reads or writes is the residual stream, `embed` or `expert_embed`, on one side.
    """
    if "layers" not in axes or not _is_matrix(axes):
        return None
    (embed,) = (i for i, axis in enumerate(axes) if axis in _RESIDUAL)
    rest = tuple(i for i, axis in enumerate(axes) if axis not in (*_STACKS, *_RESIDUAL))
    is_inwards = embed < rest[0]
    return contrib.MuonDimensionNumbers(*((embed,), rest) if is_inwards else (rest, (embed,)))


def _map_variables(function: Any, params: Any) -> Any:
    """`params` with, in each variable, `function` of its axes in place of its array.

    optax masks parameters by putting a MaskedNode into the variable; those stay as they are.
    """
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    variables = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    values, structure = jax.tree.flatten(params, is_leaf=is_masked)
    assert len(variables) == len(values)
    mapped = [
        value if is_masked(value) else function(variable.get_metadata("axes"))
        for variable, value in zip(variables, values, strict=True)
    ]
    return jax.tree.unflatten(structure, mapped)
