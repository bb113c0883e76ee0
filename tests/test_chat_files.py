"""Files of chat and recorded formats: how they are told apart and read, noise, and real ones."""

import gzip
import json
import re
from pathlib import Path

import pytest
from chat_records import HERMES, INTERCODE, OPENAI, SHAREGPT, SWE_CALLS, SWE_TEXT, TAU, VERIFIERS
from hypothesis import given, settings
from hypothesis import strategies as st

from agentx.data.formats import (
    FORMATS,
    Conversation,
    ReadCounts,
    conversation_trajectory,
    read_documents,
    reading,
    sniff,
)
from agentx.render import ToolRenderer
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Outcome, Role

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("openai", "f.jsonl", OPENAI),
        ("openai", "f.json", [OPENAI, OPENAI]),
        ("openai", "f.json", OPENAI),
        ("sharegpt", "f.json", [SHAREGPT]),
        ("hermes", "f.jsonl", HERMES),
        ("tau_bench", "f.json", [TAU, TAU]),
        ("swe_agent", "f.traj", SWE_TEXT),
        ("swe_agent", "f.traj.gz", SWE_CALLS),
        ("intercode", "f.json", {"0": INTERCODE, "7": INTERCODE}),
        ("verifiers", "f.jsonl.gz", VERIFIERS),
        ("agentx", "f.jsonl", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
def test_a_format_is_recognised(tmp_path, name, file, content):
    path = tmp_path / file
    data = json.dumps(content, indent=None if ".jsonl" in file else 1).encode()
    path.write_bytes(gzip.compress(data) if file.endswith(".gz") else data)
    assert sniff(path) == name
    found = list(read_documents(path))
    assert len(found) == (len(content) if name == "intercode" or isinstance(content, list) else 1)
    assert found == [
        FORMATS[name].parse(record, conversation.name)
        for record, conversation in zip(
            [OPENAI] * 2 if content == [OPENAI, OPENAI] else records_of(content, name),
            found,
            strict=True,
        )
    ]


def records_of(content: object, name: str) -> list:
    if name == "intercode":
        return list(content.values())
    return content if isinstance(content, list) else [content]


def test_what_looks_like_nothing_is_said_to(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"body": "a"}')
    sentence = f"{path}: its first records, with 'body', look like none of tau_bench, swe_agent,"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        list(read_documents(path))
    with pytest.raises(ValueError, match="there is no format 'chatml'; there are text, tau_bench"):
        list(read_documents(path, format="chatml"))


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_the_values_of_a_file_have_the_lines_they_begin_at(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(reading, "_PIECE", piece)
    path = tmp_path / "f.json"
    listed = [{"ä": "x\n[]"}, 12, -1.5e3, "é", [[], {}], None, True, "a\\u00e9"]
    path.write_text("\n[\n" + ",\n".join(json.dumps(v, ensure_ascii=False) for v in listed) + "]\n")
    found = list(reading.values(path))
    assert [value for _, _, value in found] == listed
    assert [place for place, _, _ in found] == [f"{path}:{i}" for i in range(3, 11)]
    path.write_text(json.dumps({"a": 1, "b": {"c": 2}}, indent=1))
    assert list(reading.values(path)) == [(f"{path}:2", "a", 1), (f"{path}:3", "b", {"c": 2})]
    path.write_text(" [ ] ")
    assert list(reading.values(path)) == []


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('[{"a": 1},\n{"b": ', 2, "the file breaks off here"),
        ('[{"a": 1},\n{"b": 2}', 2, "the file breaks off here"),
        ('[{"a": 1},\n{"b": "x', 2, "this is no JSON: Unterminated string"),
        ('[{"a": 1}\n {"b": 2}]', 2, "this is no JSON: there is no ',' or ']'"),
        ('[{"a": 1},\n{b: 2}' + " " * 99 + "]", 2, "this is no JSON: Expecting property name"),
        ('[{"a": 1}]\n[]', 2, "this is no JSON: something follows its end"),
        ('{"a" 1}', 1, "this is no JSON: there is no key with a ':'"),
        ("", 1, "the file breaks off here"),
        ("x", 1, "there is no JSON array or object"),
    ],
)
def test_a_file_that_is_no_json_is_an_error_even_where_records_are_skipped(
    tmp_path, text, line, what
):
    path = tmp_path / "f.json"
    path.write_text(text)
    sentence = f"{path}:{line}: {what}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        list(reading.values(path))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        list(read_documents(path, format="openai", on_error="skip"))


def test_a_truncated_or_damaged_gzip_file_is_named(tmp_path):
    whole = gzip.compress((json.dumps(OPENAI) + "\n").encode() * 2000)
    path = tmp_path / "f.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{path} breaks off: the gzip file is truncated"):
        list(read_documents(path, on_error="skip"))
    path.write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match=f"{path} is damaged: Not a gzipped file"):
        list(read_documents(path, on_error="skip"))


def test_a_record_that_is_too_long_is_skipped_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RECORD", 1 << 20)
    path = tmp_path / "f.jsonl"
    good = json.dumps(VERIFIERS).encode()
    path.write_bytes(b"\n".join([good, b"x" * (5 << 20), good, b"y" * (1 << 20) + b"z", good]))
    counts = ReadCounts()
    assert len(list(read_documents(path, on_error="skip", counts=counts))) == 3
    assert (counts.read, dict(counts.skipped)) == (5, {"too long": 2})
    assert [place for place, _ in reading.lines(path)] == [f"{path}:{i}" for i in range(1, 6)]
    with pytest.raises(ValueError, match=f"{path}:2 is longer than 1 MiB"):
        list(read_documents(path))
    path = tmp_path / "f.json"
    path.write_bytes(b'["' + b"x" * (5 << 20) + b'"]')
    with pytest.raises(ValueError, match=f"{path}:1: a record is longer than 1 MiB"):
        list(reading.values(path))


