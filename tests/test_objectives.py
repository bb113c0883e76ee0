import dataclasses
import re
import textwrap

import numpy as np
import pytest

from agentx.data.objectives import (
    InfillCall,
    InfillPlan,
    Mixture,
    NextToken,
    PlainText,
    random_generator,
)
from agentx.tokenizer import SPECIAL_TOKENS
from agentx.trajectory import Origin, Outcome, Role, Span, Trajectory

WORDS = (*SPECIAL_TOKENS, "go", "ls", "x", ".", "no", "2", "import", "os")


def span(role, text, outcome=Outcome.OK):
    ids = np.array([WORDS.index(word) for word in text.split()], np.int32)
    return Span(role, ids, Origin.DATA, outcome)


def recovery():
    failed, recovered = Outcome.FAILED, Outcome.RECOVERED
    return Trajectory(
        [
            span(Role.USER, "<|bos|> <|user|> go"),
            span(Role.CALL, "<|call|> ls", failed),
            span(Role.ARGUMENTS, "<|arguments|> x <|end|>", failed),
            span(Role.OBSERVATION, "<|observation|> no <|end|>", failed),
            span(Role.CALL, "<|call|> ls", recovered),
            span(Role.ARGUMENTS, "<|arguments|> . <|end|>", recovered),
            span(Role.OBSERVATION, "<|observation|> 2 <|end|>"),
            span(Role.ANSWER, "<|answer|> 2 <|end|>"),
        ]
    )


def one_call():
    return Trajectory(
        [
            span(Role.USER, "<|bos|> <|user|> go"),
            span(Role.CALL, "<|call|> ls"),
            span(Role.ARGUMENTS, "<|arguments|> x <|end|>"),
            span(Role.ANSWER, "<|answer|> 2 <|end|>"),
        ]
    )


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


def text():
    return Trajectory([span(Role.TEXT, "<|bos|> import os <|end|>")])


def table(example, rows, columns):
    """Aligned rows of an example, as the docstrings show them, so many tokens across."""
    cells = {
        "token": [WORDS[i] for i in example.ids],
        "role": [Role(r).name.lower() for r in example.roles],
        "outcome": [Outcome(o).name.lower() for o in example.outcomes],
        "weight": [f"{w:g}" for w in example.weights],
    }
    lines, start = [], 0
    for count in columns:
        own = slice(start, start + count)
        widths = [max(len(cells[row][i]) for row in rows) for i in range(*own.indices(10**6))]
        for row in rows:
            padded = [c.rjust(w) for c, w in zip(cells[row][own], widths, strict=True)]
            lines.append(f"{row:<8} {' '.join(padded)}")
        start += count
    assert start == len(example)
    return lines


def assert_shown_in(docstring, lines):
    text = textwrap.dedent(docstring)
    for line in lines:
        assert line in text, f"the docstring has not: {line}"


def test_next_token_trains_the_recovery_and_neither_the_failed_call_nor_the_observations():
    example = NextToken()(recovery(), 0, 0, 0)
    assert example.weights.tolist() == [0] * 11 + [1] * 5 + [0] * 3 + [1] * 3
    lines = table(example, ("token", "role", "outcome", "weight"), (3, 5, 3, 5, 3, 3))
    assert_shown_in(NextToken.__doc__, lines)


def test_plain_text_trains_every_token_but_the_first():
    example = PlainText()(text(), 0, 0, 0)
    assert example.weights.tolist() == [0, 1, 1, 1]
    assert_shown_in(PlainText.__doc__, table(example, ("token", "role", "weight"), (4,)))
    assert PlainText()(recovery(), 0, 0, 0).weights.tolist() == [0] + [1] * 21


@pytest.mark.parametrize(
    ("cut", "columns"), [("name", (5, 7, 3)), ("arguments", (7, 5, 3)), ("whole", (4, 4, 6))]
)
def test_infill_call_shows_what_its_docstring_shows(cut, columns):
    example = only(cut)(one_call(), 0, 0, 0)
    assert_shown_in(InfillCall.__doc__, table(example, ("token", "weight"), columns))


