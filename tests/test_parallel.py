"""Encoding over processes gives what one process gives, and says which document went wrong."""

import functools
import multiprocessing
import os
import time

import pytest

import agentx.data.parallel as parallel
from agentx.data.formats import Conversation, TextDocument, text_trajectory
from agentx.data.parallel import encode_parallel
from agentx.data.prepare import Numbered
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Message, ToolCall

DOCUMENTS = [TextDocument(f"d{i}", f"text {i} of \u2581 many\n" * (i % 7 + 1)) for i in range(60)]
MAKE = functools.partial(text_trajectory, tokenizer=Tokenizer.bytes())


def misbehave(document: TextDocument) -> int:
    if document.name == "d7":
        what = document.text
        if what == "refuse":
            raise ValueError("it is empty")
        if what == "fail":
            raise KeyError("x")
        if what == "die":
            os._exit(9)
        if what == "hang":
            time.sleep(600)
    return len(document.text)


def with_d7(text: str) -> list[TextDocument]:
    return [TextDocument(f"d{i}", text if i == 7 else "a") for i in range(20)]


def test_several_processes_make_what_one_makes_in_the_same_order(monkeypatch):
    monkeypatch.setattr(parallel, "_DOCUMENTS", 8)
    asked = []

    def documents():
        for document in DOCUMENTS:
            asked.append(document)
            yield document

    results = encode_parallel(documents(), MAKE, 2)
    first = next(results)
    assert len(asked) <= 3 * 8  # one batch a worker, and the one at hand
    found = [first, *results]
    expected = [MAKE(document) for document in DOCUMENTS]
    assert [t.task_id for t in found] == [t.task_id for t in expected]
    assert all((a.ids == b.ids).all() for a, b in zip(found, expected, strict=True))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_error_names_the_document(num_processes):
    with pytest.raises(ValueError, match=r"^d7: it is empty$"):
        list(encode_parallel(with_d7("refuse"), misbehave, num_processes))


def test_a_mistake_of_ours_keeps_its_traceback_and_names_the_document():
    with pytest.raises(KeyError) as caught:
        list(encode_parallel(with_d7("fail"), misbehave, 1))
    assert caught.value.__notes__ == ["at the document d7"]
    assert caught.traceback[-1].name == "misbehave"
    with pytest.raises(RuntimeError) as caught:
        list(encode_parallel(with_d7("fail"), misbehave, 2))
    assert str(caught.value) == "d7: KeyError: 'x'"
    assert 'raise KeyError("x")' in caught.value.__notes__[0]


def test_a_worker_that_dies_or_hangs_is_noticed(monkeypatch):
    monkeypatch.setattr(parallel, "_DOCUMENTS", 4)
    with pytest.raises(RuntimeError, match="a worker died at the 4 documents from d4 to d7"):
        list(encode_parallel(with_d7("die"), misbehave, 2))
    monkeypatch.setattr(parallel, "_DOCUMENTS", 1)
    hangs = [TextDocument("d6", "abc"), TextDocument("d7", "hang")]
    results = encode_parallel(hangs, misbehave, 2, timeout_s=0.5)
    assert next(results) == 3
    with pytest.raises(TimeoutError, match=r"no answer in 0\.5 s to the document d7"):
        next(results)
    assert multiprocessing.active_children() == []


class Stuck:
    """A function that a worker never gets to hold."""

    def __reduce__(self):
        return time.sleep, (600,)


def test_a_worker_that_does_not_start_is_noticed(monkeypatch):
    monkeypatch.setattr(parallel, "_SECONDS_TO_START", 0.2)
    # More than a pipe takes that nobody reads.
    documents = [TextDocument(f"d{i}", "a" * 1_000_000) for i in range(2)]
    with pytest.raises(TimeoutError, match=r"did not start in 0\.2 s, before the document d0"):
        list(encode_parallel(documents, Stuck(), 2))
    assert multiprocessing.active_children() == []


def test_batches_end_where_their_documents_are_long_and_not_for_their_number():
    talk = Conversation((Message("user", "x" * (1 << 18)),))
    call = Message("assistant", "abc", tool_calls=(ToolCall("f", {"a": "x" * 5, "b": 10}),))
    short = Conversation((call,))
    assert short.num_characters == 3 + 5 + 2
    documents = [Numbered((0, i), d, False) for i, d in enumerate([talk, talk, *[short] * 300])]
    assert [len(batch) for batch in parallel._batches(documents)] == [1, 1, 300]


def test_no_processes_are_refused_and_no_documents_are_no_results():
    with pytest.raises(ValueError, match="num_processes is 0; it must be at least 1"):
        next(encode_parallel(DOCUMENTS, MAKE, 0))
    assert list(encode_parallel([], MAKE, 2)) == []
