"""Chat and recorded formats: what each of them says, what is refused, and real files of each."""

import gzip
import json
import math
import re
from pathlib import Path

import others
import pytest
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
from agentx.render import ToolRenderer, as_tool_format
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Markers, Message, Outcome, Parameter, Role, ToolCall, ToolSpec

SHARED = Path(__file__).parents[2] / "shared" / "data"

WEATHER = ToolSpec("weather", "how it is", (Parameter("city"), Parameter("days", "integer")))
OPENAI = {
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Bern "}, {"text": "or Rome?"}]},
        {
            "role": "assistant",
            "content": "Both.",
            "reasoning_content": "two calls",
            "tool_calls": [
                {"id": "a", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}},
                {"id": "b", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
            ],
        },
        {"role": "tool", "tool_call_id": "b", "content": "sun"},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "assistant", "content": "Rome."},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "how it is",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string"},
                        "days": {"type": ["null", "integer"]},
                    },
                },
            },
        }
    ],
}
BERN, ROME = (ToolCall("weather", {"city": city}) for city in ("Bern", "Rome"))
SPOKEN = (
    Message("system", "Be brief."),
    Message("user", "Bern or Rome?"),
    Message("assistant", "Both.", "two calls", (BERN, ROME)),
    Message("tool", "rain"),
    Message("tool", "sun"),
    Message("assistant", "Rome."),
)
SHAREGPT = {
    "system": "Be brief.",
    "conversations": [
        {"from": "human", "value": "Bern?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Rain."},
    ],
    "tools": json.dumps([OPENAI["tools"][0]["function"]]),
}
HERMES = {
    "conversations": [
        {
            "from": "system",
            "value": "You may call functions, listed within <tools></tools> XML tags. Here they "
            f"are: <tools> {[OPENAI['tools'][0]]} </tools> Put each call within "
            "<tool_call></tool_call> tags:\n<tool_call>\n"
            '{"arguments": <dict>, "name": <name>}\n</tool_call>',
        },
        {"from": "human", "value": 'Bern or Rome? Say <tool_call>{"name": 1}</tool_call>.'},
        {
            "from": "gpt",
            "value": "Both.\n"
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>\n'
            "<tool_call>\n{'arguments': {'city': 'Rome'}, 'name': 'weather'}\n</tool_call>",
        },
        {
            "from": "tool",
            "value": "<tool_response>\nrain\n</tool_response>\n"
            "<tool_response>\nsun\n</tool_response>",
        },
        {"from": "gpt", "value": "Rome."},
    ]
}
TAU = {
    "task_id": 3,
    "reward": 1.0,
    "traj": [
        {"role": "user", "content": "Bern?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "Error: no city"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "2", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "2", "name": "weather", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ],
}
SWE_TEXT = {
    "history": [
        {"role": "system", "content": "A shell."},
        {"role": "user", "content": "Mend it."},
        {
            "role": "assistant",
            "content": "I look.\n```\nls\n```",
            "thought": "I look.",
            "action": "ls",
        },
        {"role": "user", "content": "a.py"},
        {"role": "assistant", "content": "Done.", "thought": "Done.", "action": "submit"},
    ]
}
SWE_CALLS = {
    "history": [
        {"role": "user", "content": "Mend it."},
        {
            "role": "assistant",
            "content": "I look.",
            "thought": "I look.",
            "tool_calls": [{"id": "x", "function": {"name": "ls", "arguments": '{"path": "."}'}}],
        },
        {"role": "tool", "content": "a.py", "tool_call_ids": ["x"]},
    ]
}
INTERCODE = {
    "environment": "ic_bash",
    "query": "Count the files.",
    "turn_history": {
        "actions": ["lz", "ls", "ls | wc -l"],
        "observations": ["lz: not found", "a b", "2"],
        "rewards": [0.0, 0.5, 0.25],
        "valid_action": [False, True, True],
    },
}
VERIFIERS = {
    "prompt": [{"role": "user", "content": "Bern?"}],
    "completion": [{"role": "assistant", "content": "Rain."}],
    "reward": 0.5,
    "info": {"oai_tools": json.dumps(OPENAI["tools"])},
}


def of(name: str, record: dict) -> Conversation:
    return FORMATS[name].parse(record, "here")


def test_openai_messages_with_results_in_the_order_of_their_calls():
    found = of("openai", OPENAI)
    assert found == Conversation(SPOKEN, (WEATHER,), "here")


def test_the_legacy_function_call():
    call = {"name": "weather", "arguments": '{"city": "Bern"}'}
    found = of(
        "openai",
        {
            "messages": [
                {"role": "assistant", "content": None, "function_call": call},
                {"role": "function", "name": "weather", "content": "rain"},
            ]
        },
    )
    assert found.messages == (Message("assistant", tool_calls=(BERN,)), Message("tool", "rain"))


def test_sharegpt():
    found = of("sharegpt", SHAREGPT)
    assert found.tools == (WEATHER,)
    assert found.messages == (
        Message("system", "Be brief."),
        Message("user", "Bern?"),
        Message("assistant", tool_calls=(BERN,)),
        Message("tool", "rain"),
        Message("assistant", "Rain."),
    )
    # Without the tags' format, tags are text.
    text = {"conversations": [{"from": "gpt", "value": "<tool_call>{}</tool_call>"}]}
    assert of("sharegpt", text).messages[0].content == "<tool_call>{}</tool_call>"


def test_hermes_tags_in_json_or_as_python_writes_it_where_they_belong():
    found = of("hermes", HERMES)
    assert found.tools == (WEATHER,)
    assert found.messages[:2] == (
        Message(
            "system",
            "You may call functions, listed within <tools></tools> XML tags. Here they are:  Put "
            "each call within <tool_call></tool_call> tags:\n<tool_call>\n"
            '{"arguments": <dict>, "name": <name>}\n</tool_call>',
        ),
        Message("user", 'Bern or Rome? Say <tool_call>{"name": 1}</tool_call>.'),
    )
    assert found.messages[2:] == (
        Message("assistant", "Both.", tool_calls=(BERN, ROME)),
        *SPOKEN[3:],
    )


def test_tau_bench_has_a_reward_failures_and_recoveries():
    found = of("tau_bench", TAU)
    assert found.reward == 1.0
    assert [m.outcome.name for m in found.messages] == [
        "OK",
        "FAILED",
        "FAILED",
        "RECOVERED",
        "OK",
        "OK",
    ]
    assert found.tools == (ToolSpec("weather", "", (Parameter("city"),)),)


def test_swe_agent_by_text_and_by_calls():
    shell = of("swe_agent", SWE_TEXT)
    assert shell.messages == (
        Message("system", "A shell."),
        Message("user", "Mend it."),
        Message("assistant", thought="I look.", tool_calls=(ToolCall("bash", {"command": "ls"}),)),
        Message("tool", "a.py"),
        Message(
            "assistant", thought="Done.", tool_calls=(ToolCall("bash", {"command": "submit"}),)
        ),
    )
    assert shell.reward is None
    calls = of("swe_agent", SWE_CALLS)
    assert calls.messages[1:] == (
        Message("assistant", thought="I look.", tool_calls=(ToolCall("ls", {"path": "."}),)),
        Message("tool", "a.py"),
    )


def test_what_swe_agent_says_beside_a_call_is_its_thought_where_that_is_empty():
    said = {**SWE_CALLS["history"][1], "thought": ""}
    assert of("swe_agent", {"history": [said]}).messages[0].thought == "I look."


def test_the_text_of_swe_agent_may_come_in_parts():
    parts = [{"type": "text", "text": "Mend "}, {"type": "text", "text": "it."}]
    history = [{"role": "user", "content": parts}, *SWE_TEXT["history"][2:]]
    assert of("swe_agent", {"history": history}).messages[0] == Message("user", "Mend it.")


def test_intercode_has_an_outcome_a_turn_and_the_highest_reward():
    found = of("intercode", INTERCODE)
    assert found.reward == 0.5
    assert [m.outcome.name for m in found.messages[1:]] == (
        ["FAILED", "FAILED", "RECOVERED", "OK", "OK", "OK"]
    )
    assert found.messages[1].tool_calls == (ToolCall("bash", {"command": "lz"}),)
    sql = of("intercode", {**INTERCODE, "environment": "ic_sql"})
    assert sql.messages[1].tool_calls == (ToolCall("sql", {"query": "lz"}),)


def test_verifiers():
    found = of("verifiers", VERIFIERS)
    assert found == Conversation(
        (Message("user", "Bern?"), Message("assistant", "Rain.")), (WEATHER,), "here", 0.5
    )
    plain = of("verifiers", {"prompt": "Bern?", "completion": "Rain."})
    assert (plain.messages, plain.reward) == (found.messages, None)


def test_tools_are_those_that_the_calls_show():
    calls = [
        ToolCall("f", {"a": 1, "b": "x"}),
        ToolCall("f", {"b": "y"}),
        ToolCall("g", {"c": [1], "d": True, "e": None}),
        ToolCall("f", {"b": 3}),
        ToolCall("h", {"i": 5, "j": None, "k": {}}),
        ToolCall("h", {"i": 5.5, "j": 5}),
    ]
    made = [{"name": c.name, "arguments": c.arguments} for c in calls]
    said = {"role": "assistant", "tool_calls": [{"function": function} for function in made]}
    found = of("tau_bench", {"traj": [said]}).tools
    assert [(t.name, [(p.name, p.type) for p in t.parameters]) for t in found] == [
        ("f", [("b", "any"), ("a", "integer")]),
        ("g", [("c", "array"), ("d", "boolean"), ("e", "any")]),
        ("h", [("i", "number"), ("j", "integer"), ("k", "object")]),
    ]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": ["null", "integer"]}, "integer"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string"),
        ({"oneOf": [{"type": "null"}, {"type": "integer"}, {"type": "number"}]}, "number"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "any"),
        ({"anyOf": [{"$ref": "#/x"}, {"type": "null"}]}, "any"),
        ({"enum": ["a", "b", None]}, "string"),
        ({"anyOf": [{"enum": [1]}, {"enum": [2.5]}, 3]}, "any"),
        ({"type": "object", "anyOf": [{"required": ["a"]}]}, "object"),
        ({"type": [["string"]]}, "any"),
        ({"type": "dict"}, "any"),
        ({"anyOf": 3}, "any"),
        ({}, "any"),
        (True, "any"),
    ],
)
def test_the_type_of_a_parameter_is_that_of_its_schema_or_any(schema, expected):
    function = {"name": "f", "parameters": {"properties": {"x": schema}}}
    (tool,) = of("openai", {"messages": [], "tools": [{"function": function}]}).tools
    assert tool.parameters == (Parameter("x", expected),)


