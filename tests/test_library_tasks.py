"""The quickstart's tasks: two dependent calls, answers that cannot be guessed, no leaks.

The standard library is parsed once (some seconds) and cached by the code under test itself.
"""

import asyncio
import functools
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from agentx.env.base import Task
from agentx.env.tasks.corpus import (
    Corpus,
    Function,
    made_up,
    made_up_name,
    name_fragments,
    split_of,
    standard_library,
)
from agentx.env.tasks.expert import demonstrate, instructed_session
from agentx.env.tasks.library import (
    KINDS,
    NEW_TOOL,
    TIMED_OUT,
    TOOLS,
    LibraryEnv,
    LibraryTasks,
    exact_answer,
    questions_of,
)
from agentx.trajectory import Message, Outcome, ToolCall

SPLITS = ("train", "dev", "held_out")
LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def call(tool: str, /, **arguments: object) -> Message:
    return Message("assistant", tool_calls=(ToolCall(tool, arguments),))


def play(env: LibraryEnv, task: Task, *messages: Message):
    async def episode():
        await env.reset(task)
        return [await env.step(m) for m in messages]

    return asyncio.run(episode())


def expert(tasks: LibraryTasks, index: int, *, slip_rate: float = 0.0, seed: int = 0):
    """The expert's demonstration of a task and the environment it was played in."""
    env = tasks.env()
    question, task = tasks.question(index), tasks.task(index, seed)
    return asyncio.run(demonstrate(question, task, env, rng(seed), slip_rate)), env


@functools.cache
def questions(split: str):
    tasks = LibraryTasks(split)
    return [tasks.question(i) for i in range(len(tasks))]


@functools.cache
def words_on_disk(split: str) -> set[str]:
    """Every word of the split's files and paths, read anew."""
    found: set[str] = set()
    for path in standard_library(split).files:
        found.update(re.findall(r"\w+", path))
        found.update(re.findall(r"\w+", (LIBRARY / path).read_text(encoding="utf-8")))
    return found


SMALL = Corpus(
    files={
        "os.py": ["import sys", "", "def walk(top, topdown):", "    pass"],
        "empty.py": ["x = 1"],
    },
    functions={
        "os.py": (
            Function("walk", "os.py", 3, "def walk(top, topdown):", "top"),
            *(Function(f"f{i}", "os.py", 3 + i, f"def f{i}():", "") for i in range(1, 5)),
        ),
        "empty.py": (),
    },
)
WARM = Task("t", "", "top")


# ------------------------------------------------------------------------------------ tools


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (call("search", name="walk"), "os.py\n3"),
        (call("search", name="wal"), "error: no such function"),
        (call("open", path="os.py", line=3), "def walk(top, topdown):"),
        (call("open", path="os.py", line=4), "pass"),
        (call("open", path="os.py", line=5), "error: no such line, 4 in all"),
        (call("open", path="os.py", line=0), "error: no such line, 4 in all"),
        (call("open", path="so.py", line=3), "error: no such file"),
        (call("open", line=3, path="os.py"), "def walk(top, topdown):"),
        (call("open", path="os.py", line="3"), "error: line is no integer"),
        (call("open", path="os.py"), "error: missing argument line"),
        (call("list", path="os.py"), "walk\nf1\nf2"),
        (call("list", path="empty.py"), "no functions"),
        (call("list", path=""), "error: no such file"),
        (call("calculate", sum="64+26"), "90"),
        (call("calculate", sum=" -3 * 4 "), "-12"),
        (call("calculate", sum="4-10"), "-6"),
        (call("calculate", sum="4+"), "error: not a sum"),
        (call("calculate", sum="__import__('os')"), "error: not a sum"),
        (call("calculate", sum="2**9"), "error: not a sum"),
    ],
)
def test_tools_answer_from_the_corpus(message, text):
    (observation,) = play(LibraryEnv(SMALL, 0.0), WARM, message)
    outcome = Outcome.FAILED if text.startswith("error:") else Outcome.OK
    assert observation.messages == (Message("tool", text, outcome=outcome),)