def test_a_record_is_measured_by_itself_and_not_with_what_was_read_behind_it(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RECORD", 64 << 10)
    monkeypatch.setattr(reading, "_PIECE", 16 << 10)
    path = tmp_path / "f.json"
    given = ["a", "x" * (40 << 10), "b" * ((64 << 10) - 2), *["c" * (10 << 10)] * 9]
    path.write_text(json.dumps(given))
    assert [value for _, _, value in reading.values(path)] == given
    path.write_text(json.dumps(["a", "x" * ((64 << 10) - 1), "b" * (100 << 10)]))
    with pytest.raises(ValueError, match=f"{path}:1: a record is longer than 0 MiB"):
        list(reading.values(path))


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("openai", {"messages": [{"role": "developer", "content": "Be brief."}]}),
        ("openai", {"messages": [{"role": "assistant", "content": "!", "tool_calls": None}]}),
        ("openai", {"messages": [{"role": "assistant", "content": None}]}),
        ("agentx", {"messages": [{"role": "assistant", "content": "!"}]}),
    ],
)
def test_what_only_chat_apis_write_is_recognised(tmp_path, name, record):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(record))
    assert sniff(path) == name
    assert len(list(read_documents(path))) == 1


def assert_read_or_refused(name: str, record: dict) -> None:
    """Any other exception than ValueError fails the test."""
    for format in FORMATS.values():
        format.suits(record)
    refused = ""
    try:
        found = FORMATS[name].parse(record, "recorded")
    except ValueError as error:
        refused = str(error)
    assert "\n" not in refused
    assert refused or isinstance(found, Conversation)


KEYS = [
    "messages",
    "role",
    "content",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "id",
    "tool_call_id",
    "tools",
    "traj",
    "conversations",
    "from",
    "value",
    "reward",
    "history",
    "action",
    "thought",
    "turn_history",
    "query",
    "actions",
    "observations",
    "rewards",
    "valid_action",
    "prompt",
    "completion",
    "info",
    "system",
]
# The key that a record of each format holds its list under.
TOP = {
    "openai": "messages",
    "agentx": "messages",
    "sharegpt": "conversations",
    "hermes": "conversations",
    "tau_bench": "traj",
    "swe_agent": "history",
    "intercode": "turn_history",
    "verifiers": "prompt",
}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: (
        st.lists(x, max_size=4)
        | st.dictionaries(
            st.sampled_from(KEYS),
            x | st.sampled_from(["user", "assistant", "tool", "gpt", "human", "{}", "<tools>"]),
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(TOP)),
    st.lists(json_values, max_size=4),
    st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4),
)
def test_whatever_a_record_holds_it_is_read_or_refused_in_one_sentence(name, listed, others):
    assert set(TOP) == set(FORMATS)
    assert_read_or_refused(name, others | {TOP[name]: listed})


@settings(max_examples=150, deadline=None)
@given(st.lists(json_values, max_size=4), st.integers(0, 3), st.sampled_from(sorted(FORMATS)))
def test_mutations_of_good_records_are_read_or_refused(noise, where, name):
    goods = {
        "openai": OPENAI,
        "sharegpt": SHAREGPT,
        "hermes": HERMES,
        "tau_bench": TAU,
        "swe_agent": SWE_CALLS,
        "intercode": INTERCODE,
        "verifiers": VERIFIERS,
        "agentx": {"messages": []},
    }
    record = json.loads(json.dumps(goods[name]))
    at = record
    for value in noise:  # walk into it and put something else there
        keys = (
            sorted(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else []
        )
        if not keys:
            break
        key = list(keys)[where % len(keys)]
        if isinstance(at[key], dict | list) and value is not None:
            at = at[key]
        else:
            at[key] = value
    assert_read_or_refused(name, record)


# --------------------------------------------------------------------------------------------------
# Real files
# --------------------------------------------------------------------------------------------------

REAL = {
    "tau_bench": "tau_bench/gpt-4o-airline.json",
    "intercode": "intercode/ic_sql_multiturn_vicuna_10_turns.json",
    "swe_agent": "swe_agent/rev-rock.traj",
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_file_is_read_whole_and_becomes_trajectories(name):
    path = SHARED / REAL[name]
    if not path.exists():
        pytest.skip(f"{REAL[name]} is not here")
    counts = ReadCounts()
    found = list(read_documents(path, counts=counts))
    content = json.loads(path.read_text())
    expected = 1 if name == "swe_agent" else len(content)
    assert (counts.read, counts.kept, len(found)) == (expected,) * 3
    assert sniff(path) == name
    renderer = ToolRenderer(Tokenizer.bytes())
    trajectories = [conversation_trajectory(c, renderer) for c in found]
    num_calls = sum(len(m.tool_calls) for c in found for m in c.messages)
    spans = [span for t in trajectories for span in t.spans]
    assert num_calls == sum(span.role is Role.CALL for span in spans)
    if name == "tau_bench":
        assert [t.reward for t in trajectories] == [r["reward"] for r in content]
        errors = sum(
            m["role"] == "tool" and m["content"].startswith("Error")
            for r in content
            for m in r["traj"]
        )
        assert errors == sum(
            s.role is Role.OBSERVATION and s.outcome is Outcome.FAILED for s in spans
        )
    if name == "intercode":
        invalid = sum(not v for r in content.values() for v in r["turn_history"]["valid_action"])
        assert invalid == sum(s.role is Role.CALL and s.outcome is Outcome.FAILED for s in spans)
