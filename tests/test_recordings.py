"""What training reads: recorded by running the tools, with real failures, and without a leak."""

import asyncio
import functools
import itertools
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agentx.data.formats import Conversation, read_documents
from agentx.env.base import Task
from agentx.env.tasks.corpus import made_up, name_fragments, standard_library
from agentx.env.tasks.expert import Demonstration, instructed_session, repetition
from agentx.env.tasks.library import NEW_TOOL, TIMED_OUT, TOOLS, LibraryEnv, LibraryTasks
from agentx.env.tasks.recordings import RecordingConfig, message_record, record, text_documents
from agentx.trajectory import Message, Outcome, ToolCall

CONFIG = RecordingConfig(
    num_sessions=150,
    num_demonstrations=150,
    text_characters=300_000,
    rate_cold=0.3,
    slip_rate=0.3,
)


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


@functools.cache
def recorded() -> tuple[dict[str, int], dict[str, str]]:
    """The counts and the three files of one small recording."""
    with tempfile.TemporaryDirectory() as folder:
        counts = record(CONFIG, Path(folder))
        names = ("text", "sessions", "demonstrations")
        return counts, {n: (Path(folder) / f"{n}.jsonl").read_text("utf-8") for n in names}


@functools.cache
def conversations(name: str) -> list[Conversation]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.jsonl"
        path.write_text(recorded()[1][name], "utf-8")
        return list(read_documents(path))


def sessions(num: int, **rates: float) -> list[tuple[Demonstration, LibraryEnv]]:
    """Instructed sessions over known made-up corpora, and warm environments to try them again."""
    fragments = name_fragments(standard_library("train"))
    found = []
    for seed in range(num):
        corpus = made_up(rng(seed), fragments)
        session = asyncio.run(instructed_session(rng(seed), fragments, corpus=corpus, **rates))
        found.append((session, LibraryEnv(corpus, 0.0, session.tools, max_calls=1000)))
    return found


def questions(messages: tuple[Message, ...]) -> Iterator[list[Message]]:
    """The messages between a question and its answer, for every question."""
    calls: list[Message] = []
    for message in messages:
        if message.role == "user":
            calls = []
        elif message.role == "assistant" and not message.tool_calls:
            yield calls
        else:
            calls.append(message)


def replay(env: LibraryEnv, messages: tuple[Message, ...]) -> int:
    """Makes every call again; returns how many there were.

    The environment is warm: a time-out can only be told from what the recording says of it.
    """

    async def again() -> int:
        await env.reset(Task("", "", ""))
        count = 0
        for said, heard in itertools.pairwise(messages):
            if not said.tool_calls:
                continue
            count += 1
            observation = await env.step(said)
            assert heard == observation.messages[0] or heard.content == TIMED_OUT
        return count

    return asyncio.run(again())


# ------------------------------------------------------------------------------------ the files


def test_the_files_hold_as_many_documents_as_was_asked_for_in_formats_that_data_reads(tmp_path):
    counts, files = recorded()
    assert counts["sessions"] == len(conversations("sessions")) == 150
    assert counts["demonstrations"] == len(conversations("demonstrations")) == 150
    (tmp_path / "text.jsonl").write_text(files["text"], "utf-8")
    texts = [document.text for document in read_documents(tmp_path / "text.jsonl", field="text")]
    assert texts == list(text_documents(CONFIG))
    assert counts["text"] == len(texts)


def test_the_same_seed_records_the_same_bytes_and_another_seed_others(tmp_path):
    small = {"num_sessions": 5, "num_demonstrations": 5, "text_characters": 5000}
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        record(RecordingConfig(**small, seed=seed), tmp_path / folder)
    for name in ("text", "sessions", "demonstrations"):
        a, b, c = ((tmp_path / folder / f"{name}.jsonl").read_bytes() for folder in "abc")
        assert a == b != c


def test_text_is_source_of_the_train_split_cut_at_line_ends():
    lines = {line for path, ls in standard_library("train").files.items() for line in ls}
    texts = list(text_documents(CONFIG))
    assert {line for text in texts for line in text.split("\n")} <= lines
    total = sum(len(text) + 1 for text in texts)
    assert 300_000 <= total <= 300_000 + 2 * max(map(len, texts))


def test_a_message_is_written_without_what_is_empty():
    call = ToolCall("open", {"path": "a.py", "line": 3})
    message = Message("assistant", tool_calls=(call,), outcome=Outcome.RECOVERED)
    assert message_record(message) == {
        "role": "assistant",
        "tool_calls": [{"name": "open", "arguments": {"path": "a.py", "line": 3}}],
        "outcome": "recovered",
    }
    assert message_record(Message("tool")) == {"role": "tool"}


@pytest.mark.parametrize("name", ["num_sessions", "num_rounds", "num_demonstrations"])
def test_nothing_to_record_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        RecordingConfig(**{name: 0})


def test_more_demonstrations_than_there_are_questions_are_refused(tmp_path):
    config = RecordingConfig(num_sessions=1, num_demonstrations=10**6, text_characters=10)
    with pytest.raises(ValueError, match=r"num_demonstrations is 1000000 but .* at most \d+"):
        record(config, tmp_path)


# ------------------------------------------------------------------------------------ no leak


@pytest.mark.parametrize("split", ["dev", "held_out"])
def test_no_function_that_evaluation_asks_about_is_in_the_text_or_the_demonstrations(split):
    tasks = LibraryTasks(split)
    asked = {tasks.question(i).function.name for i in range(len(tasks))}
    for name in ("text", "demonstrations"):
        spelled = "\n".join(_strings(recorded()[1][name]))
        words = set(re.findall(r"\w+", spelled))
        assert len(words) > 500
        assert not asked & words


