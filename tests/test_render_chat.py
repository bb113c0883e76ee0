"""Chat formats of others: token for token what transformers makes of their templates."""

import dataclasses
import functools
import unicodedata

import numpy as np
import others
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentx.render.chat
from agentx.render import ChatRenderer, chat_template, tool_schemas
from agentx.tokenizer import Tokenizer
from agentx.trajectory import (
    Message,
    Origin,
    Outcome,
    Parameter,
    Role,
    Span,
    ToolCall,
    ToolSpec,
)

TOKENIZER_OF = {"chatml": "qwen3", "qwen3": "qwen3", "hermes": "hermes", "llama3": "llama3"}
EACH = pytest.mark.parametrize("format", TOKENIZER_OF)
SEARCH = ToolSpec("search", "find a function", (Parameter("name"),))
TOOLS = (SEARCH, ToolSpec("open", "show a line", (Parameter("path"), Parameter("line", "integer"))))
ASSISTANT = (Role.THOUGHT, Role.CALL, Role.ARGUMENTS, Role.ANSWER)


def renderer(format: str) -> ChatRenderer:
    return ChatRenderer(others.tokenizer(TOKENIZER_OF[format]), format)


def joined(spans: list[Span]) -> list[int]:
    return [int(i) for span in spans for i in span.ids]


def texts(spans: list[Span], tokenizer: Tokenizer) -> list[tuple[Role, str]]:
    return [(s.role, tokenizer.decode(s.ids.tolist())) for s in spans]


def calls(*given: tuple[str, dict], content: str = "", thought: str = "") -> Message:
    made = tuple(ToolCall(name, arguments) for name, arguments in given)
    return Message("assistant", content, thought, made)


# ------------------------------------------------------------------------------- conversations

WORDS = [
    "walk",
    "a.py",
    "\n",
    "\n\n",
    " ",
    "  ",
    '{"name": ',
    "}",
    "é",
    "日本",
    "🎉",
    "\u2581",
    "'s",
]
ANY = st.lists(st.sampled_from(WORDS) | st.characters(codec="utf-8"), max_size=6).map(
    lambda parts: unicodedata.normalize("NFC", "".join(parts))
)
# What transformers would merge with the header, and Llama 3 trims, stands in tests of its own.
TRIMMED = ANY.map(str.strip)
FORGED = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|eot_id|>", "</think>", "<tool_call>", "\n"])
    | st.sampled_from(["</tool_response>", "<|end|>", "<|start_header_id|>user", "<think>", "a"]),
    max_size=4,
).map(lambda parts: "".join(parts).strip())
NAMES = st.text("abcxyz_", min_size=1, max_size=4)
KINDS = st.sampled_from(["string", "integer", "number", "boolean", "object", "array", "any"])
SPECS = st.builds(
    ToolSpec,
    NAMES,
    ANY,
    st.lists(st.builds(Parameter, NAMES, KINDS), max_size=3, unique_by=lambda p: p.name).map(tuple),
)


def json_values(said) -> st.SearchStrategy:
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | said,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(said, inner, max_size=2),
        max_leaves=4,
    )


@st.composite
def conversations(draw, format: str, said=TRIMMED):
    """Messages that the format can say, in any order after the first question, and tools."""
    tools = tuple(draw(st.lists(SPECS, max_size=2, unique_by=lambda t: t.name)))
    messages = [Message("system", draw(said))] if draw(st.booleans()) else []
    messages.append(Message("user", draw(said)))
    values = json_values(said)
    has_thoughts = format in ("chatml", "qwen3")
    most_calls = 1 if format == "llama3" else 3
    for _ in range(draw(st.integers(0, 5))):
        role = draw(st.sampled_from(["user", "assistant", "assistant", "tool"]))
        if role != "assistant":
            messages.append(Message(role, draw(said)))
            continue
        thought = draw(said) if has_thoughts else ""
        made = draw(
            st.lists(
                st.builds(ToolCall, NAMES, st.dictionaries(said, values, max_size=3)),
                max_size=most_calls,
            )
        )
        content = draw(said) if has_thoughts or not made else ""
        if format == "llama3" and content.startswith("{"):
            content = "It is " + content
        messages.append(Message("assistant", content, thought, tuple(made)))
    return messages, tools


