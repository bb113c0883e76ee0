"""LoRA: a model that learns by thin additions to weights that stay as they are (Hu et al., 2021).

Beside a frozen weight w stand a [*inputs, R] and b [R, *outputs], in f32 whatever w is kept in; the
layer computes x w + (alpha / R) (x a) b. b begins as zeros, so the model begins as its base.

`adapted` puts an `Adapted` in the place of each weight that is named. To the layers it looks like
the parameter that it was (`parts.LowRank`); to nnx a and b are variables of a type of their own, by
which `split_trained` tells what a step changes from what it only reads.

Legend: R rank of an adapter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from agentx.model.parts import LowRank, merged
from agentx.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights of the layers have adapters, and of what size.

    rank: R. alpha: what adapters add is multiplied by alpha / rank. targets: regular expressions;
    a weight has an adapter where one of them is the whole of its name within a layer, such as
    "attention.w_q", "mlp.w_(gate|up)" or "moe.experts.w_down", of which each expert has its own.

    Raises ValueError where a number is not positive, or a target is no regular expression.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoraConfig.rank is {self.rank}; it must be 1 or more")
        if not self.alpha > 0 or not math.isfinite(self.alpha):
            raise ValueError(f"LoraConfig.alpha is {self.alpha}; it must be above 0")
        if not self.targets:
            raise ValueError('LoraConfig.targets is empty; give names such as "attention.w_q"')
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(
                    f"LoraConfig.targets: {target!r} is no regular expression: {error}"
                ) from None


class Adapter(nnx.Param):
    """a or b of an `Adapted`: what is trained of a model that has any."""


class Adapted(nnx.Module):
    """A weight, stacked over layers, and its adapter, in the place of the weight alone.

    w: the parameter, which stays. a: [layers, *inputs, R]. b: [layers, R, *outputs]. Both are born
    abstract; see `init_adapters`. Of experts all are stacked over these too, next to the layers.
    """

    def __init__(self, w: nnx.Param, lora: LoraConfig):
        num_inputs, axes = w.get_metadata("num_inputs"), w.get_metadata("axes")
        num_stacked = _num_stacked(w)
        inputs = slice(num_stacked, num_stacked + num_inputs)
        outputs = slice(num_stacked + num_inputs, None)
        shape, stacked = w.shape[:num_stacked], axes[:num_stacked]
        self.scale = lora.alpha / lora.rank
        self.w = w
        self.a = Adapter(
            jax.ShapeDtypeStruct((*shape, *w.shape[inputs], lora.rank), jnp.float32),
            axes=(*stacked, *axes[inputs], "rank"),
            num_inputs=num_inputs,
        )
        self.b = Adapter(
            jax.ShapeDtypeStruct((*shape, lora.rank, *w.shape[outputs]), jnp.float32),
            axes=(*stacked, "rank", *axes[outputs]),
            num_inputs=1,
        )

    def __getitem__(self, index: Any) -> LowRank:
        """As of a parameter: `[...]`, and `[layer]` before it is merged into one layer."""
        return LowRank(self.w[index], self.a[index], self.b[index], self.scale)

    def get_metadata(self, name: str) -> Any:
        """As of a parameter: the weight's."""
        return self.w.get_metadata(name)


def adapted(model: Transformer, lora: LoraConfig) -> Transformer:
    """A model like this one, whose weights that `lora` names have adapters; these are abstract.

    Raises ValueError where a target names nothing.
    """
    model = nnx.merge(*nnx.split(model))
    linears = {".".join(path) for layer in model.layers for path in _linears(layer)}
    for target in lora.targets:
        if not any(re.fullmatch(target, name) for name in linears):
            raise ValueError(
                f"LoraConfig.targets has {target!r}, which is no weight of the model; its layers "
                f"have {', '.join(sorted(linears))}"
            )
    for layer in model.layers:
        for path in _linears(layer):
            if any(re.fullmatch(target, ".".join(path)) for target in lora.targets):
                _put(layer, path, Adapted(_get(layer, path), lora))
    return model


def split_trained(model: Transformer) -> tuple[Any, ...]:
    """(graphdef, params, *frozen): nnx.split by what a step changes and what it only reads.

    params: the adapters, and frozen all else, one state; of a model without any, params is all and
    there is no frozen.
    """
    graphdef, adapters, others = nnx.split(model, Adapter, ...)  # type: ignore[misc]
    return (graphdef, adapters, others) if adapters else (graphdef, others)


def init_adapters(model: Transformer, key: jax.Array) -> nnx.State:
    """Fresh adapters of a model that has them, abstract. The values depend on the key alone.

    a is random with PEFT's variance, 1 / (3 inputs); b is 0.
    """
    adapters = nnx.to_flat_state(nnx.state(model, Adapter))
    fresh = []
    for number, (path, adapter) in enumerate(adapters):
        value = jnp.zeros(adapter.shape, adapter.dtype)
        if path[-1] == "a":
            first = -1 - adapter.get_metadata("num_inputs")
            deviation = (3 * math.prod(adapter.shape[first:-1])) ** -0.5
            drawn = jax.random.normal(jax.random.fold_in(key, number), adapter.shape, adapter.dtype)
            value = deviation * drawn
        fresh.append((path, adapter.replace(value)))
    return nnx.from_flat_state(fresh)


def merged_params(model: Transformer) -> nnx.State:
    """The parameters of a model with adapters as those of one without: see `parts.merged`."""
    model = nnx.merge(*nnx.split(model))
    for layer in model.layers:
        found = [(path, m) for path, m in nnx.iter_modules(layer) if isinstance(m, Adapted)]
        for path, weight in found:
            num_inputs = weight.w.get_metadata("num_inputs")
            whole = merged(weight[...], num_inputs, num_stacked=_num_stacked(weight.w))
            _put(layer, tuple(map(str, path)), weight.w.replace(whole))
    return nnx.state(model)


def _num_stacked(w: nnx.Param) -> int:
    """Over how many axes a weight is a stack of weights: layers, and experts."""
    return sum(axis in ("layers", "experts") for axis in w.get_metadata("axes"))


def _linears(layer: nnx.Module) -> list[tuple[str, ...]]:
    """The paths of a layer's weights that products take."""
    parameters = nnx.to_flat_state(nnx.state(layer))
    return [tuple(map(str, path)) for path, w in parameters if w.get_metadata("num_inputs")]


def _get(module: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(getattr, path, module)


def _put(layer: nnx.Module, path: tuple[str, ...], weight: Any) -> None:
    setattr(_get(layer, path[:-1]), path[-1], weight)