def test_the_new_tool_is_in_no_recording():
    for content in recorded()[1].values():
        assert not re.search(rf"\b{NEW_TOOL.name}\b", content)
        assert NEW_TOOL.description not in content


def test_demonstrations_offer_the_tools_of_evaluation_and_some_sessions_renamed_ones():
    assert {c.tools for c in conversations("demonstrations")} == {TOOLS}
    renamed = [c.tools for c in conversations("sessions") if c.tools != TOOLS]
    assert 0.15 < len(renamed) / 150 < 0.45
    for tools in renamed:
        assert [t.parameters for t in tools] == [t.parameters for t in TOOLS]


def _strings(lines: str) -> Iterator[str]:
    """All strings of JSONL, decoded, so that an escape does not stick to a word."""
    waiting = [json.loads(line) for line in lines.splitlines()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


# ------------------------------------------------------------------------------------ real calls


def test_every_observation_of_a_demonstration_comes_from_running_the_tool():
    env = LibraryEnv(standard_library("train"), 0.0, max_calls=1000)
    counts = [replay(env, c.messages) for c in conversations("demonstrations")]
    assert min(counts) >= 2
    assert max(counts) > 2


def test_every_observation_of_a_session_comes_from_running_the_tool():
    recorded_sessions = sessions(60, slip_rate=0.4, rate_cold=0.3)
    assert sum(replay(env, session.messages) for session, env in recorded_sessions) > 100


def test_a_session_answers_with_what_its_last_call_found_or_with_the_names_it_was_given():
    for session, _ in sessions(60):
        for question, (*calls, last) in _rounds(session.messages):
            if not calls:
                assert last.content.split("\n") == re.findall("`(.+?)`", question)
            elif " open" in question or question.startswith("open:"):
                assert re.search(rf"[( ]{re.escape(last.content)}\b", calls[-1].content)
            else:
                assert last.content == calls[-1].content.split("\n")[0]


def test_demonstrations_end_with_the_answer_within_the_calls_of_an_episode():
    tasks = LibraryTasks("train")
    answers = {tasks.task(i).prompt: tasks.task(i).answer for i in range(len(tasks))}
    for conversation in conversations("demonstrations"):
        prompt, *_, last = conversation.messages
        assert last == Message("assistant", answers[prompt.content])
        (calls,) = questions(conversation.messages)
        assert 2 <= len(calls) / 2 <= tasks.max_calls


def _rounds(messages: tuple[Message, ...]) -> Iterator[tuple[str, list[Message]]]:
    starts = [i for i, m in enumerate(messages) if m.role == "user"]
    for start, stop in zip(starts, [*starts[1:], len(messages)], strict=True):
        yield messages[start].content, list(messages[start + 1 : stop])


# ------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("name", ["sessions", "demonstrations"])
def test_failed_calls_are_marked_and_followed_by_a_recovery(name):
    num_recovered = 0
    for conversation in conversations(name):
        for messages in questions(conversation.messages):
            calls, replies = messages[::2], messages[1::2]
            before = Outcome.OK
            for call, reply in zip(calls, replies, strict=True):
                failed = reply.content.startswith("error:")
                assert reply.outcome is (Outcome.FAILED if failed else Outcome.OK)
                good = Outcome.RECOVERED if before is Outcome.FAILED else Outcome.OK
                assert call.outcome is (Outcome.FAILED if failed else good)
                before = call.outcome
                num_recovered += call.outcome is Outcome.RECOVERED
            assert before is not Outcome.FAILED
    assert num_recovered > 20


@pytest.mark.parametrize("name", ["sessions", "demonstrations"])
def test_a_failed_call_is_made_again_the_right_way(name):
    for conversation in conversations(name):
        for messages in questions(conversation.messages):
            calls = messages[::2]
            for call, then in itertools.pairwise(calls):
                if call.outcome is Outcome.FAILED:
                    assert then.tool_calls[0].name == call.tool_calls[0].name
            worked = [c for c in calls if c.outcome is not Outcome.FAILED]
            assert bool(worked) == bool(calls)
            assert len({c.tool_calls[0].name for c in worked}) == len(worked) <= 2


def test_calls_fail_for_all_the_reasons_there_are():
    errors = {
        message.content
        for name in ("sessions", "demonstrations")
        for conversation in conversations(name)
        for message in conversation.messages
        if message.role == "tool" and message.outcome is Outcome.FAILED
    }
    assert errors == {
        "error: no such function",
        "error: no such file",
        "error: missing argument line",
        "error: not a sum",
        TIMED_OUT,
    }


def test_without_slips_and_cold_tools_nothing_fails():
    for session, _ in sessions(20, slip_rate=0.0, rate_cold=0.0):
        assert {m.outcome for m in session.messages} == {Outcome.OK}


def test_repetitions_are_lists_of_one_to_four_names_each_followed_by_its_copy():
    fragments = name_fragments(standard_library("train"))
    lengths = set()
    for seed in range(20):
        messages = repetition(rng(seed), fragments, num_names=20).messages
        copied = 0
        for request, answer in zip(messages[::2], messages[1::2], strict=True):
            assert (request.role, answer.role) == ("user", "assistant")
            names = answer.content.split("\n")
            assert request.content == "repeat:" + ",".join(f"`{name}`" for name in names)
            lengths.add(len(names))
            copied += len(names)
        assert 20 <= copied <= 23
    assert lengths == {1, 2, 3, 4}
