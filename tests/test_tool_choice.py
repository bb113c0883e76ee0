"""Which tool a call calls: its weight where names part, and tools that others were offered."""

import re

import numpy as np
import pytest
from rows import FieldTokenizer, assert_shown_in, table

from agentx.data.objectives import (
    InfillCall,
    NextToken,
    PlainText,
    ToolChoice,
    ToolRename,
)
from agentx.data.objectives import choice as choice_objective
from agentx.data.objectives import offer as offer_objective
from agentx.data.store import TokenStore
from agentx.render import ToolRenderer, parse_tool_list
from agentx.tokenizer import Tokenizer
from agentx.trajectory import (
    Markers,
    Message,
    Outcome,
    Parameter,
    Role,
    ToolCall,
    ToolSpec,
    Trajectory,
)

GET = ToolSpec("get", "get it", (Parameter("key"),))
GET_ALL = ToolSpec("get_all", "get all of it")
PUT = ToolSpec("put", "put it", (Parameter("key"), Parameter("value")))
OTHERS = [
    ToolSpec("get", "another get"),
    ToolSpec("pull", "pull it", (Parameter("a"), Parameter("b"))),
    ToolSpec("send", "send it away"),
]


def call(name, /, outcome=Outcome.OK, **arguments):
    return Message("assistant", tool_calls=(ToolCall(name, arguments),), outcome=outcome)