def only(cut, **fields):
    return InfillCall(rate=1.0, **{"whole": 0.0, "name": 0.0, "arguments": 0.0, cut: 1.0}, **fields)


def words(example):
    return " ".join(WORDS[i] for i in example.ids)


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


@pytest.mark.parametrize(("cut", "columns"), [("thought", (4, 6, 6, 4)), ("steps", (6, 4, 6, 4))])
def test_infill_plan_shows_what_its_docstring_shows(cut, columns):
    example = only_plan(cut)(planned(), 0, 0, 0)
    assert_shown_in(InfillPlan.__doc__, table(example, ("token", "weight"), columns))
    assert sum(columns) == len(planned()) + 4


def only_plan(cut, **fields):
    return InfillPlan(rate=1.0, **{"thought": 0.0, "steps": 0.0, cut: 1.0}, **fields)


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


def test_text_is_left_alone_by_every_objective():
    for objective in (NextToken(), InfillCall(rate=1.0), InfillPlan(rate=1.0), PlainText()):
        example = objective(text(), 0, 0, 0)
        assert words(example) == "<|bos|> import os <|end|>"
        assert example.weights.tolist() == [0, 1, 1, 1]


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


def test_an_example_depends_on_seed_epoch_and_index_alone():
    objective = InfillCall(rate=0.5)
    first = [words(objective(recovery(), 1, 2, i)) for i in range(50)]
    second = [words(objective(recovery(), 1, 2, i)) for i in reversed(range(50))]
    assert first == second[::-1]
    for seed, epoch in ((2, 2), (1, 3)):
        assert first != [words(objective(recovery(), seed, epoch, i)) for i in range(50)]


def test_the_same_integers_give_the_same_draws_on_every_machine():
    assert random_generator(1, 2, 3, 0).integers(1000, size=4).tolist() == [692, 824, 224, 663]
    assert random_generator(1, 2, 3, 1).integers(1000, size=4).tolist() == [430, 238, 175, 411]


def test_a_mixture_draws_its_objectives_by_share():
    mixture = Mixture((NextToken(), only("whole")), (3.0, 1.0))
    changed = sum(len(mixture(one_call(), 0, 0, i)) > 11 for i in range(2000))
    assert changed == pytest.approx(500, abs=80)
    assert mixture.room(one_call()) == 4
    assert mixture.room(text()) == 0


def test_an_objective_leaves_the_trajectory_as_it_was():
    trajectory = recovery()
    before = trajectory.ids.copy()
    InfillCall(rate=1.0)(trajectory, 0, 0, 0)
    assert trajectory.ids.tolist() == before.tolist()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NextToken(call=-1.0), "NextToken.call is -1.0; a loss weight is 0 or more"),
        (lambda: NextToken(text=float("nan")), "NextToken.text is nan"),
        (lambda: InfillCall(rate=1.5), "InfillCall.rate is 1.5"),
        (lambda: InfillCall(whole=0.0, name=0.0, arguments=0.0), "not all 0"),
        (lambda: InfillPlan(rate=-0.5), "InfillPlan.rate is -0.5; it must be in [0, 1]"),
        (
            lambda: InfillPlan(thought=0.0, steps=0.0),
            "InfillPlan.thought and steps must be 0 or more and not all 0, got 0.0 and 0.0",
        ),
        (lambda: InfillPlan(context=-1.0), "InfillPlan.context is -1.0"),
        (lambda: InfillCall(context=-1.0), "InfillCall.context is -1.0"),
        (lambda: Mixture((PlainText(),), (0.5, 0.5)), "a Mixture of 1 objectives has 2 shares"),
        (lambda: Mixture((PlainText(),), (0.0,)), "shares must be 0 or more and not all 0"),
        (lambda: NextToken()(Trajectory([]), 0, 0, 0), "there is no token in this trajectory"),
        (lambda: random_generator(-1, 0, 0, 0), "seed is -1; it must be in"),
    ],
)
def test_wrong_settings_are_named_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()