def test_a_cold_tool_times_out_once_and_then_works():
    search, listed = call("search", name="walk"), call("list", path="os.py")
    env = LibraryEnv(SMALL, 1.0)
    texts = [o.messages[0].content for o in play(env, WARM, search, search, listed, listed)]
    assert texts == [TIMED_OUT, "os.py\n3", TIMED_OUT, "walk\nf1\nf2"]
    assert [c.valid for c in env.calls] == [True] * 4


def test_the_seed_of_a_task_fixes_which_tools_are_cold():
    calls = [
        call("search", name="walk"),
        call("open", path="os.py", line=3),
        call("list", path="os.py"),
        call("calculate", sum="1+1"),
    ]

    def cold(seed: int) -> tuple[bool, ...]:
        played = play(LibraryEnv(SMALL, 0.15), Task("t", "", "", seed=seed), *calls)
        return tuple(o.messages[0].content == TIMED_OUT for o in played)

    worlds = [cold(seed) for seed in range(200)]
    assert worlds[:50] == [cold(seed) for seed in range(50)]
    assert len(set(worlds)) > 5
    assert 0.11 < np.mean(worlds) < 0.19  # three standard errors about 0.15, 800 draws


@pytest.mark.parametrize(
    ("last", "reward"),
    [
        (Message("assistant", "top"), 1.0),
        (Message("assistant", " top\n"), 1.0),
        (Message("assistant", "top, topdown"), 0.0),
        (Message("assistant", "Top"), 0.0),
        (Message("assistant"), 0.0),
        (Message("assistant", "top", malformed="it does not end"), 0.0),
        (Message("assistant", "top", tool_calls=(ToolCall("top", {}),)), 0.0),
        (Message("tool", "top"), 0.0),
    ],
)
def test_only_the_exact_answer_is_worth_something(last, reward):
    assert exact_answer(WARM, [Message("user", "?"), last]) == reward


def test_an_episode_ends_after_five_calls_without_a_reward():
    observations = play(LibraryTasks("dev").env(), WARM, *[call("calculate", sum="1+1")] * 5)
    assert [o.done for o in observations] == [False] * 4 + [True]
    assert observations[-1].reward == 0.0


# ------------------------------------------------------------------------------------ the corpus


def test_a_library_is_read_as_it_stands_on_disk(tmp_path):
    paths = [f"{letter}.py" for letter in "abcdefghijklmnop"]
    good, broken, latin, tested = [p for p in paths if split_of(p) == "train"][:4]
    (tmp_path / good).write_text(
        "x = '''\x0c'''\n\x0c\nclass A:\n    def f(self, one, two=2):\n        pass\n\n"
        "    @property\n    def g(self):\n        def inner(\n            far):\n            pass\n"
        "async def h(a): pass\ndef k(*, only): pass\n"
    )
    (tmp_path / broken).write_text("def f(:\n")
    (tmp_path / latin).write_bytes(b"x = '\xe9'\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / tested).write_text("def f(): pass\n")
    corpus = standard_library("train", tmp_path)
    assert list(corpus.files) == [good]
    assert corpus.functions[good] == (
        Function("f", good, 4, "def f(self, one, two=2):", "one"),
        Function("g", good, 8, "def g(self):", ""),
        Function("inner", good, 9, "def inner(", ""),
        Function("k", good, 13, "def k(*, only): pass", ""),
    )
    assert len(corpus.files[good]) == 13
    for function in corpus.functions[good]:
        assert corpus.files[good][function.line - 1].strip() == function.signature
        assert corpus.find(function.name) == [function]


def test_a_folder_without_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no Python source of the dev split"):
        standard_library("dev", tmp_path)


def test_every_function_stands_where_the_corpus_says():
    for split in SPLITS:
        corpus = standard_library(split)
        for path, functions in corpus.functions.items():
            for function in functions:
                assert corpus.files[path][function.line - 1].strip() == function.signature
                assert re.match(rf"def\s+{function.name}\b", function.signature)


def test_made_up_corpora_repeat_from_their_seed_and_hold_what_they_say():
    fragments = name_fragments(standard_library("train"))
    one, same, other = (made_up(rng(seed), fragments) for seed in (1, 1, 2))
    assert one.functions == same.functions != other.functions
    for seed in range(30):
        corpus = made_up(rng(seed), fragments)
        for path, functions in corpus.functions.items():
            lines = corpus.files[path]
            defined = [i + 1 for i, line in enumerate(lines) if line]
            assert defined == sorted(f.line for f in functions)
            for f in functions:
                assert lines[f.line - 1] == f.signature
                assert re.search(rf"[( ]{re.escape(f.first_parameter)}\b", f.signature)


def test_made_up_names_are_identifiers():
    fragments = name_fragments(standard_library("train"))
    draw = rng(3)
    names = {made_up_name(draw, fragments) for _ in range(500)}
    assert len(names) > 450
    assert all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) for name in names)


