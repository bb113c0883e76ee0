"""What holds of all objectives, and those that set weights alone."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest
from rows import assert_shown_in, one_call, recovery, table, text, words

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
from agentx.data.store import TokenStore
from agentx.render import ToolRenderer
from agentx.tokenizer import SPECIAL_TOKENS, Tokenizer
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

# Moves the one call that there is to the end.
CUT_OUT = InfillCall(rate=1.0, name=0.0, arguments=0.0)


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


def test_text_is_left_alone_by_every_objective():
    for objective in (NextToken(), InfillCall(rate=1.0), InfillPlan(rate=1.0), PlainText()):
        example = objective(text(), 0, 0, 0)
        assert words(example) == "<|bos|> import os <|end|>"
        assert example.weights.tolist() == [0, 1, 1, 1]


def test_an_objective_leaves_the_trajectory_as_it_was():
    trajectory = recovery()
    before = trajectory.ids.copy()
    InfillCall(rate=1.0)(trajectory, 0, 0, 0)
    assert trajectory.ids.tolist() == before.tolist()


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
    mixture = Mixture((NextToken(), CUT_OUT), (3.0, 1.0))
    changed = sum(len(mixture(one_call(), 0, 0, i)) > 11 for i in range(2000))
    assert changed == pytest.approx(500, abs=80)
    assert mixture.room(one_call()) == 4
    assert mixture.room(text()) == 0


def test_a_mixture_within_a_mixture_is_refused_where_both_draw():
    # Both would draw the same number: the inner one's choice would follow from the outer one's.
    inner = Mixture((NextToken(), PlainText()), (0.5, 0.5))
    with pytest.raises(ValueError, match="put all objectives into one, their shares multiplied"):
        Mixture((inner, NextToken()), (0.5, 0.5))
    around = TraceAugment("store", 0.5, base=ToolRename("tokenizer", base=inner))
    with pytest.raises(ValueError, match="put all objectives into one, their shares multiplied"):
        Mixture((NextToken(), around), (0.5, 0.5))
    assert Mixture((NextToken(), around), (0.0, 1.0)).objectives[1] is around
    inner = Mixture((PlainText(), NextToken()), (0.5, 0.5))
    outer = Mixture((inner, PlainText()), (1.0, 0.0))  # this one has nothing to draw
    assert all(
        outer(text(), 0, 0, i).weights.tolist() == inner(text(), 0, 0, i).weights.tolist()
        for i in range(9)
    )


def test_objectives_within_each_other_draw_apart(tmp_path):
    Tokenizer.bytes().save(tmp_path / "bytes")
    inner = Mixture((NextToken(), CUT_OUT), (0.5, 0.5))
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


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NextToken(call=-1.0), "NextToken.call is -1.0; a loss weight is 0 or more"),
        (lambda: NextToken(text=float("nan")), "NextToken.text is nan"),
        (lambda: Mixture((PlainText(),), (0.5, 0.5)), "a Mixture of 1 objectives has 2 shares"),
        (lambda: Mixture((PlainText(),), (0.0,)), "shares must be 0 or more and not all 0"),
        (lambda: NextToken()(Trajectory([]), 0, 0, 0), "there is no token in this trajectory"),
        (lambda: random_generator(-1, 0, 0, 0), "seed is -1; it must be in"),
    ],
)
def test_wrong_settings_are_named_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()
