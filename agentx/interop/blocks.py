"""Our parameters as blocks of the tensors that hold them: for checkpoints larger than the memory.

A block is some rows of a tensor of theirs, turned into a part of ours. One is read at a time. A
safetensors file is opened for it and closed again, for a mapped file counts what was ever read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from agentx.interop.gguf import GGUFFile
from agentx.interop.tensors import Piece, Tensor

# What a block takes in our type, and so a chunk of a checkpoint; one row may be more.
BLOCK_BYTES = 16 * 2**20


# (first, stop) -> those rows of a tensor.
ReadRows = Callable[[int, int], np.ndarray]


class Part(NamedTuple):
    """A piece of a parameter, and what reads the tensor that holds it."""

    piece: Piece
    read_rows: ReadRows


def parts_of_folder(files: Mapping[str, tuple[Tensor, Path]]) -> dict[str, list[Part]]:
    """The parts of every parameter. files: each tensor and its file (see `tensor_files`)."""

    def rows(name: str, file: Path, first: int, stop: int) -> np.ndarray:
        with safe_open(file, framework="numpy") as opened:
            return opened.get_slice(name)[first:stop]

    return _parts(
        (tensor, functools.partial(rows, tensor.name, file)) for tensor, file in files.values()
    )


def parts_of_gguf(file: GGUFFile) -> dict[str, list[Part]]:
    """The parts of every parameter. A tensor is taken to f32 as a whole, one at a time."""
    whole = functools.lru_cache(maxsize=1)(file.as_huggingface)

    def rows(name: str, first: int, stop: int) -> np.ndarray:
        return whole(name)[first:stop]

    return _parts(
        (tensor, functools.partial(rows, tensor.name)) for tensor in file.tensors().values()
    )


def _parts(tensors: Iterable[tuple[Tensor, ReadRows]]) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {}
    for tensor, read_rows in tensors:
        for piece in tensor.pieces:
            parts.setdefault(piece.param, []).append(Part(piece, read_rows))
    return parts


def chunk_shape(piece: Piece, dtype: np.dtype) -> tuple[int, ...]:
    """The shape of a parameter's chunks: of one block, in the axes of the whole parameter."""
    axis, _ = _cut(piece)
    shape = [*piece.shape]
    row = math.prod(shape) // shape[axis] * dtype.itemsize
    if len(shape) > 1:
        shape[axis] = max(1, min(shape[axis], BLOCK_BYTES // row))
    return (*(1 for _ in piece.at), *shape)


def param_blocks(
    parts: list[Part], dtype: np.dtype, more_rows: int, on_bytes: Callable[[int], None]
) -> Iterator[tuple[tuple[int | slice, ...], np.ndarray]]:
    """Where each block of a parameter lies in it, and its numbers in `dtype`.

    more_rows: so many rows follow theirs on the first axis, for tokens that their vocabulary lacks.
    Such a row is drawn close to the mean of the others, in each column by a hundredth of their
    standard deviation, so that a new token begins no likelier than the others (Hewitt, 2021).
    on_bytes: told how many bytes a block had.
    """
    sums = np.zeros((2, *parts[0].piece.shape[1:]))
    for piece, read_rows in parts:
        axis, rows_each = _cut(piece)
        count = chunk_shape(piece, dtype)[len(piece.at) + axis]
        size = piece.shape[axis]
        for first in range(0, size, count):
            stop = min(first + count, size)
            rows = read_rows(first * rows_each, stop * rows_each)
            shape = (*piece.shape[:axis], stop - first, *piece.shape[axis + 1 :])
            theirs = piece._replace(shape=shape).of_theirs(rows)
            block = np.ascontiguousarray(theirs, dtype)
            if more_rows:
                wide = block.astype(np.float32)
                sums += [wide.sum(0), np.square(wide).sum(0)]
            del rows, theirs
            yield (*piece.at, *(slice(None),) * axis, slice(first, stop)), block
            on_bytes(block.nbytes)
    if more_rows:
        before = parts[0].piece.shape[0]
        mean, square = sums / before
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        noise = np.random.default_rng(0).standard_normal((more_rows, *mean.shape))
        block = (mean + 0.01 * deviation * noise).astype(dtype)
        yield (slice(before, before + more_rows),), block
        on_bytes(block.nbytes)


def _cut(piece: Piece) -> tuple[int, int]:
    """The axis of ours that their rows lie along, and how many of these an entry of it takes."""
    if piece.num_inputs is None:
        return 0, 1
    return piece.num_inputs, math.prod(piece.shape[piece.num_inputs + 1 :])
