"""Tool environments: what a call may do, how it fails, and when an episode ends."""

import asyncio
import time

import pytest
from fakes import EchoEnv, EchoTasks, say

from agentx.env.base import CallRecord, Rubric, Task
from agentx.env.tools import Tool, ToolEnv, ToolError, check_arguments
from agentx.trajectory import Message, Outcome, Parameter, ToolCall, ToolSpec

TASK = Task("t", "Say hello.", "hello")
REPEAT = ToolSpec("repeat", "repeats", (Parameter("text"), Parameter("times", "integer")))
WAIT = ToolSpec("wait", "never comes back")
BREAK = ToolSpec("break", "is broken")
REFUSE = ToolSpec("refuse", "says no")


async def repeat(text: str, times: int) -> str:
    return text * times


async def wait() -> str:
    await asyncio.sleep(3600)
    return "at last"


async def break_() -> str:
    raise RuntimeError("a bug in a tool")


async def refuse() -> str:
    raise ToolError("error: no")


def right(task: Task, messages) -> float:
    return float(messages[-1].role == "assistant" and messages[-1].content == task.answer)


def num_calls(task: Task, messages) -> float:
    return float(sum(len(m.tool_calls) for m in messages))


def make_env(max_calls: int = 10) -> ToolEnv:
    runs = ((REPEAT, repeat), (WAIT, wait), (BREAK, break_), (REFUSE, refuse))
    rubric = Rubric(right=(1.0, right), num_calls=(-0.125, num_calls))
    tools = [Tool(spec, run) for spec, run in runs]
    return ToolEnv(tools, rubric, max_calls=max_calls, tool_timeout_s=0.05)


def call(tool: str, /, **arguments: object) -> Message:
    return Message("assistant", tool_calls=(ToolCall(tool, arguments),))


def play(env, *messages: Message, task: Task = TASK):
    """The observations of an episode."""

    async def episode():
        await env.reset(task)
        return [await env.step(m) for m in messages]

    return asyncio.run(episode())


def test_an_episode_begins_with_the_prompt_and_ends_with_the_answer():
    env = make_env()
    assert asyncio.run(env.reset(TASK)) == [Message("user", "Say hello.")]
    asked, answered = play(env, call("repeat", text="ab", times=2), Message("assistant", "hello"))
    assert asked.messages == (Message("tool", "abab"),)
    assert not asked.done
    assert answered.done
    assert answered.messages == ()
    assert answered.reward == 1.0 - 0.125
    assert answered.info == {"rewards": {"right": 1.0, "num_calls": 1.0}}
    assert env.calls == [
        CallRecord("repeat", {"text": "ab", "times": 2}, "abab", valid=True, failed=False)
    ]


def test_arguments_count_by_name_not_by_the_order_they_came_in():
    (observation,) = play(make_env(), call("repeat", times=2, text="ab"))
    assert observation.messages == (Message("tool", "abab"),)


@pytest.mark.parametrize(
    ("message", "error", "valid"),
    [
        (call("sing"), "error: no such tool", False),
        (call("repeat", text="ab"), "error: missing argument times", False),
        (call("repeat"), "error: missing argument text", False),
        (call("repeat", text="a", times=1, more="x"), "error: too many arguments", False),
        (call("repeat", text="a", times="1"), "error: times is no integer", False),
        (call("repeat", text="a", times=1.0), "error: times is no integer", False),
        (call("repeat", text="a", times=True), "error: times is no integer", False),
        (call("repeat", text=7, times=1), "error: text is no string", False),
        (call("refuse"), "error: no", True),
        (call("wait"), "error: wait timed out after 0.05 s", True),
        (
            Message("assistant", malformed="it does not end"),
            "error: malformed call, it does not end",
            False,
        ),
    ],
)
def test_a_call_that_fails_is_answered_with_its_error_and_the_episode_goes_on(
    message, error, valid
):
    env = make_env()
    failed, fine = play(env, message, call("repeat", text="x", times=1))
    assert failed.messages == (Message("tool", error, outcome=Outcome.FAILED),)
    assert not failed.done
    assert fine.messages == (Message("tool", "x"),)
    assert [(c.observation, c.valid, c.failed) for c in env.calls] == [
        (error, valid, True),
        ("x", True, False),
    ]


@pytest.mark.parametrize(
    ("json_type", "good", "bad"),
    [
        ("string", ["", "x"], [1, None, ["x"]]),
        ("integer", [0, -3], [0.5, "3", False]),
        ("number", [0, 0.5], ["0.5", True]),
        ("boolean", [True, False], [0, "true"]),
        ("object", [{}, {"a": 1}], [[], "{}"]),
        ("array", [[], [1]], [{}, "[]"]),
        ("any", [None, True, 1, "x", [], {}], []),
    ],
)
def test_arguments_must_be_of_their_declared_type(json_type, good, bad):
    spec = ToolSpec("t", "", (Parameter("value", json_type),))
    for value in good:
        check_arguments(spec, {"value": value})
    for value in bad:
        with pytest.raises(ToolError, match=f"error: value is no {json_type}"):
            check_arguments(spec, {"value": value})


def test_a_tool_that_hangs_is_cut_off_in_time():
    start = time.perf_counter()
    play(make_env(), *[call("wait")] * 3)
    assert 0.14 < time.perf_counter() - start < 2


def test_a_bug_in_a_tool_is_not_an_observation():
    with pytest.raises(RuntimeError, match="a bug in a tool"):
        play(make_env(), call("break"))


def test_an_episode_ends_when_its_calls_are_used_up():
    env = make_env(max_calls=2)
    first, second = play(env, call("refuse"), call("repeat", text="hello", times=1))
    assert not first.done
    assert second.done
    assert second.messages == (Message("tool", "hello"),)
    assert second.reward == -0.25


def test_malformed_messages_use_up_calls_too():
    message = Message("assistant", malformed="it is empty")
    assert [o.done for o in play(make_env(max_calls=2), message, message)] == [False, True]


def test_a_reset_forgets_the_episode_before():
    env = make_env(max_calls=2)
    play(env, call("refuse"), call("refuse"))
    (observation,) = play(env, Message("assistant", "hello"))
    assert env.calls == []
    assert observation.info == {"rewards": {"right": 1.0, "num_calls": 0.0}}


def test_a_rubric_is_a_weighted_sum_and_names_its_parts():
    rubric = Rubric(right=(2.0, right), num_calls=(-0.5, num_calls))
    messages = [call("a"), call("b"), Message("assistant", "hello")]
    assert rubric.score(TASK, messages) == (1.0, {"right": 1.0, "num_calls": 2.0})
    with pytest.raises(ValueError, match="at least one"):
        Rubric()


@pytest.mark.parametrize(("max_calls", "timeout"), [(0, 1.0), (3, 0.0)])
def test_an_environment_without_calls_or_time_is_refused(max_calls, timeout):
    with pytest.raises(ValueError, match=f"got {max_calls} and {timeout}"):
        ToolEnv([], Rubric(right=(1.0, right)), max_calls=max_calls, tool_timeout_s=timeout)


def test_the_echo_environment_echoes():
    task = EchoTasks().task(3)
    echoed, answered = play(EchoEnv(), say("a"), Message("assistant", "3"), task=task)
    assert echoed.messages == (Message("tool", "a"),)
    assert (answered.done, answered.reward) == (True, 1.0)
    with pytest.raises(RuntimeError, match="the world ended"):
        play(EchoEnv(crash_at=1), say("a"), task=task)
