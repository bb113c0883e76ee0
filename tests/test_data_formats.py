import json
import math
import re

import others
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentx.data.formats import (
    Conversation,
    ReadCounts,
    TextDocument,
    conversation_from_dict,
    conversation_to_dict,
    conversation_trajectory,
    read_documents,
    reading,
    sniff,
    text_trajectory,
    write_conversations,
)
from agentx.render import ToolRenderer
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Markers, Message, Outcome, Parameter, Role, ToolCall, ToolSpec

FIND = ToolSpec("find", "find a function", (Parameter("name"), Parameter("line", "integer")))
ASKED = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "Where is `walk`?"),
        Message(
            "assistant",
            tool_calls=(ToolCall("find", {"name": "wlk", "line": 3}),),
            outcome=Outcome.FAILED,
        ),
        Message("tool", "no such function", outcome=Outcome.FAILED),
        Message(
            "assistant",
            thought="a typo",
            tool_calls=(ToolCall("find", {"name": "walk"}),),
            outcome=Outcome.RECOVERED,
        ),
        Message("tool", "os.py"),
        Message("assistant", "läuft in os.py"),
    ),
    (FIND,),
)


def lines_of(path, *lines):
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    return path


def assert_adds_up(counts):
    assert counts.read == counts.kept + counts.num_skipped


def test_a_tree_is_one_document_a_file_in_order_of_path(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "b.py").write_text("b = 1\n")
    (tmp_path / "a.py").write_text("ä = 1\n")
    (tmp_path / "notes.txt").write_text("no code")
    (tmp_path / "pkg" / "__init__.py").write_text("")
    counts = ReadCounts()
    documents = list(read_documents(tmp_path, format="text", pattern="*.py", counts=counts))
    assert documents == [TextDocument("a.py", "ä = 1\n"), TextDocument("pkg/b.py", "b = 1\n")]
    assert (counts.read, counts.kept, dict(counts.skipped)) == (3, 2, {"empty": 1})
    assert list(read_documents(tmp_path / "a.py", format="text")) == documents[:1]


def test_a_file_that_is_not_utf_8_is_named_with_the_offset_of_the_byte(tmp_path):
    (tmp_path / "a.py").write_bytes(b"ok")
    (tmp_path / "b.py").write_bytes(b"caf\xe9")
    sentence = f"{tmp_path}/b.py is not UTF-8: byte 3 is 0xe9; convert it, or skip such files"
    counts = ReadCounts()
    with pytest.raises(ValueError, match=re.escape(sentence)):
        list(read_documents(tmp_path, format="text", counts=counts))
    assert_adds_up(counts)
    counts = ReadCounts()
    read = read_documents(tmp_path, format="text", on_error="skip", counts=counts)
    assert [document.name for document in read] == ["a.py"]
    assert (counts.read, counts.kept, dict(counts.skipped)) == (2, 1, {"not UTF-8": 1})


def test_jsonl_of_texts_is_one_document_a_line(tmp_path):
    path = lines_of(
        tmp_path / "t.jsonl", {"text": "one"}, {"text": " "}, {"text": "twö", "id": 7}, b" "
    )
    counts = ReadCounts()
    documents = list(read_documents(path, field="text", counts=counts))
    assert documents == [TextDocument(f"{path}:1", "one"), TextDocument(f"{path}:3", "twö")]
    assert (counts.read, counts.kept, dict(counts.skipped)) == (4, 2, {"empty": 2})
    assert [d.text for d in read_documents(lines_of(path, {"body": "b"}), field="body")] == ["b"]


