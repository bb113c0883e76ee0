"""Objectives by share of training, alone and within others."""

import re

import pytest
from rows import assert_shown_in, one_call, table

from agentx.data.objectives import (
    InfillCall,
    Mixture,
    NextToken,
    PlainText,
    Schedule,
    ToolChoice,
    ToolRename,
    TraceAugment,
)
from agentx.trajectory import Trajectory

EARLY, LATE = PlainText(), NextToken(observation=0.5)
TWO = Schedule((EARLY, LATE), until=(0.9, 1.0))


def test_schedule_shows_what_its_docstring_shows():
    call = Trajectory(one_call().spans[:3])
    early = table(TWO.at(0.0)(call, 0, 0, 0), ("token", "role", "weight"), (8,))
    late = table(TWO.at(0.9)(call, 0, 0, 0), ("token", "role", "weight"), (8,))
    assert early[2] != late[2]
    assert_shown_in(Schedule.__doc__, early + late)


def test_an_objective_stands_up_to_its_share_of_training():
    three = Schedule((EARLY, LATE, InfillCall(1.0)), until=(0.25, 0.5, 1.0))
    at = {progress: three.at(progress) for progress in (0.0, 0.2499, 0.25, 0.4999, 0.5, 0.9999)}
    assert list(at.values()) == [EARLY, EARLY, LATE, LATE, InfillCall(1.0), InfillCall(1.0)]


def test_the_room_is_that_of_the_part_that_needs_most():
    assert TWO.room(one_call()) == 0
    assert Schedule((EARLY, InfillCall(1.0)), until=(0.5, 1.0)).room(one_call()) == 4


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda inner: ToolRename("t", base=inner), "ToolRename.base"),
        (lambda inner: ToolChoice("t", "p", base=inner), "ToolChoice.base"),
        (lambda inner: TraceAugment("s", 0.5, base=inner), "TraceAugment.base"),
        (lambda inner: Mixture((LATE, inner), (0.5, 0.5)), "Mixture.objectives"),
        (lambda inner: Schedule((inner, LATE), until=(0.5, 1.0)), "Schedule.objectives"),
    ],
)
def test_a_schedule_within_another_objective_is_refused(wrap, place):
    sentence = f"{place} holds a Schedule, which can only stand outermost: let its parts hold what"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        wrap(TWO)
    assert not hasattr(wrap(EARLY), "at") or isinstance(wrap(EARLY), Schedule)


def test_a_schedule_is_not_called_without_a_moment():
    with pytest.raises(AssertionError, match="a Schedule has no moment"):
        TWO(one_call(), 0, 0, 0)
    with pytest.raises(AssertionError):
        TWO.at(1.0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Schedule((EARLY,), (0.5, 1.0)), "a Schedule of 1 objectives has 2 ends"),
        (lambda: Schedule((), ()), "a Schedule of 0 objectives has 0 ends"),
        (lambda: Schedule((EARLY, LATE), (0.5, 0.9)), "must grow from above 0 up to 1"),
        (lambda: Schedule((EARLY, LATE), (1.0, 1.0)), "a share of training each, got (1.0, 1.0)"),
        (lambda: Schedule((EARLY, LATE), (0.0, 1.0)), "must grow from above 0 up to 1"),
    ],
)
def test_wrong_settings_are_named_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()
