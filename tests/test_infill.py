"""A call, its name or its arguments, or a plan, moved to the end to be filled in."""

import dataclasses
import re

import pytest
from rows import WORDS, assert_shown_in, one_call, recovery, span, table, words

from agentx.data.objectives import InfillCall, InfillPlan, NextToken
from agentx.trajectory import Outcome, Role, Trajectory


def planned():
    return Trajectory(
        [
            span(Role.USER, "<|bos|> <|user|> go"),
            span(Role.THOUGHT, "<|thought|> os"),
            span(Role.CALL, "<|call|> ls"),
            span(Role.ARGUMENTS, "<|arguments|> x <|end|>"),
            span(Role.OBSERVATION, "<|observation|> . <|end|>"),
            span(Role.ANSWER, "<|answer|> 2 <|end|>"),
        ]
    )


def only(cut, **fields):
    return InfillCall(rate=1.0, **{"whole": 0.0, "name": 0.0, "arguments": 0.0, cut: 1.0}, **fields)


def only_plan(cut, **fields):
    return InfillPlan(rate=1.0, **{"thought": 0.0, "steps": 0.0, cut: 1.0}, **fields)


@pytest.mark.parametrize(
    ("cut", "columns"), [("name", (5, 7, 3)), ("arguments", (7, 5, 3)), ("whole", (4, 4, 6))]
)
def test_infill_call_shows_what_its_docstring_shows(cut, columns):
    example = only(cut)(one_call(), 0, 0, 0)
    assert_shown_in(InfillCall.__doc__, table(example, ("token", "weight"), columns))


def test_infill_call_moves_the_name_to_the_end():
    example = only("name")(one_call(), 0, 0, 0)
    assert words(example) == (
        "<|bos|> <|fim_prefix|> <|user|> go <|call|> <|fim_suffix|> <|arguments|> x <|end|> "
        "<|answer|> 2 <|end|> <|fim_middle|> ls <|end|>"
    )
    assert example.weights.tolist() == [0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1]
    user, call, arguments, answer = Role.USER, Role.CALL, Role.ARGUMENTS, Role.ANSWER
    roles = [user] * 4 + [call] + [arguments] * 4 + [answer] * 3 + [call] * 3
    assert example.roles.tolist() == roles


def test_context_scales_everything_but_the_middle():
    example = only("arguments", context=0.25)(one_call(), 0, 0, 0)
    assert words(example).endswith("<|fim_middle|> x <|end|>")
    assert example.weights.tolist() == [0, 0, 0, 0, 0.25, 0.25, 0.25, 0, *[0.25] * 4, 0, 1, 1]


def test_infilling_keeps_every_token_and_adds_its_markers():
    before = one_call().ids.tolist()
    for cut, added in (("whole", 3), ("name", 4), ("arguments", 4)):
        after = only(cut)(one_call(), 0, 0, 0).ids.tolist()
        markers = [WORDS.index(f"<|fim_{m}|>") for m in ("prefix", "suffix", "middle")]
        extra = [WORDS.index("<|end|>")] if added == 4 else []
        assert sorted(after) == sorted(before + markers + extra)
        assert len(after) - len(before) <= only(cut).room(one_call())


def test_a_failed_call_is_not_cut_unless_it_is_trained():
    failed = Trajectory(recovery().spans[:4])
    assert only("whole").room(failed) == 0
    assert words(only("whole")(failed, 0, 0, 0)) == words(NextToken()(failed, 0, 0, 0))
    trained = only("whole", base=NextToken(failed=1.0))
    assert words(trained(failed, 0, 0, 0)).endswith("<|call|> ls <|arguments|> x <|end|>")


def test_a_call_whose_beginning_is_in_another_piece_is_not_cut():
    spans = one_call().spans
    name_only = dataclasses.replace(spans[1], ids=spans[1].ids[1:])
    assert only("whole").room(Trajectory([name_only, *spans[2:]])) == 0


def test_a_call_at_the_end_leaves_an_empty_suffix():
    example = only("whole")(Trajectory(one_call().spans[:3]), 0, 0, 0)
    assert words(example) == (
        "<|bos|> <|fim_prefix|> <|user|> go <|fim_suffix|> "
        "<|fim_middle|> <|call|> ls <|arguments|> x <|end|>"
    )


def test_the_rate_is_the_share_of_rearranged_documents():
    objective = InfillCall(rate=0.3)
    changed = sum(len(objective(one_call(), 7, 0, i)) > 11 for i in range(2000))
    assert changed == pytest.approx(600, abs=75)


def test_the_three_cuts_are_taken_as_often_as_asked():
    objective = InfillCall(rate=1.0, whole=2.0, name=1.0, arguments=1.0)
    ends = [words(objective(one_call(), 7, 0, i)) for i in range(2000)]
    assert sum(e.endswith("<|fim_middle|> ls <|end|>") for e in ends) == pytest.approx(500, abs=80)
    assert sum(e.endswith("<|fim_middle|> x <|end|>") for e in ends) == pytest.approx(500, abs=80)