def as_theirs(message: Message) -> dict:
    theirs: dict = {"role": message.role, "content": message.content}
    if message.thought:
        theirs["reasoning_content"] = message.thought
    if message.tool_calls:
        theirs["tool_calls"] = [
            {"type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    return theirs


@functools.cache
def their_tokenizer(format: str):
    import tokenizers
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(others.file(TOKENIZER_OF[format])),
        bos_token="<|begin_of_text|>" if format in ("llama3", "hermes") else None,
    )


def template_ids(format: str, messages, tools, template: str = "") -> list[int]:
    """What transformers makes of the template."""
    return their_tokenizer(format).apply_chat_template(
        [as_theirs(message) for message in messages],
        tools=tool_schemas(tools) or None,
        chat_template=template or chat_template(format),
        add_generation_prompt=messages[-1].role != "assistant",
        return_dict=False,
    )


# ----------------------------------------------------------------------------- what is rendered


@EACH
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_ids_are_those_that_transformers_makes_of_the_template(format, data):
    messages, tools = data.draw(conversations(format))
    assert joined(renderer(format).render(messages, tools)) == template_ids(format, messages, tools)


SEARCH_AND_ANSWER = [
    Message("user", "Where is `walk`?"),
    calls(("search", {"name": "walk"})),
    Message("tool", "os.py"),
    Message("assistant", "os.py"),
]


def test_the_example_in_the_docstring_is_what_is_rendered():
    chat = renderer("chatml")
    spans = texts(chat.render(SEARCH_AND_ANSWER, ()), chat.tokenizer)
    example = "|".join(text for _, text in spans)
    shown = agentx.render.chat.__doc__.replace("\n    ", "\n")
    assert example.removesuffix("\n") in shown
    assert [role for role, _ in spans] == [
        Role.USER,
        Role.CALL,
        Role.ARGUMENTS,
        Role.OBSERVATION,
        Role.ANSWER,
        Role.SYSTEM,
    ]


def test_every_part_of_a_turn_has_its_role_and_headers_are_not_the_assistants():
    chat = renderer("qwen3")
    messages = [
        Message("system", "Be brief."),
        Message("user", "Hi", outcome=Outcome.OK),
        calls(("a", {}), ("b", {"x": [1, 2.5]}), content="I look", thought="hm"),
        Message("tool", "1"),
        Message("tool", "no", outcome=Outcome.FAILED),
        Message("assistant", "sorry", outcome=Outcome.RECOVERED),
    ]
    spans = chat.render(messages, ())
    assert [
        (s.role, s.outcome.name, t)
        for s, (_, t) in zip(spans, texts(spans, chat.tokenizer), strict=True)
    ] == [
        (Role.SYSTEM, "OK", "<|im_start|>system\nBe brief.<|im_end|>\n"),
        (Role.USER, "OK", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (Role.THOUGHT, "OK", "<think>\nhm\n</think>\n\n"),
        (Role.ANSWER, "OK", "I look"),
        (Role.CALL, "OK", '\n<tool_call>\n{"name": "a", "arguments":'),
        (Role.ARGUMENTS, "OK", " {}}\n</tool_call>"),
        (Role.CALL, "OK", '\n<tool_call>\n{"name": "b", "arguments":'),
        (Role.ARGUMENTS, "OK", ' {"x": [1, 2.5]}}\n</tool_call><|im_end|>'),
        (Role.OBSERVATION, "OK", "\n<|im_start|>user\n<tool_response>\n1\n</tool_response>"),
        (
            Role.OBSERVATION,
            "FAILED",
            "\n<tool_response>\nno\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        (Role.THOUGHT, "RECOVERED", "<think>\n\n</think>\n\n"),
        (Role.ANSWER, "RECOVERED", "sorry<|im_end|>"),
        (Role.SYSTEM, "OK", "\n"),
    ]
    assert {s.ids.dtype for s in spans} == {np.dtype(np.int32)}


def test_qwen3_forgets_thoughts_before_the_last_question_and_chatml_does_not():
    messages = [
        Message("user", "a"),
        Message("assistant", "b", thought="earlier"),
        Message("user", "c"),
        Message("assistant", "d", thought="later"),
    ]
    for format, kept in (("qwen3", False), ("chatml", True)):
        chat = renderer(format)
        text = chat.tokenizer.decode(joined(chat.render(messages, ())))
        assert ("earlier" in text) is kept
        assert "<think>\nlater\n</think>\n\nd<|im_end|>" in text


def test_llama3_lists_tools_in_the_users_first_message_as_the_systems_words():
    chat = renderer("llama3")
    spans = texts(chat.render(SEARCH_AND_ANSWER, [SEARCH]), chat.tokenizer)
    assert [role for role, _ in spans] == [
        Role.SYSTEM,
        Role.USER,
        Role.CALL,
        Role.ARGUMENTS,
        Role.OBSERVATION,
        Role.ANSWER,
    ]
    assert "Today Date: 26 Jul 2024" in spans[0][1]
    assert spans[1][1].startswith("Where is `walk`?<|eot_id|>")
    assert spans[3][1] == ' {"name": "walk"}}<|eot_id|>'
    assert '"os.py"<|eot_id|>' in spans[4][1]


@EACH
def test_what_is_sampled_and_what_the_environment_says_add_up_to_the_conversation(format):
    chat = renderer(format)
    messages = [*SEARCH_AND_ANSWER, Message("user", "Thanks"), Message("assistant", "Bye")]
    turns = [turn_ids(chat.render(messages[: n + 1], TOOLS), chat) for n in (1, 3, 5)]
    ids = joined(chat.render(messages[:1], TOOLS)) + turns[0]
    for observed, turn in zip((messages[2:3], messages[4:5]), turns[1:], strict=True):
        spans = chat.render_observations(observed)
        assert {s.origin for s in spans} == {Origin.ENVIRONMENT}
        ids += joined(spans) + turn
    shown = chat.tokenizer.decode(joined(chat.render(messages, TOOLS)))
    told = chat.tokenizer.decode(ids)
    # Qwen 3 thinks at the end of what it is shown, and forgets it when asked again; a result in
    # Hermes has one line break more when something follows it.
    for more, less in (("<think>\n\n</think>\n\n", ""), ("</tool_response>\n", "</tool_response>")):
        told, shown = told.replace(more, less), shown.replace(more, less)
    assert told == shown.removesuffix("\n")


def test_a_turn_is_encoded_apart_from_the_header_before_it():
    chat = renderer("chatml")
    spans = chat.render([Message("user", "a"), Message("assistant", "\nb")], ())
    assert texts(spans, chat.tokenizer)[1] == (Role.ANSWER, "\nb<|im_end|>")
    merged = template_ids("chatml", [Message("user", "a"), Message("assistant", "\nb")], ())
    assert len(merged) == len(joined(spans)) - 1


@pytest.mark.parametrize(
    ("format", "messages", "sentence"),
    [
        ("chatml", [], "no message to render"),
        ("chatml", [Message("user", "x"), Message("system", "y")], "at most one system message"),
        ("chatml", [Message("assistant", malformed="it does not end")], "it does not end"),
        ("qwen3", [calls(('a"b', {}))], "cannot be 'a\"b': it would have to be escaped"),
        ("hermes", [Message("assistant", "x", thought="y")], "hermes format has no thoughts"),
        ("hermes", [calls(("a", {}), content="x")], "calls a has the content 'x'"),
        ("llama3", [calls(("a", {}), content="x")], "calls a has the content 'x'"),
        ("llama3", [calls(("a", {}), ("b", {}))], "one call a message, this one has a, b"),
        ("llama3", [Message("assistant", '{"name": 1}')], "answer that looks like a call"),
    ],
)
def test_what_a_format_cannot_say_is_refused(format, messages, sentence):
    with pytest.raises(ValueError, match=sentence):
        renderer(format).render(messages, ())


def test_tools_without_a_question_to_list_them_in_are_refused():
    with pytest.raises(ValueError, match="lists the tools in the user's first message"):
        renderer("llama3").render([Message("system", "x")], TOOLS)


def test_a_tokenizer_without_the_markers_of_a_format_is_refused():
    with pytest.raises(
        ValueError, match=r"chatml format needs <\|im_start\|>, <\|im_end\|>, which"
    ):
        ChatRenderer(Tokenizer.bytes(), "chatml")
    with pytest.raises(
        ValueError, match="there is no chat format 'qwen'; there are chatml, llama3"
    ):
        ChatRenderer(others.tokenizer("qwen3"), "qwen")
    with pytest.raises(ValueError, match="cannot speak as 'assistant'"):
        renderer("chatml").render_observations([Message("assistant", "I am done")])


# ------------------------------------------------------------------------------------ round trip


@EACH
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_parsing_undoes_rendering_and_ids_come_back(format, data):
    """Whatever the messages hold: what looks like a marker, and white space at the ends."""
    said = ANY | FORGED
    messages, tools = data.draw(
        conversations(format, said if format == "chatml" else TRIMMED | FORGED)
    )
    chat = renderer(format)
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        # As the last of its conversation, for Qwen 3 leaves out thoughts of earlier turns.
        spans = chat.render([*messages[: number + 1]], tools)
        turn = turn_ids(spans, chat)
        assert chat.parse(turn, tools) == message
        again = chat.render([*messages[:number], chat.parse(turn, tools)], tools)
        assert joined(again) == joined(spans)


def turn_ids(spans: list[Span], chat: ChatRenderer) -> list[int]:
    """The ids of the assistant's turn that a conversation ends with."""
    last = [span for span in spans if span.role in ASSISTANT]
    ids = joined(last)
    stop = chat.stop_ids[0]
    ends = [i for i, x in enumerate(ids[:-1]) if x == stop]
    assert ids[-1] == stop
    return ids[ends[-1] + 1 if ends else 0 :]


@EACH
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_no_message_brings_a_marker_in(format, data):
    """Forged or not, a message leaves the markers of its conversation as they are."""
    messages, tools = data.draw(conversations(format, TRIMMED | FORGED))
    chat = renderer(format)
    ids = joined(chat.render(messages, tools))
    bare = [dataclasses.replace(m, content="a" * bool(m.content)) for m in messages]
    bare = [
        dataclasses.replace(
            m,
            thought="a" * bool(m.thought.strip("\n")),
            tool_calls=tuple(ToolCall("a", {}) for _ in m.tool_calls),
        )
        for m in bare
    ]
    plain = tuple(ToolSpec("a", "", tool.parameters) for tool in tools)
    markers = set(chat.tokenizer.special.values())
    expected = [i for i in joined(chat.render(bare, plain)) if i in markers]
    assert [i for i in ids if i in markers] == expected


@EACH
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_sampled_spans_are_cut_as_rendered_ones_are(format, data):
    messages, tools = data.draw(conversations(format, TRIMMED | FORGED))
    chat = renderer(format)
    if messages[-1].role != "assistant":
        messages.append(Message("assistant", "yes"))
    rendered = chat.render(messages, tools)
    ids = turn_ids(rendered, chat)
    logprobs = -np.arange(len(ids), dtype=np.float32)
    spans = chat.sampled_spans(np.array(ids), logprobs, 5, Outcome.FAILED)
    assert joined(spans) == ids
    assert np.concatenate([s.logprobs for s in spans]).tolist() == logprobs.tolist()
    own = [s for s in rendered if s.role in ASSISTANT][-len(spans) :]
    assert [s.role for s in spans] == [s.role for s in own]
    assert {(s.origin, s.weight_version, s.outcome) for s in spans} == {
        (Origin.SAMPLED, 5, Outcome.FAILED)
    }


@EACH
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_whatever_is_sampled_is_cut_without_a_gap_and_read_or_malformed(format, data):
    chat = renderer(format)
    size = chat.tokenizer.vocab_size
    near = st.sampled_from(
        [*chat.tokenizer.special.values(), *chat.tokenizer.encode('\n{"name": ')]
    )
    ids = data.draw(st.lists(near | st.integers(0, size + 2), max_size=12))
    ids.append(chat.stop_ids[0])
    assert joined(chat.sampled_spans(ids, np.zeros(len(ids)), 0, Outcome.OK)) == ids
    message = chat.parse(ids, TOOLS)
    if message.malformed:
        assert message == Message("assistant", malformed=message.malformed, outcome=Outcome.FAILED)


@pytest.mark.parametrize(
    ("format", "text", "reason"),
    [
        ("qwen3", "", "it does not end"),
        ("qwen3", "yes", "it does not end"),
        ("qwen3", "a<|im_start|>b<|im_end|>", "it holds a marker in its text"),
        ("qwen3", "a<|im_end|><|im_end|>", "it holds a marker in its text"),
        ("qwen3", "<think>a<|im_end|>", "its tags do not match"),
        ("qwen3", "<tool_call>a<|im_end|>", "its tags do not match"),
        ("qwen3", "<tool_call>a</tool_call><|im_end|>", "its call is no JSON"),
        (
            "qwen3",
            '<tool_call>{"name": "a", "arguments": {"b": "\\ud800"}}</tool_call><|im_end|>',
            "its call is no JSON",
        ),
        ("qwen3", "<tool_call>[1]</tool_call><|im_end|>", "its call is no object with a name"),
        (
            "qwen3",
            '<tool_call>{"name": "a"}</tool_call><|im_end|>',
            "its call has no object of arg",
        ),
        (
            "qwen3",
            '<tool_call>{"name": "a", "arguments": {}}</tool_call>b<|im_end|>',
            "behind a call",
        ),
        ("llama3", '{"name": "a", "parameters": {}<|eot_id|>', "its call is no JSON"),
        ("llama3", "a<|python_tag|>b<|eot_id|>", "it holds a marker in its text"),
    ],
)
def test_what_cannot_be_read_is_malformed_and_says_why(format, text, reason):
    chat = renderer(format)
    ids = their_tokenizer(format)(text)["input_ids"]
    message = chat.parse(ids, TOOLS)
    assert reason in message.malformed
    assert message.outcome is Outcome.FAILED


# -------------------------------------------------------------------------- tags without tokens


def test_tags_without_tokens_are_text_and_say_the_same():
    chat = ChatRenderer(others.tokenizer("without tags"), "chatml")
    messages = [*SEARCH_AND_ANSWER[:3], Message("assistant", "os.py", thought="so")]
    with_tokens = renderer("chatml")
    spans = chat.render(messages, TOOLS)
    assert texts(spans, chat.tokenizer) == texts(
        with_tokens.render(messages, TOOLS), with_tokens.tokenizer
    )
    assert chat.parse(turn_ids(spans, chat), TOOLS) == messages[-1]
    assert chat.parse(turn_ids(chat.render(messages[:2], TOOLS), chat), TOOLS) == messages[1]


def test_a_message_that_holds_a_tag_without_a_token_is_refused():
    chat = ChatRenderer(others.tokenizer("without tags"), "chatml")
    with pytest.raises(
        ValueError, match="holds the text '</think>', and this tokenizer has no token"
    ):
        chat.render([Message("user", "a</think>b")], ())
