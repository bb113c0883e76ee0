import dataclasses
import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rows import WORDS, assert_shown_in, span, table

from agentx.data.formats import conversation_trajectory, read_documents
from agentx.data.objectives import (
    FillInTheMiddle,
    InfillCall,
    InfillPlan,
    Mixture,
    NextToken,
    PlainText,
    Recover,
    ToolChoice,
    ToolRename,
    TraceAugment,
    random_generator,
)
from agentx.data.objectives import text as text_objective
from agentx.data.objectives.calls import spread, whole_calls
from agentx.data.objectives.recover import failures_with_recovery
from agentx.data.store import TokenStore
from agentx.render import ToolRenderer
from agentx.tokenizer import SPECIAL_TOKENS, Piece, Tokenizer
from agentx.trajectory import (
    Markers,
    Message,
    Origin,
    Outcome,
    Parameter,
    Role,
    Span,
    ToolCall,
    ToolSpec,
    Trajectory,
)


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


def test_a_mixture_within_a_mixture_is_refused_where_both_draw():
    # Both would draw the same number: the inner one's choice would follow from the outer one's.
    inner = Mixture((NextToken(), PlainText()), (0.5, 0.5))
    with pytest.raises(ValueError, match="put all objectives into one, their shares multiplied"):
        Mixture((inner, NextToken()), (0.5, 0.5))
    inner = Mixture((PlainText(), NextToken()), (0.5, 0.5))
    outer = Mixture((inner, PlainText()), (1.0, 0.0))  # this one has nothing to draw
    assert all(
        outer(text(), 0, 0, i).weights.tolist() == inner(text(), 0, 0, i).weights.tolist()
        for i in range(9)
    )


def test_objectives_within_each_other_draw_apart(tmp_path):
    Tokenizer.bytes().save(tmp_path / "bytes")
    inner = Mixture((NextToken(), only("whole")), (0.5, 0.5))
    rename = ToolRename(str(tmp_path / "bytes"), rate=0.5, base=inner)
    chat = ToolRenderer(Tokenizer.bytes()).render(
        [Message("user", "go"), Message("assistant", tool_calls=(ToolCall("ls", {}),))],
        (ToolSpec("ls", "list"),),
    )
    kinds = Counter()
    for index in range(400):
        example = rename(Trajectory(chat), 0, 0, index)
        named = "ls()" in Tokenizer.bytes().decode(example.ids.tolist())
        kinds[named, MARKERS.fim_middle in example.ids] += 1
    assert len(kinds) == 4
    assert min(kinds.values()) == pytest.approx(100, abs=35)


# --------------------------------------------------------------------------------------------------
# Markers
# --------------------------------------------------------------------------------------------------

MARKERS = Markers()


def test_the_markers_by_default_are_those_of_our_tokenizers():
    assert Markers.of(Tokenizer.bytes().special) == MARKERS == tuple(range(len(SPECIAL_TOKENS)))
    assert [f"<|{field}|>" for field in Markers._fields] == list(SPECIAL_TOKENS)


def moved(trajectory):
    """The same document of a tokenizer whose markers are 1000 and on."""
    spans = [
        dataclasses.replace(s, ids=np.where(s.ids < 15, s.ids + 1000, s.ids))
        for s in trajectory.spans
    ]
    return Trajectory(spans, markers=Markers(*range(1000, 1015)))


def spoken():
    """A conversation of a byte tokenizer, with all that any objective looks for."""
    failed, recovered = Outcome.FAILED, Outcome.RECOVERED
    said = [
        Message("user", "go"),
        Message(
            "assistant",
            thought="look",
            tool_calls=(ToolCall("ls", {"a": "x", "b": "y"}),),
            outcome=failed,
        ),
        Message("tool", "no", outcome=failed),
        Message("assistant", tool_calls=(ToolCall("ls", {"a": "1", "b": "2"}),), outcome=recovered),
        Message("tool", "2"),
        Message("assistant", "2"),
    ]
    tools = (ToolSpec("ls", "list", (Parameter("a"), Parameter("b"))), ToolSpec("lt", "less"))
    return Trajectory(ToolRenderer(Tokenizer.bytes()).render(said, tools))