@pytest.mark.parametrize(
    ("line", "sentence", "reason"),
    [
        (b'{"text": ', ":2: this is no JSON: Expecting value at column 10", "no JSON"),
        (b"[1]", ":2: this is no JSON object but a list", "no object"),
        (b"nul", ":2: this is no JSON: Expecting value at column 1", "no JSON"),
        (b'{"body": "x"}', ":2: there is no string 'text'", "no string 'text'"),
        (b'{"text": null}', ":2: there is no string 'text'", "no string 'text'"),
        (b'{"text": "\xff"}', ":2 is not UTF-8: byte 10 is 0xff", "not UTF-8"),
        (b'{"text": "\\ud800"}', ":2: a string has a lone surrogate", "lone surrogate"),
        (b"[" * 100_000, ":2: this JSON is beyond reading", "no JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", ":2: this JSON is beyond reading", "no JSON"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(tmp_path, line, sentence, reason):
    path = lines_of(tmp_path / "t.jsonl", {"text": "one"}, line, {"text": "three"})
    with pytest.raises(ValueError, match=re.escape(f"{path}{sentence}")):
        list(read_documents(path, field="text"))
    counts = ReadCounts()
    documents = list(read_documents(path, field="text", on_error="skip", counts=counts))
    assert [d.text for d in documents] == ["one", "three"]
    assert (counts.read, counts.kept, dict(counts.skipped)) == (3, 2, {reason: 1})


def test_json_of_any_depth_is_read_or_refused():
    read, refusals = {}, []
    for depth in range(1, 1200):
        nested = b'{"a": ' + b"[" * depth + b'"\\u00e9"' + b"]" * depth + b"}"
        try:
            read[depth] = reading.json_object(nested, "here")["a"] != ""
        except reading.Malformed as refused:
            read[depth] = False
            refusals.append(str(refused))
    assert all(said.startswith("here") and "\n" not in said for said in refusals)
    assert read[1]
    assert read[500]
    assert not read[1199]
    assert sorted(read.values(), reverse=True) == list(read.values())  # one border, and no crash


def test_an_empty_data_set_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty \(\*\.py\) holds no document: the data set is empty"
    ):
        list(read_documents(tmp_path / "empty", format="text", pattern="*.py"))
    blank = lines_of(tmp_path / "blank.jsonl", b"")
    for options in ({"field": "text"}, {}):
        with pytest.raises(ValueError, match=re.escape(f"{blank} holds no document")):
            list(read_documents(blank, **options))
    hopeless = lines_of(tmp_path / "hopeless.jsonl", b"x", b"y")
    with pytest.raises(ValueError, match="holds no document"):
        list(read_documents(hopeless, field="text", on_error="skip"))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"there is no file or folder {tmp_path}/x")):
        list(read_documents(tmp_path / "x", format="text"))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/x cannot be read: No such file")):
        sniff(tmp_path / "x")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} cannot be read: Is a directory")):
        sniff(tmp_path)
    with pytest.raises(ValueError, match="on_error is 'ignore'; it must be 'raise' or 'skip'"):
        list(read_documents(tmp_path, format="text", on_error="ignore"))


def test_conversations_are_written_and_read_back(tmp_path):
    path = tmp_path / "c.jsonl"
    write_conversations(path, [ASKED, Conversation((Message("user", "hi"),))])
    found = list(read_documents(path))
    assert [(c.messages, c.tools) for c in found] == [
        (ASKED.messages, ASKED.tools),
        ((Message("user", "hi"),), ()),
    ]
    assert [c.name for c in found] == [f"{path}:1", f"{path}:2"]
    assert not (tmp_path / "c.jsonl.partial").exists()


def test_the_order_of_arguments_is_kept():
    call = ToolCall("find", {"z": 1, "a": [2, {"y": None}]})
    record = conversation_to_dict(Conversation((Message("assistant", tool_calls=(call,)),)))
    found = conversation_from_dict(json.loads(json.dumps(record))).messages[0].tool_calls[0]
    assert list(found.arguments.items()) == [("z", 1), ("a", [2, {"y": None}])]


messages = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.text(),
    st.text(),
    st.lists(
        st.builds(ToolCall, st.text(), st.dictionaries(st.text(), st.integers() | st.text())),
        max_size=2,
    ).map(tuple),
    st.sampled_from(Outcome),
    st.text(),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(messages, max_size=4))