# ------------------------------------------------------------------------------------ the splits


def test_files_are_split_by_their_path_alone():
    paths = ("json/decoder.py", "ast.py", "os.py")
    assert tuple(split_of(path) for path in paths) == SPLITS
    shares = Counter(split_of(f"folder/file_{i}.py") for i in range(5000))
    assert shares["train"] / 5000 == pytest.approx(0.7, abs=0.03)
    assert shares["dev"] / 5000 == pytest.approx(0.1, abs=0.02)
    assert shares["held_out"] / 5000 == pytest.approx(0.2, abs=0.02)


def test_no_file_is_in_two_splits():
    files = [set(standard_library(split).files) for split in SPLITS]
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]
    assert all(split_of(p) == split for split in SPLITS for p in standard_library(split).files)


@pytest.mark.parametrize("split", ["dev", "held_out"])
def test_no_function_asked_about_is_a_word_of_any_training_file(split):
    asked = {q.function.name for q in questions(split)}
    assert len(asked) > 100
    assert not asked & words_on_disk("train")
    prompts = [LibraryTasks("train").task(i).prompt for i in range(len(questions("train")))]
    assert not asked & set(re.findall(r"\w+", "\n".join(prompts)))


def test_there_are_enough_held_out_tasks_of_every_kind():
    for split, least in (("train", 1000), ("dev", 250), ("held_out", 500)):
        kinds = Counter(q.kind for q in questions(split))
        assert set(kinds) == set(KINDS)
        assert sum(kinds.values()) == len(LibraryTasks(split)) >= least
        assert min(kinds.values()) > 0.2 * sum(kinds.values())


@pytest.mark.parametrize("split", SPLITS)
def test_the_most_frequent_answer_is_right_in_less_than_a_tenth_of_the_tasks(split):
    asked = questions(split)
    assert Counter(q.answer for q in asked).most_common(1)[0][1] / len(asked) < 0.1
    for kind in KINDS:
        answers = Counter(q.answer for q in asked if q.kind == kind)
        assert answers.most_common(1)[0][1] / answers.total() < 0.1


# ------------------------------------------------------------------------------------ the tasks


@pytest.mark.parametrize("split", SPLITS)
def test_every_task_takes_two_calls_and_the_second_needs_what_the_first_one_found(split):
    tasks = LibraryTasks(split, rate_cold=0.0)
    for index in rng(5).permutation(len(tasks))[:200]:
        task, question = tasks.task(int(index)), tasks.question(int(index))
        demonstration, env = expert(tasks, int(index))
        prompt, first, found, second, shown, last = demonstration.messages
        assert prompt == Message("user", task.prompt)
        assert last == Message("assistant", task.answer)
        path, line = found.content.split("\n")
        assert first.tool_calls[0].arguments == {"name": question.function.name}
        assert f"`{question.function.name}`" in task.prompt
        assert path not in task.prompt
        arguments = second.tool_calls[0].arguments
        assert (
            arguments
            == {
                "parameter": {"path": path, "line": int(line)},
                "line_sum": {"sum": f"{line}+{question.added}"},
                "neighbour": {"path": path},
            }[question.kind]
        )
        assert re.search(rf"(?<!\w){re.escape(task.answer)}(?!\w)", shown.content)
        assert task.answer not in (path, line)
        assert not any(call.failed for call in env.calls)