@pytest.mark.parametrize("kind", ["spoken", "traced", "text"])
def test_objectives_go_by_the_markers_of_the_trajectory(tmp_path, kind):
    Tokenizer.bytes().save(tmp_path / "bytes")
    encode = Tokenizer.bytes().encode
    trace = Span(Role.THOUGHT, np.array([4, *encode("so"), 8], np.int32))
    document = Trajectory([Span(Role.TEXT, np.array([1, *encode("import os"), 8], np.int32))])
    traced = Trajectory([*document.spans, trace])
    document = {"spoken": spoken(), "traced": traced, "text": document}[kind]
    TokenStore.write(tmp_path / "store", [traced], Tokenizer.bytes().fingerprint)
    path, changed = str(tmp_path / "bytes"), 0
    for objective in (
        NextToken(),
        InfillCall(rate=1.0),
        InfillPlan(rate=1.0),
        Recover(rate=1.0),
        FillInTheMiddle(path, rate=1.0),
        ToolRename(path, rate=1.0),
        ToolChoice(path, rate=1.0, distractors=0),
        TraceAugment(str(tmp_path / "store"), 0.2, before=0.5),
    ):
        for index in range(8):
            plain, other = (objective(d, 0, 0, index) for d in (document, moved(document)))
            ids = np.where(plain.ids < 15, plain.ids + 1000, plain.ids)
            assert other.ids.tolist() == ids.tolist()
            assert other.weights.tolist() == plain.weights.tolist()
            assert other.roles.tolist() == plain.roles.tolist()
            changed += plain.ids.tolist() != document.ids.tolist()
    assert changed > 4


def test_a_document_of_another_chat_format_is_left_as_it_is(tmp_path):
    """Its wrappers are ordinary tokens, and no marker of the tool format stands in it."""
    Tokenizer.bytes().save(tmp_path / "bytes")
    path, encode = str(tmp_path / "bytes"), Tokenizer.bytes().encode
    failed, recovered = Outcome.FAILED, Outcome.RECOVERED
    chat = Trajectory(
        [
            Span(role, np.array(encode(text), np.int32), Origin.DATA, outcome)
            for role, text, outcome in (
                (Role.SYSTEM, "[system]ls(): list", Outcome.OK),
                (Role.USER, "[user]go", Outcome.OK),
                (Role.THOUGHT, "[assistant]<think>look</think>", failed),
                (Role.CALL, '<tool_call>{"name": "ls", ', failed),
                (Role.ARGUMENTS, '"arguments": {}}</tool_call>', failed),
                (Role.CALL, '[assistant]<tool_call>{"name": "ls", ', recovered),
                (Role.ARGUMENTS, '"arguments": {}}</tool_call>', recovered),
                (Role.ANSWER, "[assistant]2", Outcome.OK),
            )
        ]
    )
    plain = NextToken()(chat, 0, 0, 0)
    for objective in (
        InfillCall(rate=1.0),
        InfillPlan(rate=1.0),
        Recover(rate=1.0),
        FillInTheMiddle(path, rate=1.0),
        ToolRename(path, rate=1.0),
        ToolChoice(path, rate=1.0, distractors=0),
    ):
        example = objective(chat, 0, 0, 0)
        assert example.ids.tolist() == plain.ids.tolist()
        assert objective.room(chat) == 0
        if not isinstance(objective, FillInTheMiddle):
            assert example.weights.tolist() == plain.weights.tolist()


def test_an_objective_leaves_the_trajectory_as_it_was():
    trajectory = recovery()
    before = trajectory.ids.copy()
    InfillCall(rate=1.0)(trajectory, 0, 0, 0)
    assert trajectory.ids.tolist() == before.tolist()


# --------------------------------------------------------------------------------------------------
# Recovery
# --------------------------------------------------------------------------------------------------


def failure():
    spans = recovery().spans
    return Trajectory([*spans[:6], spans[7]])


def repaired():
    """What `failure` would be without its failure."""
    spans = failure().spans
    return Trajectory([spans[0], *spans[4:]])


def pool(folder):
    other = Trajectory(
        [
            span(Role.USER, "<|bos|> <|user|> go"),
            span(Role.CALL, "<|call|> os"),
            span(Role.ARGUMENTS, "<|arguments|> 2 <|end|>"),
        ]
    )
    TokenStore.write(folder / "pool", [text(), other], "words")
    return str(folder / "pool")


def test_recover_shows_what_its_docstring_shows(tmp_path):
    real = Recover(rate=1.0, inserted=0.0)(failure(), 0, 0, 0)
    assert_shown_in(Recover.__doc__, table(real, ("token", "weight"), (3, 5, 8)))
    inserted = Recover(rate=1.0, real=0.0, pool=pool(tmp_path))(repaired(), 0, 0, 0)
    assert_shown_in(Recover.__doc__, table(inserted, ("token", "weight"), (3, 5, 8)))