SAID = [
    Message("system", "Be brief."),
    Message("user", "go"),
    call("get", key="x"),
    Message("tool", "1"),
    call("get_all"),
    Message("tool", "2"),
    call("put", key="a", value="b"),
    Message("tool", "3"),
    Message("assistant", "done"),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The files of a byte tokenizer, and a store whose documents offer `OTHERS`."""
    folder = tmp_path_factory.mktemp("choice")
    tokenizer = Tokenizer.bytes()
    tokenizer.save(folder / "tokenizer.model")
    documents = [document([SAID[1]], [tool]) for tool in OTHERS]
    TokenStore.write(folder / "pool", [*documents, *documents], tokenizer.fingerprint)
    return {"tokenizer": str(folder / "tokenizer.model"), "pool": str(folder / "pool")}


def document(said=SAID, tools=(GET, GET_ALL, PUT)):
    return Trajectory(ToolRenderer(Tokenizer.bytes()).render(said, tools))


def listed(example):
    """The names of the tools in the system span of an example."""
    ids = example.ids[example.roles == Role.SYSTEM].tolist()[2:]
    tools, rest = parse_tool_list(Tokenizer.bytes().decode(ids))
    return [tool.name for tool in tools], rest


def chosen(example, weight=2.0):
    """What of a name stands before each token of that weight, and the token."""
    decode = Tokenizer.bytes().decode
    places = np.flatnonzero(example.weights == weight).tolist()
    before = [decode(example.ids[:i].tolist()).split("<|call|>")[-1] for i in places]
    return [(name, decode([example.ids[i]])) for name, i in zip(before, places, strict=True)]


def test_tool_choice_shows_what_its_docstring_shows(tmp_path, monkeypatch):
    fields = FieldTokenizer()
    for module in (offer_objective, choice_objective):
        monkeypatch.setattr(module, "load_tokenizer", lambda path: fields)
    render = ToolRenderer(fields).render
    said = [Message("user", "go"), call("find_file")]
    own, other = ToolSpec("find_file", "files"), ToolSpec("find_line", "lines")
    pool = [Trajectory(render(said[:1], [other]))]
    TokenStore.write(tmp_path / "pool", pool, fields.fingerprint)
    objective = ToolChoice(str(tmp_path), str(tmp_path / "pool"), rate=1.0)
    made = [objective(Trajectory(render(said, [own])), 0, 0, index) for index in range(8)]
    other_first = [e for e in made if fields.decode([e.ids[3]]) == "_line"]
    assert 0 < len(other_first) < 8
    for example in other_first:
        rows = table(example, ("token", "role", "weight"), (9, 6, 7), fields.words)
        assert_shown_in(ToolChoice.__doc__, rows)


def test_the_choice_is_weighted_where_the_names_of_the_tools_offered_part(paths):
    objective = ToolChoice(paths["tokenizer"], rate=1.0, distractors=0, choice=2.0)
    example, plain = objective(document(), 0, 0, 0), NextToken()(document(), 0, 0, 0)
    assert chosen(example) == [
        ("", "g"),
        ("get", "<|arguments|>"),
        ("", "g"),
        ("get", "_"),
        ("", "p"),
    ]
    assert example.ids.tolist() == plain.ids.tolist()
    is_choice = example.weights == 2
    assert example.weights[~is_choice].tolist() == plain.weights[~is_choice].tolist()
    assert objective.room(document()) == 0


def test_with_rest_zero_only_the_choice_is_trained_and_never_a_failed_one(paths):
    objective = ToolChoice(paths["tokenizer"], rate=1.0, distractors=0, choice=0.5, rest=0.0)
    example = objective(document(), 0, 0, 0)
    assert set(example.weights.tolist()) == {0.0, 0.5}
    assert (example.weights > 0).sum() == 5
    failed = [SAID[1], call("put", Outcome.FAILED, key="a"), SAID[3]]
    assert not objective(document(failed), 0, 0, 0).weights.any()


def test_a_call_that_has_no_choice_has_none_scored(paths):
    objective = ToolChoice(paths["tokenizer"], rate=1.0, distractors=0, choice=2.0)
    one_tool = document([SAID[1], SAID[2], SAID[3]], [GET])
    assert chosen(objective(one_tool, 0, 0, 0)) == []
    not_offered = document([SAID[1], call("gone"), SAID[3]])
    assert chosen(objective(not_offered, 0, 0, 0)) == []
    cut_off = Trajectory(document().spans[:3])
    assert chosen(objective(cut_off, 0, 0, 0)) == []


def test_tools_of_the_pool_are_put_in_random_places_and_none_by_a_name_on_offer(paths):
    objective = ToolChoice(**paths, rate=1.0, distractors=4, choice=2.0)
    before, orders = document(), set()
    for index in range(60):
        example = objective(before, 0, 0, index)
        names, rest = listed(example)
        assert rest == "Be brief."
        assert [n for n in names if n in ("get", "get_all", "put")] == ["get", "get_all", "put"]
        assert len(set(names)) == len(names)
        assert set(names) <= {"get", "get_all", "put", "pull", "send"}
        orders.add(tuple(names))
        behind = example.ids[example.roles != Role.SYSTEM].tolist()
        assert behind == before.ids[len(before.spans[0].ids) :].tolist()
        assert len(example) <= len(before) + objective.room(before)
        # `put` and `pull` part at their third letter.
        assert (("pu", "t") in chosen(example)) == ("pull" in names)
    assert len(orders) > 20
    assert max(len(names) for names in orders) == 5


def test_the_room_is_that_of_the_longest_tools_of_the_pool_and_of_the_base(paths):
    lines = ("\nget(): another get", "\npull(a, b): pull it", "\nsend(): send it away")
    assert [len(line) for line in lines] == [19, 20, 21]
    assert ToolChoice(**paths, distractors=1).room(document()) == 21
    assert ToolChoice(**paths, distractors=2).room(document()) == 41
    assert ToolChoice(**paths, distractors=4).room(document()) == 60
    assert ToolChoice(**paths, distractors=2, longest=20).room(document()) == 39
    with_call = ToolChoice(**paths, distractors=1, base=InfillCall(1.0))
    assert with_call.room(document()) == 21 + 4
    assert ToolChoice(**paths, rate=0.0).room(document()) == 0
    with pytest.raises(ValueError, match="lists no tool of at most 3 tokens for ToolChoice"):
        ToolChoice(**paths, longest=3).room(document())


def test_a_base_that_renames_tools_renames_those_put_in_and_is_scored_by_its_names(paths):
    rename = ToolRename(paths["tokenizer"], rate=1.0)
    objective = ToolChoice(**paths, rate=1.0, distractors=4, choice=2.0, base=rename)
    for index in range(20):
        example = objective(document(), 0, 0, index)
        names, _ = listed(example)
        assert not set(names) & {"get", "get_all", "put", "pull", "send"}
        assert ("", "") not in chosen(example)
        calls = {name for name, _ in chosen(example)}
        assert "" in calls  # the first letters differ, in three calls of five tools
        assert len(example) <= len(document()) + objective.room(document())


def test_where_the_base_would_take_more_than_its_room_nothing_is_put_in(paths):
    class Doubled(PlainText):
        """Says everything twice where there is more than was planned for."""

        def __call__(self, trajectory, seed, epoch, index):
            if len(trajectory) > len(document()):
                trajectory = Trajectory(trajectory.spans * 2)
            return super().__call__(trajectory, seed, epoch, index)

    objective = ToolChoice(**paths, rate=1.0, base=Doubled())
    for index in range(10):
        assert objective(document(), 0, 0, index).ids.tolist() == document().ids.tolist()


def test_a_rearranged_call_is_scored_only_where_its_name_stands_whole(paths):
    base = InfillCall(1.0, whole=0.0, name=1.0, arguments=0.0)
    objective = ToolChoice(paths["tokenizer"], rate=1.0, distractors=0, choice=2.0, base=base)
    first, last = document([*SAID[:4], SAID[8]]), document()
    assert chosen(objective(first, 0, 0, 0)) == []
    assert len(chosen(objective(last, 0, 0, 0))) in (3, 4)


def test_documents_without_a_list_are_left_to_the_base(paths):
    tokenizer = Tokenizer.bytes()
    text = Trajectory(document().spans[1:])
    no_tools = document(SAID[:2], ())
    objective = ToolChoice(**paths, rate=1.0)
    for trajectory in (text, no_tools):
        example = objective(trajectory, 0, 0, 0)
        assert example.ids.tolist() == trajectory.ids.tolist()
        assert example.weights.tolist() == NextToken()(trajectory, 0, 0, 0).weights.tolist()
        assert objective.room(trajectory) == 0
    other = Trajectory(
        document().spans, markers=Markers.of({n: 900 + i for n, i in tokenizer.special.items()})
    )
    assert objective(other, 0, 0, 0).ids.tolist() == document().ids.tolist()


def test_tools_are_drawn_by_seed_epoch_and_index_alone_and_at_their_rate(paths):
    objective, before = ToolChoice(**paths, rate=0.25, choice=2.0), document()
    examples = [objective(before, 3, 1, i) for i in range(400)]
    made = [e.ids.tolist() for e in examples]
    again = [objective(before, 3, 1, i).ids.tolist() for i in reversed(range(400))]
    assert made == again[::-1]
    assert made != [objective(before, 4, 1, i).ids.tolist() for i in range(400)]
    assert sum(e.weights.max() == 2 for e in examples) == pytest.approx(100, abs=30)


def test_a_pool_of_another_tokenizer_is_refused(paths, tmp_path):
    TokenStore.write(tmp_path / "other", [document()], "another tokenizer")
    objective = ToolChoice(paths["tokenizer"], str(tmp_path / "other"))
    with pytest.raises(ValueError, match="was written with another tokenizer"):
        objective.room(document())


@pytest.mark.parametrize("separated", [True, False])
def test_the_ids_of_a_list_are_those_of_the_text_as_a_whole(separated):
    text = "find(name, line): find `it`, fast\nls(): list\n\nBe \u2581 brief: (now).\n"
    tokenizer = Tokenizer.train([text * 20, "walk the walk, talk the talk"], 330)
    encoder = offer_objective.FieldEncoder(tokenizer)
    assert encoder._stand_apart
    encoder._stand_apart = separated
    for start in range(len(text)):
        assert encoder.encode(text[start:]) == tokenizer.encode(text[start:])


def test_a_tokenizer_of_others_is_asked_for_the_text_as_a_whole():
    class Merged(FieldTokenizer):
        """Has a token for a colon with a line break."""

        def encode(self, text):
            return super().encode(text.replace(":\n", "x"))

    fields = Merged()
    fields.special = {name: 1000 + i for name, i in fields.special.items()}
    encoder = offer_objective.FieldEncoder(fields)
    assert encoder.encode("a:\nb") == fields.encode("axb")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ToolChoice("t", rate=2.0, distractors=0), "ToolChoice.rate is 2.0; it must be in"),
        (lambda: ToolChoice("t"), "ToolChoice.distractors is 4, but there is no pool to draw them"),
        (lambda: ToolChoice("t", "p", distractors=-1), "ToolChoice.distractors is -1; it must be"),
        (
            lambda: ToolChoice("t", "p", rest=-1.0),
            "ToolChoice.choice and rest must be 0 or more, got 4.0 and -1.0",
        ),
    ],
)
def test_wrong_settings_are_named_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()
