"""Chat and recorded formats: what each of them says, and what is refused."""

import json
import math
import re

import others
import pytest
from chat_records import (
    BERN,
    HERMES,
    INTERCODE,
    OPENAI,
    ROME,
    SHAREGPT,
    SPOKEN,
    SWE_CALLS,
    SWE_TEXT,
    TAU,
    VERIFIERS,
    WEATHER,
)

from agentx.data.formats import (
    FORMATS,
    Conversation,
    conversation_trajectory,
    read_documents,
)
from agentx.render import ToolRenderer, as_tool_format
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Markers, Message, Outcome, Parameter, Role, ToolCall, ToolSpec


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