def test_what_is_put_in_is_a_failed_call_of_the_weights_asked_for(tmp_path):
    objective = Recover(rate=1.0, real=0.0, pool=pool(tmp_path), wrong=0.5, back=2.0)
    example = objective(repaired(), 0, 0, 0)
    assert example.weights.tolist() == [0] * 3 + [0.5] * 4 + [2] + [1] * 8
    failed, recovered = Outcome.FAILED, Outcome.RECOVERED
    assert example.outcomes.tolist() == [0] * 3 + [failed] * 4 + [recovered] * 6 + [0] * 3
    assert len(example) <= len(repaired()) + objective.room(repaired())
    without = [*example.ids[:3], *example.ids[8:]]
    assert without == repaired().ids.tolist()


def test_the_thought_of_the_right_step_is_kept():
    spans = failure().spans
    thought = span(Role.THOUGHT, "<|thought|> os", Outcome.RECOVERED)
    thoughtful = Trajectory([*spans[:4], thought, *spans[4:]])
    example = Recover(rate=1.0, inserted=0.0)(thoughtful, 0, 0, 0)
    assert words(example) == (
        "<|bos|> <|user|> go <|call|> ls <|arguments|> x <|back|> <|thought|> os "
        "<|call|> ls <|arguments|> . <|end|> <|answer|> 2 <|end|>"
    )


def test_without_a_pool_the_wrong_call_is_another_of_the_document():
    spans = one_call().spans
    other = [span(Role.CALL, "<|call|> os"), span(Role.ARGUMENTS, "<|arguments|> <|end|>")]
    two = Trajectory([*spans[:3], *other, spans[3]])
    found = {words(Recover(rate=1.0)(two, 0, 0, i)) for i in range(40)}
    assert found == {
        "<|bos|> <|user|> go <|call|> os <|arguments|> <|back|> <|call|> ls <|arguments|> x "
        "<|end|> <|call|> os <|arguments|> <|end|> <|answer|> 2 <|end|>",
        "<|bos|> <|user|> go <|call|> ls <|arguments|> x <|end|> <|call|> ls <|arguments|> x "
        "<|back|> <|call|> os <|arguments|> <|end|> <|answer|> 2 <|end|>",
    }
    assert Recover(rate=1.0, longest=3).room(two) == 3
    short = {words(Recover(rate=1.0, longest=4)(two, 0, 0, i)) for i in range(40)}
    assert len(short) == 2  # as it was, or with the one call of 4 tokens
    assert words(NextToken()(two, 0, 0, 0)) in short


def test_where_there_is_no_wrong_call_to_be_had_a_document_is_left_as_it_is(tmp_path):
    for trajectory in (one_call(), text()):
        example = Recover(rate=1.0)(trajectory, 0, 0, 0)
        assert example.ids.tolist() == trajectory.ids.tolist()
    assert Recover(rate=1.0).room(text()) == 0
    assert Recover(rate=0.0).room(one_call()) == 0
    # A call like the right one is not wrong.
    TokenStore.write(tmp_path / "same", [one_call()], "words")
    same = Recover(rate=1.0, pool=str(tmp_path / "same"))(one_call(), 0, 0, 0)
    assert same.ids.tolist() == one_call().ids.tolist()


def test_a_pool_without_a_call_that_is_short_enough_is_refused(tmp_path):
    objective = Recover(rate=1.0, real=0.0, pool=pool(tmp_path), longest=4)
    with pytest.raises(ValueError, match="has no call of at most 4 tokens for Recover to put in"):
        objective(one_call(), 0, 0, 0)


def test_of_a_large_store_documents_are_read_that_are_spread_over_it():
    assert list(spread(range(5))) == [0, 1, 2, 3, 4]
    large = list(spread(range(3000)))
    assert len(large) == 1024
    assert set(np.diff(large).tolist()) == {2, 3}


def test_recover_keeps_its_rate_and_depends_on_its_integers_alone(tmp_path):
    objective = Recover(rate=0.3, pool=pool(tmp_path))
    made = [words(objective(failure(), 5, 1, i)) for i in range(1000)]
    assert made[::-1] == [words(objective(failure(), 5, 1, i)) for i in reversed(range(1000))]
    changed = [m for m in made if "<|back|>" in m]
    assert len(changed) == pytest.approx(300, abs=60)
    assert sum("<|call|> os" in m for m in changed) == pytest.approx(150, abs=50)


