"""A record of each chat and recorded format, for tests."""

import json

from agentx.trajectory import Message, Parameter, ToolCall, ToolSpec

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
