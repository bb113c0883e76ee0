"""Tensors of a family's checkpoint, and the parts of our parameters that they are.

Ours are [in, ..., out, ...] and stacked over the layers of a place, and over experts; theirs are
nn.Linear's [out, in], one a layer, and one an expert. `Tensor` says which part of which parameter
a tensor holds, and takes it there and back, bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from agentx.interop.families import Family, Row
from agentx.model.config import ModelConfig
from agentx.model.transformer import abstract_transformer


class Piece(NamedTuple):
    """A part of one of our parameters: param[at], of `shape`. The rest is as in `Row`."""

    param: str
    at: tuple[int, ...]
    shape: tuple[int, ...]
    num_inputs: int | None
    every_other: int | None

    def of_theirs(self, tensor: np.ndarray) -> np.ndarray:
        """[*shape], from the tensor that holds it; a view where that is possible."""
        if self.every_other is not None:
            tensor = tensor[..., self.every_other :: 2]
        return tensor if self.num_inputs is None else tensor.T.reshape(self.shape)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """The reverse of `of_theirs`, of one piece."""
        if self.num_inputs is None:
            return ours
        if not self.num_inputs:
            return ours.reshape(-1)
        return ours.reshape(math.prod(self.shape[: self.num_inputs]), -1).T


class Tensor(NamedTuple):
    """A tensor of theirs: its name and shape, and what it holds of ours."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def joined(self, arrays: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
        """The tensor from our parameters, which are fetched from devices piece by piece."""
        parts = [p.to_theirs(np.asarray(arrays[p.param][p.at])) for p in self.pieces]
        if len(parts) == 1:
            # safetensors writes memory as it lies, whatever the strides say.
            return np.ascontiguousarray(parts[0].astype(dtype))
        tensor = np.empty(self.shape, dtype)
        for piece, part in zip(self.pieces, parts, strict=True):
            tensor[..., piece.every_other :: 2] = part
        return tensor


@functools.cache
def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of our parameters, by its path."""
    params = flatten_params(nnx.state(abstract_transformer(config)))
    return {name: leaf.shape for name, leaf in params.items()}


def flatten_params(params: Any) -> dict[str, Any]:
    """A tree of parameters as a flat dict: {"layers.0.attention.w_q": array, ...}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {
        name.removesuffix(".value"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)
    }


def family_tensors(family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """All tensors of a checkpoint of this config, by name, in the order of layers.

    Every parameter is in one of them: the tables are checked for it.
    """
    shapes = param_shapes(config)
    unread = set(shapes)
    pieces: dict[str, list[Piece]] = {}
    for row in family.rows:
        for param, layers in _params_of(row, config):
            if param not in shapes:
                continue
            unread.discard(param)
            for name, index in _names(row, layers, shapes[param]):
                shape = shapes[param][len(index) :]
                piece = Piece(param, index, shape, row.num_inputs, row.every_other)
                pieces.setdefault(name, []).append(piece)
    assert not unread, f"{family.model_type} has no row for {sorted(unread)}"
    tensors = [Tensor(name, _their_shape(of), tuple(of)) for name, of in pieces.items()]
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda x: _natural(x.name))}


def _params_of(row: Row, config: ModelConfig) -> list[tuple[str, range]]:
    """The parameters that a row names, one a place, and the layers that each is stacked over."""
    if "{layer}" not in row.theirs:
        return [(row.ours, range(0))]
    rest = row.ours.removeprefix("layers.")
    return [(f"layers.{at}.{rest}", place.layers) for at, place in enumerate(config.places)]


def _names(row: Row, layers: range, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors of one parameter, and where in it each lies."""
    if not layers:
        return [(row.theirs, ())]
    if "{expert}" not in row.theirs:
        return [(row.theirs.format(layer=layer), (at,)) for at, layer in enumerate(layers)]
    return [
        (row.theirs.format(layer=layer, expert=expert), (at, expert))
        for at, layer in enumerate(layers)
        for expert in range(shape[1])
    ]


def _their_shape(pieces: list[Piece]) -> tuple[int, ...]:
    shape, num_inputs = pieces[0].shape, pieces[0].num_inputs
    if num_inputs is not None:
        outputs, inputs = math.prod(shape[num_inputs:]), math.prod(shape[:num_inputs])
        shape = (outputs, inputs) if num_inputs else (outputs,)
    return (*shape[:-1], shape[-1] * len(pieces))


def _natural(name: str) -> list[Any]:
    """Numbers within a name in the order of numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