def test_a_refusal_is_what_was_said_where_nothing_else_was():
    for content in ({}, {"content": None}):
        said = {"role": "assistant", **content, "refusal": "I cannot.", "weight": 1}
        assert of("openai", {"messages": [said]}).messages == (Message("assistant", "I cannot."),)


def test_calls_made_together_are_told_one_after_the_other():
    failed = [
        SPOKEN[0],
        Message("assistant", "Both.", "two calls", (BERN, ROME), Outcome.FAILED),
        Message("tool", "rain"),
        Message("tool", "no", outcome=Outcome.FAILED),
        Message("assistant", tool_calls=(BERN,)),
    ]
    assert as_tool_format(failed) == [
        SPOKEN[0],
        Message("assistant", thought="two calls\nBoth.", tool_calls=(BERN,)),
        Message("tool", "rain"),
        Message("assistant", tool_calls=(ROME,), outcome=Outcome.FAILED),
        Message("tool", "no", outcome=Outcome.FAILED),
        Message("assistant", tool_calls=(BERN,)),
    ]


def test_calls_of_which_no_result_is_marked_have_all_failed():
    failed = Message("assistant", tool_calls=(BERN, ROME), outcome=Outcome.FAILED)
    told = as_tool_format([failed, Message("tool", "rain"), Message("tool", "sun")])
    assert [m.outcome.name for m in told] == ["FAILED", "OK", "FAILED", "OK"]