@pytest.mark.parametrize("kind", KINDS)
def test_the_expert_is_rewarded_and_a_wrong_answer_is_not(kind):
    tasks = LibraryTasks("dev")
    index = next(i for i, q in enumerate(questions("dev")) if q.kind == kind)
    for answer, reward in ((tasks.task(index).answer, 1.0), ("0", 0.0)):
        _, env = expert(tasks, index)
        observation = asyncio.run(env.step(Message("assistant", answer)))
        assert (observation.done, observation.reward) == (True, reward)


def test_the_expert_ends_in_time_though_every_tool_is_cold_and_it_slips_whenever_it_may():
    tasks = LibraryTasks("dev", rate_cold=1.0)
    for index in range(60):
        _, env = expert(tasks, index, slip_rate=1.0, seed=index)
        assert 4 <= len(env.calls) <= tasks.max_calls


def test_an_episode_repeats_exactly_from_the_seed_of_its_task():
    tasks = LibraryTasks("train", rate_cold=0.5)
    runs = [
        [
            expert(tasks, index, slip_rate=0.5, seed=seed)[0]
            for index in (3, 40)
            for seed in range(8)
        ]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len({len(d.messages) for d in runs[0]}) > 1


def test_tasks_wrap_round_and_say_what_they_are():
    tasks = LibraryTasks("dev")
    first = tasks.task(0, seed=9)
    assert (first.id, first.kind, first.seed) == ("library/dev/0", questions("dev")[0].kind, 9)
    assert tasks.task(len(tasks)).answer == first.answer
    assert [tasks.task(i).id for i in range(3)] == [f"library/dev/{i}" for i in range(3)]


def test_questions_of_a_corpus_are_those_that_have_one_short_answer():
    names = [(q.kind, q.function.name, q.answer) for q in questions_of(SMALL, rng())]
    added = {q.function.name: q.added for q in questions_of(SMALL, rng()) if q.added}
    assert ("parameter", "walk", "top") in names
    assert ("line_sum", "walk", str(3 + added["walk"])) in names
    assert ("neighbour", "f1", "walk") in names
    assert not any(kind == "neighbour" and name == "walk" for kind, name, _ in names)
    assert not any(kind == "parameter" and name != "walk" for kind, name, _ in names)


# ------------------------------------------------------------------------------------ the new tool


def test_the_new_tool_stands_in_for_search_and_does_the_same():
    tasks = LibraryTasks("held_out", rate_cold=0.0, new_tool=True)
    env = tasks.env()
    assert env.tools == (NEW_TOOL, *TOOLS[1:])
    name = tasks.question(0).function.name
    new, old = play(env, tasks.task(0), call(NEW_TOOL.name, name=name), call("search", name=name))
    assert new.messages[0].content.startswith(tasks.question(0).function.path)
    assert old.messages[0].content == "error: no such tool"
    demonstration, _ = expert(tasks, 0)
    assert demonstration.messages[1].tool_calls[0].name == NEW_TOOL.name
    assert tasks.task(0) == LibraryTasks("held_out").task(0)


def test_the_new_tool_is_nowhere_in_what_training_can_read():
    train = standard_library("train")
    assert NEW_TOOL.name not in words_on_disk("train")
    assert NEW_TOOL.name not in name_fragments(train)
    assert not any(NEW_TOOL.description in train.text(path) for path in train.files)
    assert NEW_TOOL.name not in {t.name for t in TOOLS}
    assert NEW_TOOL.description not in {t.description for t in TOOLS}


def test_renamed_tools_are_never_the_new_tool():
    draw, names, descriptions = rng(8), set(), set()
    for _ in range(100):
        # The only fragment there is, so that a made-up name is often the new tool's.
        session = asyncio.run(
            instructed_session(draw, [NEW_TOOL.name, "a", "b"], corpus=SMALL, rename_rate=1.0)
        )
        names.update(t.name for t in session.tools)
        descriptions.update(t.description for t in session.tools)
        assert len({t.name for t in session.tools}) == 4
    assert any(NEW_TOOL.name in name for name in names)
    assert NEW_TOOL.name not in names
    assert NEW_TOOL.description not in descriptions
