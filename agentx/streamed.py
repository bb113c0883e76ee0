"""Arrays that a checkpoint saves piece by piece, so that no array ever lies in memory whole.

A tree of `StreamedArray` is saved by `CheckpointStore(directory, types=STREAMED)`. What is written
is what Orbax writes of a numpy array, but for the chunks, which are those that the array says.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

# Blocks that are compressed and written while the next one is made.
_UNDER_WAY = 3

# Where in an array a piece lies, and its numbers.
Blocks = Iterator[tuple[tuple[int | slice, ...], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array that is written as its blocks are made.

    shape, dtype: of all of it. chunks: the shape in which it is stored; a block that covers whole
    chunks is written without one being read. blocks: called once, in a thread of Orbax; yields
    where each block lies and the block, of `dtype`. The blocks have to cover the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    blocks: Callable[[], Blocks]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes streamed arrays one after the other, a few blocks ahead of the disk.

    It is a numpy array that a checkpoint then holds, and that is read as one.
    """

    async def serialize(
        self,
        values: Sequence[StreamedArray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[ocp.future.Future]:
        written = self._write_all(values, infos)
        return [ocp.future.CommitFutureAwaitingContractedSignals(written, name="streamed arrays")]

    async def _write_all(self, values: Sequence[StreamedArray], infos: Sequence[Any]) -> None:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=value.shape,
                local_shape=value.chunks,
                dtype=value.dtype,
                process_index=0,
            )
            store = await tensorstore.open(
                tensorstore.Spec(spec), create=True, open=True, context=info.ts_context
            )
            under_way: collections.deque[Any] = collections.deque()
            for at, block in value.blocks():
                if len(under_way) == _UNDER_WAY:
                    await _written(under_way.popleft())
                under_way.append(
                    store[at].write(block, can_reference_source_data_indefinitely=True)
                )
            for write in under_way:
                await _written(write)


async def _written(write: Any) -> None:
    try:
        await write
    except ValueError as error:  # what tensorstore raises, whatever went wrong
        reason = str(error).rsplit(": ", 1)[-1]
        raise OSError(f"a block could not be written, the disk may be full: {reason}") from None


# What Orbax may meet in a tree that is streamed.
STREAMED = ocp.type_handlers.create_type_handler_registry((StreamedArray, _Handler()))