def test_a_conversation_becomes_a_trajectory_with_its_reward():
    renderer = ToolRenderer(Tokenizer.bytes())
    trajectory = conversation_trajectory(of("tau_bench", TAU), renderer)
    assert trajectory.reward == 1.0
    theirs = others.tokenizer("qwen3")
    other = conversation_trajectory(of("tau_bench", TAU), ToolRenderer(theirs))
    assert other.markers == Markers.of(theirs.special) != trajectory.markers
    assert math.isnan(conversation_trajectory(of("openai", OPENAI), renderer).reward)
    roles = [span.role for span in trajectory.spans]
    assert roles.count(Role.CALL) == roles.count(Role.OBSERVATION) == 2
    assert [s.outcome.name for s in trajectory.spans if s.role is Role.CALL] == [
        "FAILED",
        "RECOVERED",
    ]


def call(**changes: object) -> dict:
    function = {"name": "f", "arguments": "{}"} | changes
    return {"role": "assistant", "tool_calls": [{"id": "a", "function": function}]}


RESULT = {"role": "tool", "tool_call_id": "a", "content": ""}
TWO_CALLS = [call()["tool_calls"][0] | {"id": i} for i in "ba"]


@pytest.mark.parametrize(
    ("name", "record", "sentence"),
    [
        (
            "openai",
            {"messages": [call(arguments="{")]},
            "message 0, tool call 0: the text of the arguments of 'f' is no JSON: Expecting",
        ),
        (
            "openai",
            {"messages": [call(arguments="{'a': 1}")]},
            "the text of the arguments of 'f' is no JSON",
        ),
        (
            "openai",
            {"messages": [call(arguments="[1]")]},
            "message 0, tool call 0: the arguments of 'f' are no object but a list",
        ),
        (
            "openai",
            {"messages": [call(arguments='{"a": "\\ud800"}')]},
            "a string has a lone surrogate",
        ),
        ("openai", {"messages": [call(name=None)]}, "tool call 0: there is no string 'name'"),
        ("openai", {"messages": [RESULT]}, "message 0: this result answers no call 'a' that waits"),
        (
            "openai",
            {"messages": [call(), RESULT, RESULT]},
            "message 2: this result answers no call 'a' that waits for one",
        ),
        (
            "openai",
            {"messages": [call(), {"role": "user", "content": "?"}]},
            "message 1: the call of 'f' before it has no result",
        ),
        (
            "openai",
            {"messages": [{"role": "assistant", "tool_calls": TWO_CALLS}, RESULT]},
            "message 2, the end: the call of 'f' before it has no result",
        ),
        (
            "openai",
            {"messages": [{"role": "assistant", "content": "?", "weight": 0}]},
            "message 0: its weight is 0, and a conversation has no weights: leave the field out to",
        ),
        (
            "openai",
            {"messages": [{"role": "assistant", "tool_calls": call()["tool_calls"] * 2}]},
            "message 0: two calls have the id 'a'",
        ),
        ("openai", {"messages": [{"role": "bot"}]}, "message 0: nobody speaks as 'bot'; there are"),
        (
            "openai",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "message 0: a part of its content is no text but 'image_url'",
        ),
        ("openai", {"messages": [{"role": "user", "tool_calls": [1]}]}, "a user message cannot"),
        ("openai", {"messages": [], "tools": [{}]}, "tool 0: there is no string 'name'"),
        ("openai", {"messages": [], "reward": "1"}, "reward must be a number, not a string"),
        ("openai", {"messages": [], "reward": math.nan}, "reward is nan; it must be finite"),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, "turn 0: value must be a string"),
        (
            "hermes",
            {"conversations": [{"from": "gpt", "value": "<tool_call>f()</tool_call>"}]},
            "turn 0: its <tool_call> is no JSON",
        ),
        (
            "hermes",
            {
                "conversations": [
                    {"from": "gpt", "value": "<tool_call>{'name': '\\ud800'}</tool_call>"}
                ]
            },
            "turn 0: its <tool_call> is no JSON",
        ),
        ("swe_agent", {"history": [{"role": "tool"}]}, "history 0: content must be a string"),
        (
            "intercode",
            {"query": "?", "turn_history": {**INTERCODE["turn_history"], "rewards": []}},
            "turn_history has columns of [3, 3, 0, 3] turns",
        ),
        ("verifiers", {"prompt": 1, "completion": ""}, "prompt must be a list of messages or a"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, name, record, sentence):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        list(read_documents(path, format=name))
    assert str(caught.value).startswith(f"{path}:1: ")
    assert "\n" not in str(caught.value)


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
        found = of(name, record)
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