def test_any_conversation_survives_its_json_form(listed):
    conversation = Conversation(tuple(listed), (FIND,))
    text = json.dumps(conversation_to_dict(conversation))
    assert conversation_from_dict(json.loads(text)) == conversation


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({}, "there is no list 'messages'"),
        ({"messages": ["hi"]}, "message 0: this is no object but a string"),
        ({"messages": [{"role": "user"}, {}]}, "message 1: there is no 'role'"),
        (
            {"messages": [{"role": "bot"}]},
            "message 0: role is 'bot'; it must be one of system, user, assistant, tool",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "message 0: content must be a string, not a null",
        ),
        (
            {"messages": [{"role": "user", "text": "hi"}]},
            "message 0: there is no field 'text'; there are role, content, thought",
        ),
        (
            {"messages": [{"role": "user", "outcome": "bad"}]},
            "message 0: outcome is 'bad'; it must be one of ok, failed, recovered",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]},
            "message 0, tool call 0: there is no 'arguments'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}]},
            "message 0, tool call 0: arguments must be an object, not a string",
        ),
        ({"messages": [], "tools": 3}, "there is no list 'tools'"),
        ({"messages": [], "tools": [{"name": "f"}]}, "tool 0: there is no 'description'"),
        (
            {
                "messages": [],
                "tools": [
                    {"name": "f", "description": "", "parameters": [{"name": "x", "type": "int"}]}
                ],
            },
            "tool 0, parameter 0: type is 'int'; it must be one of string, integer",
        ),
    ],
)
def test_a_malformed_conversation_is_named_by_line_message_and_field(tmp_path, record, sentence):
    path = lines_of(tmp_path / "c.jsonl", record)
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: {sentence}")):
        list(read_documents(path, format="agentx"))
    good = {"messages": [{"role": "user", "content": "hi"}]}
    counts = ReadCounts()
    found = list(read_documents(lines_of(path, good, record), on_error="skip", counts=counts))
    assert len(found) == 1
    assert (counts.read, counts.kept, dict(counts.skipped)) == (2, 1, {"no conversation": 1})


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.binary(max_size=30)
        | st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda x: (
                st.lists(x, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["messages", "tools", "role", "content", "tool_calls", "name"]),
                    x,
                )
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
        max_size=5,
    )
)
def test_whatever_a_file_holds_it_is_read_or_skipped_and_counted(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "f.jsonl"
    path.write_bytes(b"\n".join([*lines, b'{"text": "x"}', b'{"messages": [{"role": "user"}]}']))
    for options in ({"field": "text"}, {}):
        counts = ReadCounts()
        # One line is good for each: an error could only be one that was not skipped.
        kept = list(read_documents(path, **options, on_error="skip", counts=counts))
        assert counts.kept == len(kept) >= 1
        assert counts.read == len(path.read_bytes().split(b"\n"))
        assert_adds_up(counts)


def test_a_text_becomes_one_span_between_its_markers():
    tokenizer = Tokenizer.bytes()
    trajectory = text_trajectory(TextDocument("a.py", "é\n"), tokenizer)
    assert [s.role for s in trajectory.spans] == [Role.TEXT]
    assert trajectory.ids.tolist() == [1, 15 + 0xC3, 15 + 0xA9, 15 + 0x0A, 8]
    assert trajectory.task_id == "a.py"
    theirs = others.tokenizer("qwen3")
    assert text_trajectory(TextDocument("", "a"), theirs).markers == Markers.of(theirs.special)
    assert math.isnan(trajectory.reward)


def test_a_conversation_becomes_the_spans_of_the_renderer():
    trajectory = conversation_trajectory(ASKED, ToolRenderer(Tokenizer.bytes()))
    roles = "SYSTEM USER CALL ARGUMENTS OBSERVATION THOUGHT CALL ARGUMENTS OBSERVATION ANSWER"
    assert [s.role.name for s in trajectory.spans] == roles.split()
    assert trajectory.num_prompt_spans == 2
    outcomes = [s.outcome.name for s in trajectory.spans]
    assert outcomes == ["OK"] * 2 + ["FAILED"] * 3 + ["RECOVERED"] * 3 + ["OK"] * 2