def test_every_call_of_a_trajectory_is_cut_in_its_turn():
    objective = only("whole", base=NextToken(failed=1.0))
    ends = {
        words(objective(recovery(), 0, epoch, 3)).split("<|fim_middle|> ")[1] for epoch in range(20)
    }
    assert ends == {"<|call|> ls <|arguments|> x <|end|>", "<|call|> ls <|arguments|> . <|end|>"}


@pytest.mark.parametrize(("cut", "columns"), [("thought", (4, 6, 6, 4)), ("steps", (6, 4, 6, 4))])
def test_infill_plan_shows_what_its_docstring_shows(cut, columns):
    example = only_plan(cut)(planned(), 0, 0, 0)
    assert_shown_in(InfillPlan.__doc__, table(example, ("token", "weight"), columns))
    assert sum(columns) == len(planned()) + 4


def test_steps_go_on_to_the_next_thought_user_or_answer():
    spans = planned().spans
    twice = Trajectory([*spans[:5], *spans[1:]])
    middles = {
        words(only_plan("steps")(twice, 0, 0, i)).split("<|fim_middle|> ")[1] for i in range(20)
    }
    assert middles == {"<|call|> ls <|arguments|> x <|end|> <|observation|> . <|end|> <|end|>"}
    more = Trajectory([*spans[:5], *spans[2:]])
    middle = words(only_plan("steps")(more, 0, 0, 0)).split("<|fim_middle|> ")[1]
    assert middle.count("<|call|>") == 2
    assert middle.endswith("<|end|> <|end|>")


def test_a_plan_keeps_every_token_and_adds_its_markers():
    before = planned().ids.tolist()
    added = [WORDS.index(f"<|{m}|>") for m in ("fim_prefix", "fim_suffix", "fim_middle", "end")]
    for cut in ("thought", "steps"):
        objective = only_plan(cut, context=0.5)
        example = objective(planned(), 0, 0, 0)
        assert sorted(example.ids.tolist()) == sorted(before + added)
        assert objective.room(planned()) == 4
        middle = example.ids.tolist().index(WORDS.index("<|fim_middle|>"))
        assert set(example.weights[:middle].tolist()) == {0.0, 0.5}
        assert set(example.weights[middle + 1 :].tolist()) <= {0.0, 1.0}


def test_what_is_not_trained_or_not_whole_is_no_plan_to_cut():
    spans = planned().spans
    failed = Trajectory(
        [spans[0], *(dataclasses.replace(s, outcome=Outcome.FAILED) for s in spans[1:5]), spans[5]]
    )
    without_marker = dataclasses.replace(spans[1], ids=spans[1].ids[1:])
    for trajectory in (
        failed,
        one_call(),
        Trajectory(spans[:2]),  # nothing comes of the thought
        Trajectory([without_marker, *spans[2:]]),
    ):
        objective = InfillPlan(rate=1.0)
        assert objective.room(trajectory) == 0
        example = objective(trajectory, 0, 0, 0)
        assert words(example) == words(NextToken()(trajectory, 0, 0, 0))
    trained = InfillPlan(rate=1.0, base=NextToken(failed=1.0))
    assert trained.room(failed) == 4
    # A call that breaks off, as at the end of a piece, can only be planned for.
    broken = Trajectory([*spans[:3], dataclasses.replace(spans[3], ids=spans[3].ids[:2])])
    assert only_plan("steps").room(broken) == 0
    assert only_plan("thought").room(broken) == 4


def test_where_only_one_cut_is_possible_it_is_taken():
    spans = planned().spans
    answered = Trajectory([*spans[:2], spans[5]])
    for index in range(20):
        example = InfillPlan(rate=1.0)(answered, 0, 0, index)
        assert words(example).endswith("<|fim_middle|> <|thought|> os <|end|>")


def test_the_two_cuts_of_a_plan_are_taken_as_often_as_asked():
    objective = InfillPlan(rate=0.5, thought=3.0, steps=1.0)
    ends = [words(objective(planned(), 7, 0, i)) for i in range(2000)]
    thoughts = sum(e.endswith("<|fim_middle|> <|thought|> os <|end|>") for e in ends)
    assert thoughts == pytest.approx(750, abs=90)
    assert sum("<|fim_middle|>" in e for e in ends) == pytest.approx(1000, abs=100)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: InfillCall(rate=1.5), "InfillCall.rate is 1.5"),
        (lambda: InfillCall(whole=0.0, name=0.0, arguments=0.0), "not all 0"),
        (lambda: InfillPlan(rate=-0.5), "InfillPlan.rate is -0.5; it must be in [0, 1]"),
        (
            lambda: InfillPlan(thought=0.0, steps=0.0),
            "InfillPlan.thought and steps must be 0 or more and not all 0, got 0.0 and 0.0",
        ),
        (lambda: InfillPlan(context=-1.0), "InfillPlan.context is -1.0"),
        (lambda: InfillCall(context=-1.0), "InfillCall.context is -1.0"),
    ],
)
def test_wrong_settings_are_named_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()
