"""Texts with their reasoning traces behind them, before them, or without."""

import math
import re

import numpy as np
import pytest
from rows import assert_shown_in, span, table, words

from agentx.data.objectives import FillInTheMiddle, InfillPlan, NextToken, PlainText, TraceAugment
from agentx.data.pack import pack_rows
from agentx.data.store import TokenStore
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Role, Span, Trajectory


def traced():
    return Trajectory(
        [
            span(Role.TEXT, "<|bos|> import os"),
            span(Role.THOUGHT, "<|thought|> go <|end|>"),
        ],
        reward=math.nan,
    )


AFTER = "<|bos|> import os <|thought|> go <|end|>"
BEFORE = "<|bos|> <|thought|> go <|end|> import os <|end|>"
WITHOUT = "<|bos|> import os <|end|>"


def store(folder, trajectories):
    TokenStore.write(folder / "store", trajectories, "words")
    return str(folder / "store")


def test_trace_augment_shows_what_its_docstring_shows(tmp_path):
    path, seen = store(tmp_path, [traced()]), set()
    objective = TraceAugment(path, share=0.25, before=0.5)
    for index in range(40):
        example = objective(traced(), 0, 0, index)
        seen.add(words(example))
        rows = table(example, ("token", "role", "weight"), (len(example),))
        assert_shown_in(TraceAugment.__doc__, rows)
    assert seen == {AFTER, BEFORE, WITHOUT}


def test_traces_make_up_the_share_asked_for_whatever_the_lengths(tmp_path):
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(400):
        text = Span(Role.TEXT, np.array([1, *[20] * int(rng.integers(5, 60))], np.int32))
        trace = Span(Role.THOUGHT, np.array([4, *[21] * int(rng.integers(1, 200)), 8], np.int32))
        documents.append(Trajectory([text, trace] if rng.random() < 0.7 else [text]))
    path = store(tmp_path, documents)
    for share in (0.0, 0.2, 0.5):
        objective = TraceAugment(path, share, before=0.25)
        made = [objective(d, 1, e, i) for e in range(4) for i, d in enumerate(documents)]
        tokens = np.array([[len(e), (e.roles == Role.THOUGHT).sum()] for e in made]).sum(axis=0)
        assert tokens[1] / tokens[0] == pytest.approx(share, abs=0.02)
        with_trace = [e for e in made if (e.roles == Role.THOUGHT).any()]
        first = [e for e in with_trace if e.roles[1] == Role.THOUGHT]
        assert len(first) == pytest.approx(0.25 * len(with_trace), abs=40)


def test_all_that_the_store_has_may_be_asked_for_and_no_more(tmp_path):
    path = store(tmp_path, [traced()])
    everything = TraceAugment(path, share=0.5)
    assert {words(everything(traced(), 0, 0, i)) for i in range(50)} == {AFTER}
    sentence = f"share is 0.6, but traces are only 0.5000 of the tokens of {path}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        TraceAugment(path, share=0.6)(traced(), 0, 0, 0)


def test_a_trace_has_the_weight_of_a_thought(tmp_path):
    path = store(tmp_path, [traced()])
    example = TraceAugment(path, 0.5, base=NextToken(thought=0.25))(traced(), 0, 0, 0)
    assert example.weights.tolist() == [0, 1, 1, 0.25, 0.25, 0.25]


def test_what_is_no_text_with_its_trace_is_left_alone_but_a_store_of_it_refused(tmp_path):
    conversation = Trajectory(
        [
            span(Role.USER, "<|bos|> <|user|> go"),
            span(Role.THOUGHT, "<|thought|> os"),
            span(Role.ANSWER, "<|answer|> 2 <|end|>"),
        ]
    )
    text = Trajectory([span(Role.TEXT, "<|bos|> import os <|end|>")])
    objective = TraceAugment(store(tmp_path, [traced()]), share=0.0)
    for trajectory in (conversation, text):
        assert objective(trajectory, 0, 0, 0).ids.tolist() == trajectory.ids.tolist()
    (tmp_path / "other").mkdir()
    other = TraceAugment(store(tmp_path / "other", [conversation, traced()]), share=0.1)
    with pytest.raises(ValueError, match="holds more than texts and traces"):
        other(traced(), 0, 0, 0)


def test_each_piece_of_a_cut_document_keeps_its_part_of_the_trace_or_not(tmp_path):
    text, trace = [1, *range(20, 30)], [4, *range(30, 50), 8]
    spans = [(Role.TEXT, text), (Role.THOUGHT, trace)]
    whole = Trajectory([Span(role, np.array(ids, np.int32)) for role, ids in spans])
    path = store(tmp_path, [whole])
    cuts = ((0, 9), (8, 11), (10, 18), (17, 25), (24, 33))
    pieces = [TokenStore.open(path).piece(0, begin, end) for begin, end in cuts]
    for share, expected in ((0.0, [*text, 8]), (22 / 33, [*text, *trace])):
        objective = TraceAugment(path, share, before=1.0)
        examples = [objective(piece, 0, 0, index) for index, piece in enumerate(pieces)]
        assert [i for e in examples for i in e.ids[1:].tolist()] == expected[1:]
        pack_rows([examples], 40)


def test_the_room_is_that_of_the_base_with_or_without_the_trace(tmp_path):
    Tokenizer.bytes().save(tmp_path / "bytes")
    base = FillInTheMiddle(str(tmp_path / "bytes"), rate=1.0)
    objective = TraceAugment(store(tmp_path, [traced()]), share=0.1, base=base)
    assert base.room(traced()) == 0
    assert objective.room(traced()) == base.room(Trajectory(traced().spans[:1])) == 16
    assert TraceAugment(objective.store, 0.1, base=PlainText()).room(traced()) == 0
    assert TraceAugment(objective.store, 0.1, before=0.5).room(traced()) == 1


def test_the_room_is_that_of_the_base_with_the_trace_first(tmp_path):
    # Only a thought with something behind it can be moved, so that this base needs room there.
    path, base = store(tmp_path, [traced()]), InfillPlan(rate=1.0)
    assert base.room(traced()) == 0
    objective = TraceAugment(path, share=0.5, before=1.0, base=base)
    made = [objective(traced(), 0, 0, index) for index in range(20)]
    assert max(map(len, made)) - len(traced()) == objective.room(traced()) == 5
    assert TraceAugment(path, share=0.5, base=base).room(traced()) == 0


def test_a_trace_is_kept_by_seed_epoch_and_index_alone(tmp_path):
    objective = TraceAugment(store(tmp_path, [traced()]), share=0.25, before=0.5)
    made = [words(objective(traced(), 3, 1, i)) for i in range(100)]
    assert made == [words(objective(traced(), 3, 1, i)) for i in reversed(range(100))][::-1]
    assert made != [words(objective(traced(), 3, 2, i)) for i in range(100)]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TraceAugment("s", 1.0), "TraceAugment.share is 1.0; it must be in [0, 1)"),
        (lambda: TraceAugment("s", 0.5, 1.5), "TraceAugment.before is 1.5; it must be in [0, 1]"),
    ],
)
def test_wrong_settings_are_named_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()
