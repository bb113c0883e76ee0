"""Calls one by one: which are asked for, and which turns count as right."""

import dataclasses
import types

import numpy as np
import pytest

from agentx.env.tasks.library import NEW_TOOL
from agentx.eval.calls import CallSuite, LibraryCalls, library_places
from agentx.render import ToolRenderer
from agentx.sample.engine import Turn
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Message, Outcome

BYTES = Tokenizer.bytes()
RENDERER = ToolRenderer(BYTES)
# Every second tool is cold, so that many calls have to be made again.
CONFIG = LibraryCalls(split="dev", num_questions=6, rate_cold=0.5, slip_rate=0.5, num_slots=4)


class Oracle:
    """Stands for an engine whose policy makes the expert's call, changed by `change`."""

    def __init__(self, change):
        self._change = change
        places = [*library_places(CONFIG, new_tool=False), *library_places(CONFIG, new_tool=True)]
        self._calls = {
            tuple(ids_of(p.messages, p.tools)): ids_of(
                [*p.messages, Message("assistant", tool_calls=(p.call,))], p.tools
            )
            for p in places
        }

    def complete(self, prompts, max_new_tokens):
        assert set(max_new_tokens) == {CONFIG.max_new_tokens}
        turns = [self._change(self._calls[tuple(p)][len(p) :]) for p in prompts]
        empty = np.zeros(0, np.float32)
        return [Turn(np.array(t, np.int32), empty, empty, "stop", 0) for t in turns]


def ids_of(messages, tools) -> list[int]:
    return [int(i) for span in RENDERER.render(messages, tools) for i in span.ids]


def test_the_places_are_the_experts_calls_that_worked():
    places = library_places(CONFIG, new_tool=False)
    assert places == library_places(CONFIG, new_tool=False)
    assert {p.outcome for p in places} == {Outcome.OK, Outcome.RECOVERED}
    for place in places:
        before = place.messages[-1]
        failed = before.role == "tool" and before.outcome is Outcome.FAILED
        assert failed == (place.outcome is Outcome.RECOVERED)
    # Two calls a question, and an answer, which is no place.
    assert len(places) == 2 * CONFIG.num_questions


def test_the_new_tool_stands_in_searchs_place():
    known, new = (library_places(CONFIG, new_tool=is_new) for is_new in (False, True))
    assert [p.call.name for p in known if p.call.name == "search"] == ["search"] * 6
    assert [p.call.name for p in new if p.call.name == NEW_TOOL.name] == [NEW_TOOL.name] * 6
    assert all(NEW_TOOL in p.tools for p in new)


def test_a_call_is_right_where_name_and_arguments_are_the_experts():
    suite = CallSuite(CONFIG, RENDERER)
    scores = suite.score(Oracle(lambda ids: ids))
    assert {name: s.value for name, s in scores.items()} == {
        "call": 1.0,
        "recovery": 1.0,
        "new_tool": 1.0,
    }
    assert scores["call"].total == 12
    assert 0 < scores["recovery"].total < 12
    assert scores["new_tool"].total == 6
    wrong = suite.score(Oracle(lambda ids: [*ids[:-1], 99, ids[-1]]))
    assert {s.value for s in wrong.values()} == {0.0}
    cut_off = suite.score(Oracle(lambda ids: ids[:-1]))
    assert {s.value for s in cut_off.values()} == {0.0}


def test_a_call_that_is_taken_back_does_not_count_against_the_next():
    back = BYTES.special["<|back|>"]
    suite = CallSuite(CONFIG, RENDERER)
    scores = suite.score(Oracle(lambda ids: [*ids[:-2], back, *ids]))
    assert {s.value for s in scores.values()} == {1.0}


def test_a_score_that_nothing_is_asked_for_is_left_out():
    nothing_goes_wrong = dataclasses.replace(CONFIG, rate_cold=0.0, slip_rate=0.0)
    suite = CallSuite(nothing_goes_wrong, RENDERER)
    turns = [Turn(np.zeros(0, np.int32), np.zeros(0), np.zeros(0), "stop", 0)] * 18
    silent = types.SimpleNamespace(complete=lambda prompts, budgets: turns[: len(prompts)])
    assert {name: s.value for name, s in suite.score(silent).items()} == {
        "call": 0.0,
        "new_tool": 0.0,
    }


def test_more_questions_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_questions is 1000000 but the dev split has"):
        library_places(dataclasses.replace(CONFIG, num_questions=10**6), new_tool=False)
    with pytest.raises(ValueError, match="num_slots is 0; it must be 1 or more"):
        LibraryCalls(num_slots=0)
    with pytest.raises(ValueError, match=r"LibraryCalls.seed is -1; it must be in \[0, 2\^31\)"):
        LibraryCalls(seed=-1)