SHARED = Path(__file__).parents[2] / "shared" / "data"
# Each file, and the least share of its episodes in which a failure is followed by its recovery.
REAL = {
    "intercode/ic_sql_multiturn_gpt-3.5_10_turns.json": 0.1,
    "intercode/ic_bash_multiturn_gpt-3.5_10_turns_fs_1.json": 0.05,
    "tau_bench/gpt-4o-airline.json": 0.02,
}


@pytest.mark.parametrize("name", REAL)
def test_real_episodes_hold_failures_that_recover(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    renderer = ToolRenderer(Tokenizer.bytes())
    objective = Recover(rate=1.0, inserted=0.0, back=3.0)
    conversations = itertools.islice(read_documents(path), 200)
    episodes = [conversation_trajectory(c, renderer) for c in conversations]
    with_recovery = 0
    for index, episode in enumerate(episodes):
        pairs = failures_with_recovery(whole_calls(episode))
        example = objective(episode, 0, 0, index)
        backs = example.ids == MARKERS.back
        assert backs.sum() == bool(pairs)
        assert (example.weights[backs] == 3).all()
        if pairs:
            with_recovery += 1
            assert len(example) <= len(episode)  # what came of the failure is left out
    assert with_recovery > REAL[name] * len(episodes)


# --------------------------------------------------------------------------------------------------
# Fill in the middle, of text
# --------------------------------------------------------------------------------------------------


class FewWords:
    """A tokenizer of `WORDS`, whose "os" begins with a space."""

    pieces = tuple(Piece((" os" if word == "os" else word).encode(), "text") for word in WORDS)

    def encode(self, text):
        spelled = {piece.data.decode(): i for i, piece in enumerate(self.pieces)}
        ids = []
        while text:
            word = max((w for w in spelled if text.startswith(w)), key=len)
            ids.append(spelled[word])
            text = text[len(word) :]
        return ids


@pytest.mark.parametrize(("spm", "columns"), [(0.0, (5, 4)), (1.0, (4, 5))])
def test_fill_in_the_middle_shows_what_its_docstring_shows(monkeypatch, spm, columns):
    monkeypatch.setattr(text_objective, "load_tokenizer", lambda path: FewWords())
    objective = FillInTheMiddle("words", rate=1.0, spm=spm, lines=0.0)

    class After2:
        """Random numbers that cut "import os" behind "im" and at the end."""

        def random(self):
            return 0.5

        def choice(self, places, size, *, replace):
            return np.array([9, 2])

    monkeypatch.setattr(text_objective, "random_generator", lambda *key: After2())
    example = objective(text(), 0, 0, 0)
    assert_shown_in(FillInTheMiddle.__doc__, table(example, ("token", "weight"), columns))
    assert set(example.roles.tolist()) == {Role.TEXT}


SOURCE = "def walk(top):\n    # läuft 歩く 🚶\n    return 1\n\n\nprint(walk('.'))\n" * 4


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for tokenizer in (Tokenizer.bytes(), Tokenizer.train([SOURCE], 340)):
        tokenizer.save(folder / str(tokenizer.vocab_size))
        made[str(folder / str(tokenizer.vocab_size))] = tokenizer
    return made


def parts(tokenizer, example):
    """Prefix, suffix and middle as text, of a document that was rearranged, and whether by SPM."""
    markers = [WORDS.index(f"<|fim_{m}|>") for m in ("prefix", "suffix", "middle")]
    ids = example.ids.tolist()
    at = [ids.index(marker) for marker in markers]
    prefix, suffix = ids[at[0] + 1 : at[1]], ids[at[1] + 1 : at[2]]
    assert ids[-1] == WORDS.index("<|end|>")
    suffix = [i for i in suffix if i != WORDS.index("<|end|>")]
    return [tokenizer.decode(x) for x in (prefix, suffix, ids[at[2] + 1 : -1])]


@pytest.mark.parametrize("lines", [0.0, 1.0])
def test_the_parts_of_a_text_are_whole_characters_or_lines_and_make_up_the_text(tokenizers, lines):
    for path, tokenizer in tokenizers.items():
        ids = np.array([1, *tokenizer.encode(SOURCE), 8], np.int32)
        whole = Trajectory([Span(Role.TEXT, ids)])
        for index in range(100):
            psm = FillInTheMiddle(path, rate=1.0, spm=0.0, lines=lines)(whole, 3, 0, index)
            spm = FillInTheMiddle(path, rate=1.0, spm=1.0, lines=lines)(whole, 3, 0, index)
            prefix, suffix, middle = parts(tokenizer, psm)
            assert prefix + middle + suffix == SOURCE
            assert "\ufffd" not in prefix + middle + suffix
            assert parts(tokenizer, spm) == ["", suffix, prefix + middle]
            if lines:
                assert all(part == "" or part.endswith("\n") for part in (prefix, middle, suffix))
            for example in (psm, spm):
                assert len(example) <= len(ids) + 16
                assert (example.weights == 0).sum() == 4
                assert (example.weights == 1).sum() == len(example) - 4


def test_a_cut_that_does_not_fit_moves_to_a_border_of_tokens(tokenizers, monkeypatch):
    monkeypatch.setattr(text_objective, "_SLACK", -1000)
    (path, tokenizer) = list(tokenizers.items())[1]
    ids = np.array([1, *tokenizer.encode(SOURCE), 8], np.int32)
    markers = [WORDS.index(f"<|fim_{m}|>") for m in ("prefix", "suffix", "middle")]
    before = sorted([*ids.tolist(), 8, *markers])
    for index in range(50):
        objective = FillInTheMiddle(path, rate=1.0, spm=0.0, lines=0.0)
        example = objective(Trajectory([Span(Role.TEXT, ids)]), 0, 0, index)
        assert sorted(example.ids.tolist()) == before
        prefix, suffix, middle = parts(tokenizer, example)
        assert prefix + middle + suffix == SOURCE
        assert "\ufffd" not in prefix + middle + suffix


def test_a_piece_that_begins_within_a_character_is_cut_between_others(tokenizers):
    path, tokenizer = next(iter(tokenizers.items()))
    ids = np.array(tokenizer.encode("é歩く")[1:], np.int32)
    for index in range(50):
        example = FillInTheMiddle(path, rate=1.0, spm=0.0, lines=0.0)(
            Trajectory([Span(Role.TEXT, ids)]), 0, 0, index
        )
        prefix, suffix, middle = parts(tokenizer, example)
        assert prefix.startswith("\ufffd")
        assert prefix[1:] + middle + suffix == "歩く"


def test_what_is_not_text_alone_or_too_short_is_left_alone(tokenizers):
    path, tokenizer = next(iter(tokenizers.items()))
    objective = FillInTheMiddle(path, rate=1.0)
    chat = Trajectory(ToolRenderer(tokenizer).render([Message("user", "hi")], ()))
    assert objective.room(chat) == 0
    assert objective(chat, 0, 0, 0).ids.tolist() == chat.ids.tolist()
    empty = Trajectory([Span(Role.TEXT, np.array([1, 8], np.int32))])
    assert objective(empty, 0, 0, 0).ids.tolist() == [1, 8]
    one_line = Trajectory([Span(Role.TEXT, np.array([1, 100, 8], np.int32))])
    by_lines = FillInTheMiddle(path, rate=1.0, lines=1.0)(one_line, 0, 0, 0)
    assert len(by_lines) == 7


def test_fill_in_the_middle_depends_on_its_integers_alone_and_keeps_its_rates(tokenizers):
    path, tokenizer = next(iter(tokenizers.items()))
    whole = Trajectory([Span(Role.TEXT, np.array([1, *tokenizer.encode(SOURCE), 8], np.int32))])
    objective = FillInTheMiddle(path, rate=0.5, spm=0.25)
    made = [objective(whole, 1, 2, i).ids.tolist() for i in range(1000)]
    assert made[::-1] == [objective(whole, 1, 2, i).ids.tolist() for i in reversed(range(1000))]
    changed = [ids for ids in made if WORDS.index("<|fim_middle|>") in ids]
    assert len(changed) == pytest.approx(500, abs=60)
    spm = sum(ids[2] == WORDS.index("<|fim_suffix|>") for ids in changed)
    assert spm == pytest.approx(125, abs=40)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NextToken(call=-1.0), "NextToken.call is -1.0; a loss weight is 0 or more"),
        (lambda: NextToken(text=float("nan")), "NextToken.text is nan"),
        (lambda: InfillCall(rate=1.5), "InfillCall.rate is 1.5"),
        (lambda: InfillCall(whole=0.0, name=0.0, arguments=0.0), "not all 0"),
        (lambda: FillInTheMiddle("t", lines=2.0), "FillInTheMiddle.lines is 2.0; it must be in"),
        (lambda: Recover(rate=2.0), "Recover.rate is 2.0; it must be in [0, 1]"),
        (lambda: Recover(wrong=-1.0), "Recover.wrong and back must be 0 or more, got -1.0 and 1.0"),
        (lambda: Recover(longest=2), "Recover.longest is 2; a call has 3 tokens or more"),
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
