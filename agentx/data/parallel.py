"""A function of documents, over several processes, in order.

Each worker is a fresh process with its own copy of `function`, and with it of the tokenizer.
It is given a batch of documents at a time, and the workers take turns: so results come in the order
of the documents, and no more than one batch a worker is in memory. What goes over the pipes was
made by this process and its workers; nothing is read from a file.
"""

from __future__ import annotations

import itertools
import multiprocessing
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

_CHARACTERS = 1 << 18  # in a batch: enough that the pipe costs little
_DOCUMENTS = 1024
_SECONDS_TO_START = 120.0
_SECONDS_TO_STOP = 5.0
_READY = "ready"


class Sized(Protocol):
    """A document: whatever it holds, errors call it by its name, and batches go by its size."""

    @property
    def name(self) -> str: ...

    @property
    def num_characters(self) -> int: ...


D = TypeVar("D", bound=Sized)
R = TypeVar("R")


def encode_parallel(
    documents: Iterable[D],
    function: Callable[[D], R],
    num_processes: int,
    *,
    timeout_s: float = 600.0,
) -> Iterator[R]:
    """`function` of every document, in their order.

    function: one that can be pickled, such as
      functools.partial(text_trajectory, tokenizer=tokenizer).
    num_processes: 1 works in this process, and then nothing is timed out.
    timeout_s: of one batch, of up to 1,024 documents or about 262,144 characters.
    Raises ValueError with the name of the document where `function` raises one. Any other exception
    is a mistake of ours: it is raised as it is from this process, and from a worker as a
    RuntimeError, with the document and the worker's traceback in its notes. Raises RuntimeError for
    a worker that died, and TimeoutError for one that does not start or answer. The workers are
    ended with the iterator.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}; it must be at least 1")
    if num_processes == 1:
        for document in documents:
            yield _named(function, document)
        return
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[Any, Connection]] = []
    waiting: deque[tuple[Connection, list[D]]] = deque()
    try:
        batches = _batches(documents)
        first = list(itertools.islice(batches, num_processes))
        for _ in first:  # all of them, and then wait: they start side by side
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, function), daemon=True)
            worker.start()
            theirs.close()  # ours alone is left, so that a death is seen
            workers.append((worker, ours))
        for (_, ours), batch in zip(workers, first, strict=True):
            _await_ready(ours, batch)
            _send(ours, batch)
            waiting.append((ours, batch))
        del first
        for batch in batches:
            ours = waiting[0][0]
            yield from _answer(*waiting.popleft(), timeout_s)
            _send(ours, batch)
            waiting.append((ours, batch))
        while waiting:
            yield from _answer(*waiting.popleft(), timeout_s)
    finally:
        for worker, ours in workers:
            ours.close()
            worker.terminate()
        for worker, _ in workers:
            worker.join(_SECONDS_TO_STOP)
            if worker.is_alive():
                worker.kill()
                worker.join()


def _batches(documents: Iterable[D]) -> Iterator[list[D]]:
    batch: list[D] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_characters
        if size >= _CHARACTERS or len(batch) == _DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _work(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """A worker: batches in, their results out, up to an error, and that error or None."""
    pipe.send(_READY)
    while True:
        try:
            batch = pipe.recv()
        except EOFError:
            return
        results: list[Any] = []
        failure: Exception | None = None
        try:
            for document in batch:
                results.append(_named(function, document))
        except ValueError as error:
            failure = ValueError(str(error))  # one of a kind of its own might not be pickled
        except Exception as error:
            failure = RuntimeError(f"{document.name}: {type(error).__name__}: {error}")
            failure.add_note(traceback.format_exc())
        pipe.send((results, failure))


def _named(function: Callable[[D], R], document: D) -> R:
    """The function of a document; an error has the document's name."""
    try:
        return function(document)
    except ValueError as error:
        raise ValueError(f"{document.name}: {error}") from error
    except Exception as error:
        error.add_note(f"at the document {document.name}")
        raise


def _await_ready(pipe: Connection, batch: list[Any]) -> None:
    """Waits until a worker has started: a pipe that nobody reads would take no batch, for ever."""
    if not pipe.poll(_SECONDS_TO_START):
        raise TimeoutError(
            f"a worker did not start in {_SECONDS_TO_START:g} s, before {_place(batch)}"
        )
    try:
        assert pipe.recv() == _READY
    except (EOFError, ConnectionResetError):
        raise RuntimeError(f"a worker died before {_place(batch)}") from None


def _send(pipe: Connection, batch: list[Any]) -> None:
    try:
        pipe.send(batch)
    except (BrokenPipeError, ConnectionResetError):
        raise RuntimeError(f"a worker died before {_place(batch)}") from None


def _answer(pipe: Connection, batch: list[Any], timeout_s: float) -> Iterator[Any]:
    if not pipe.poll(timeout_s):
        raise TimeoutError(f"there is no answer in {timeout_s:g} s to {_place(batch)}")
    try:
        results, failure = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise RuntimeError(f"a worker died at {_place(batch)}: was it out of memory?") from None
    yield from results
    if failure is not None:
        raise failure


def _place(batch: list[Any]) -> str:
    if len(batch) == 1:
        return f"the document {batch[0].name}"
    return f"the {len(batch)} documents from {batch[0].name} to {batch[-1].name}"
