"""Filters: what each takes, what it says of it, and counts that add up."""

import copy
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentx.data.curate import (
    Decontaminate,
    FilterCounts,
    GoodSteps,
    Hit,
    Language,
    Length,
    MinReward,
    Repetition,
    Symbols,
    Taken,
    TakenRow,
    ValidCalls,
    base,
    run_filters,
    text_of,
    words,
)
from agentx.data.formats import Conversation, TextDocument, read_documents
from agentx.data.formats.registry import conversation_trajectory
from agentx.data.objectives import NextToken
from agentx.render import ToolRenderer
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Message, Outcome, Parameter, ToolCall, ToolSpec

SHARED = Path(__file__).parents[2] / "shared" / "data"
OPEN = ToolSpec("open", "show", (Parameter("path"), Parameter("line", "integer")))


def text(text, name=""):
    return TextDocument(name, text)


def call(name, /, **arguments):
    return Message("assistant", tool_calls=(ToolCall(name, arguments),))


def rows(of):
    """The table that ends a docstring, its cells apart by two spaces or more."""
    table = inspect.getdoc(of).rstrip().split("\n\n")[-1]
    return [re.split(r" {2,}", line.strip()) for line in table.split("\n")]


def verdict(result):
    return f"taken: {result.reason}" if isinstance(result, Taken) else "kept"


@pytest.mark.parametrize(
    "filter",
    [
        Length(min_characters=4, max_characters=6),
        Repetition(min_words=4),
        Symbols(max_ratio=0.25),
        Language(("en",)),
    ],
    ids=lambda filter: type(filter).__name__,
)
def test_a_filter_of_texts_does_what_its_docstring_shows(filter):
    for shown, said, *_ in rows(type(filter)):
        assert verdict(filter(text(shown.replace("\\n", "\n")))) == said


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Length(-1), "Length.min_characters is -1; it is 0 or more"),
        (lambda: Length(5, 4), "Length.max_characters is 4, under min_characters, 5"),
        (lambda: Repetition(lines=1.5), "Repetition.lines is 1.5; a share lies between 0 and 1"),
        (
            lambda: Repetition(top_ngrams=(0.2, -1.0)),
            "Repetition.top_ngrams is (0.2, -1.0); a share lies between 0 and 1",
        ),
        (lambda: Symbols(-0.1), "Symbols.max_ratio is -0.1; it is 0 or more"),
        (lambda: Symbols(symbols=("#", "")), "Symbols.symbols holds an empty string"),
        (lambda: Language(()), "Language.languages is empty"),
        (lambda: Language(min_confidence=2), "Language.min_confidence is 2; it lies between"),
        (lambda: MinReward(float("nan")), "MinReward.threshold is nan; it must be finite"),
        (lambda: MinReward(no_reward="drop"), "MinReward.no_reward is 'drop'; it is 'take' or"),
        (lambda: GoodSteps(float("inf")), "GoodSteps.threshold is inf; it must be finite"),
        (lambda: Decontaminate(()), "Decontaminate.files is empty"),
        (lambda: Decontaminate(("a",), n=5), "Decontaminate.min_words is 8; it is from 1 to n, 5"),
    ],
)
def test_a_field_out_of_its_range_is_named(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


def test_the_text_of_a_conversation_is_what_its_docstring_shows():
    find = ToolCall("find", {"x": 1})
    told = Conversation(
        (
            Message("user", "Where is it?"),
            Message("assistant", thought="a typo", tool_calls=(find,)),
            Message("tool", "os.py"),
        )
    )
    shown = [cells[-1] for cells in rows(text_of)]
    assert text_of(told).split("\n") == shown
    assert base.prose_of(told) == "Where is it?\na typo"


def test_words_have_no_case_and_no_punctuation_and_some_scripts_no_spaces():
    assert words("It's 3.50!") == ["it", "s", "3", "50"]
    assert words("naïve Straße_1") == ["naïve", "straße_1"]
    assert words("東京へ go") == ["東", "京", "へ", "go"]


def test_repetition_counts_characters_once_and_only_those_of_ngrams_that_come_again():
    said = " ".join(f"w{i}" for i in range(40)) + " " + "go on and on " * 2
    assert Repetition(min_words=20)(text(said)) == text(said)
    # Of the 5-grams only those that came before count: here 10 of 30 words.
    ten = [f"word{i}" for i in range(10)]
    loop = text(" ".join([*ten, *(f"term{i}" for i in range(10)), *ten]))
    loose = {"top_ngrams": (1.0, 1.0, 1.0), "min_words": 20}
    assert Repetition(**loose, repeated_ngrams=(0.34,))(loop) == loop
    assert Repetition(**loose, repeated_ngrams=(0.33,))(loop) == Taken("repeated 5-grams")


def test_repetition_judges_what_the_assistant_says_each_by_itself():
    lines = "same\nsame\nsame"
    said = [Message("assistant", "same"), Message("tool", lines)] * 3
    run = Conversation((Message("user", lines), *said))
    assert Repetition()(run) is run
    stuttering = Conversation((*run.messages, Message("assistant", thought=lines)))
    assert Repetition()(stuttering) == Taken("duplicate lines")


def test_a_trace_is_judged_like_the_text_before_it(tmp_path):
    thought = TextDocument("", "two", "one one one one one one one one")
    assert text_of(thought) == "two\none one one one one one one one"
    assert Repetition(min_words=4)(thought) == Taken("one 2-gram throughout", ("one one",))
    assert Symbols(max_ratio=0.1)(TextDocument("", "two", "#")) == Taken("too many #")
    items = Decontaminate((evaluation_set(tmp_path, thought.trace),), ("q",))
    assert verdict(items(thought)) == "taken: contaminated"


def test_a_language_that_the_library_does_not_know_is_named():
    with pytest.raises(ValueError, match=re.escape("Language.languages has 'english'; py3langid")):
        Language(("english",))(text("hello"))


def test_the_language_of_a_conversation_is_that_of_its_prose():
    result = Message("tool", "Der Fluss mündet hinter dem großen Wald in das kalte Meer. " * 20)
    run = Conversation(
        (Message("user", "Where does the river end?"), call("open", path="Fluss.txt"), result)
    )
    assert Language(("en",))(run) is run


@pytest.mark.parametrize("module", ["datasketch", "py3langid.langid"])
def test_a_missing_extra_is_one_sentence(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    sentence = f"the filter needs {package}: pip install agentx[curate]"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        base.library(module, "the filter")


def test_calls_are_judged_as_the_docstring_shows():
    result = Message("tool", "text")
    bad = Message("assistant", malformed="it does not end")
    shown = {
        'open(path="a.py", line=3), result': [call("open", path="a.py", line=3), result],
        'open(path="a.py"), result': [call("open", path="a.py"), result],
        'open(path="a.py", line=None), result': [call("open", path="a.py", line=None), result],
        "close(), result": [call("close"), result],
        'open(file="a.py"), result': [call("open", file="a.py"), result],
        'open(path="a.py", line="3"), result': [call("open", path="a.py", line="3"), result],
        'open(path="a.py"), no result': [call("open", path="a.py"), Message("assistant", "?")],
        "result": [result],
        "what could not be read as a message": [bad],
    }
    said = {row[0]: row[1] for row in rows(ValidCalls)}
    assert set(said) == set(shown)
    for name, messages in shown.items():
        found = verdict(ValidCalls()(Conversation(tuple(messages), (OPEN,))))
        assert said[name].startswith(found), name
    last = Conversation((call("open", path="a.py"),), (OPEN,))
    assert ValidCalls()(last) is last
    two = Message("assistant", tool_calls=call("open").tool_calls * 2)
    assert verdict(ValidCalls()(Conversation((two, result), (OPEN,)))) == "kept"
    assert isinstance(
        ValidCalls()(Conversation((two, result, Message("user", "go on")), (OPEN,))), Taken
    )


@pytest.mark.parametrize(
    ("json_type", "fits", "does_not"),
    [
        ("string", ["3", None], [3, ["3"]]),
        ("integer", [3, 3.0], [3.5, "3", True]),
        ("number", [3, 3.5], ["3", False]),
        ("boolean", [True], [1, "true"]),
        ("object", [{"a": 1}], [[1], "{}"]),
        ("array", [[1]], [{"a": 1}, "[1]"]),
        ("any", [3, "3", True, [1], {"a": 1}], []),
    ],
)
def test_an_argument_fits_the_type_of_its_parameter(json_type, fits, does_not):
    tool = ToolSpec("f", "", (Parameter("x", json_type),))
    for values, expected in ((fits, "kept"), (does_not, "taken: an argument of a wrong type")):
        for value in values:
            run = Conversation((call("f", x=value),), (tool,))
            assert verdict(ValidCalls()(run)) == expected


def test_rewards_are_judged_as_the_docstring_shows():
    for shown, *said in rows(MinReward):
        reward = None if shown == "none" else float(shown.removeprefix("reward "))
        run = Conversation((Message("user", "go"),), reward=reward)
        filters = (MinReward(0.5), MinReward(0.5, no_reward="keep"))
        assert [verdict(filter(run)) for filter in filters] == said


def test_texts_are_no_runs():
    document = text("x")
    for filter in (ValidCalls(), MinReward(), GoodSteps()):
        assert filter(document) is document


def failed_run(reward=0.0):
    missing = Message("tool", "error: no such name", outcome=Outcome.FAILED)
    listed = [call("list", path="os"), Message("tool", "os.py path.py")]
    return Conversation(
        (
            Message("user", "Which file has walk?"),
            call("find", name="wlk"),
            missing,
            call("find", name="walk"),
            Message("tool", "os.py"),
            *listed,
            *listed,
            call("open", path="os.py"),
            Message("tool", "def walk(top):"),
            Message("assistant", "path.py"),
        ),
        reward=reward,
    )


def test_good_steps_marks_a_failed_run_as_its_docstring_shows():
    marked = GoodSteps(threshold=1.0)(failed_run())
    found = []
    for message in marked.messages:
        arguments = [
            f"{c.name}({k}={v})" for c in message.tool_calls for k, v in c.arguments.items()
        ]
        said = arguments[0] if arguments else message.content
        found.append([message.role, said, message.outcome.name.lower()])
    assert found == [cells[:3] for cells in rows(GoodSteps)]


def trained_text(conversation):
    """What has a loss weight of a conversation."""
    renderer = ToolRenderer(Tokenizer.bytes())
    example = NextToken()(conversation_trajectory(conversation, renderer), 0, 0, 0)
    ids = [int(i) for i, weight in zip(example.ids, example.weights, strict=True) if weight]
    return renderer.tokenizer.decode(ids)


def test_the_loss_of_a_failed_run_lies_on_its_good_steps():
    trained = trained_text(GoodSteps()(failed_run()))
    assert "wlk" not in trained
    assert [trained.count(name) for name in ("find", "list", "open", "path.py")] == [1, 1, 1, 0]


def test_good_steps_leaves_what_did_not_fail():
    for reward in (1.0, None):
        run = failed_run(reward)
        assert GoodSteps()(run) is run
    half = GoodSteps()(failed_run(0.5))
    assert half.messages[-1].outcome is Outcome.OK  # an answer is harmful at reward 0 only
    assert half.messages[7].outcome is Outcome.FAILED
    fine = Conversation((call("list"), Message("tool", "a")), reward=0.0)
    assert GoodSteps()(fine) is fine


def test_a_failed_run_without_a_good_step_is_taken():
    error = Message("tool", "error", outcome=Outcome.FAILED)
    run = Conversation(
        (Message("user", "go"), call("f"), error, Message("assistant", "?")), (), "", 0
    )
    assert GoodSteps()(run) == Taken("no good step")
    assert GoodSteps()(Conversation((Message("user", "go"),), reward=0.0)) == Taken("no good step")


def test_a_failed_run_with_a_malformed_message_is_taken():
    run = Conversation((call("list"), Message("assistant", malformed="?")), reward=0.5)
    assert GoodSteps()(run) == Taken("a malformed message", ("message 1",))


def test_the_same_call_with_another_result_goes_in_no_circle():
    steps = [call("test"), Message("tool", "1 failed"), call("test"), Message("tool", "passed")]
    run = Conversation(tuple(steps), reward=0.0)
    assert GoodSteps()(run) is run


def test_calls_made_together_are_a_circle_where_all_of_them_are():
    both = Message("assistant", tool_calls=(ToolCall("t1", {}), ToolCall("t2", {})))
    one, two, three = (Message("tool", text) for text in ("1", "2", "3"))
    run = Conversation((both, one, two, both, one, two, call("t3"), three), reward=0.0)
    marked = GoodSteps()(run)
    outcomes = [m.outcome.name.lower() for m in marked.messages]
    assert outcomes == ["ok", "ok", "ok", "failed", "failed", "failed", "recovered", "ok"]
    trained = trained_text(marked)
    assert [trained.count(name) for name in ("t1", "t2", "t3")] == [1, 1, 1]
    other = Conversation((both, one, two, both, one, three), reward=0.0)
    assert GoodSteps()(other) is other


def evaluation_set(folder, *questions):
    path = folder / "test.jsonl"
    path.write_text("\n".join(json.dumps({"q": q, "a": "42"}) for q in questions))
    return str(path)


def test_contamination_is_found_as_the_docstring_shows(tmp_path):
    path = evaluation_set(tmp_path, "How far is it to Rome?", "Rome, or Bern!")
    filter = Decontaminate((path,), ("q",), n=4, min_words=3)
    for shown, said, *item in rows(Decontaminate):
        found = filter(text(shown))
        assert verdict(found) == said
        if item:
            assert found.evidence == (item[0].replace("item ", f"{path}:"),)
    assert (filter.num_items, filter.too_short) == (2, ())


def test_the_report_has_every_item_that_was_hit(tmp_path):
    path = evaluation_set(tmp_path, "one two three four", "two three four five", "no")
    filter = Decontaminate((path,), ("q", "a"), n=3, min_words=3)
    hits = filter.hits(text("One, two: three four five six.", "train:7"))
    assert hits == [
        Hit(f"{path}:1", "one two three", "train:7"),
        Hit(f"{path}:2", "two three four", "train:7"),
    ]
    both = filter.hits(text("... two three four"))
    assert [hit.item for hit in both] == [f"{path}:1", f"{path}:2"]
    assert filter.num_items == 3
    assert filter.too_short == (f"{path}:3",)
    assert filter.hits(text("no 42")) == []


def test_evaluation_sets_may_be_conversations_or_texts(tmp_path):
    turns = [
        {"role": "system", "content": "Be kind to them all."},
        {"role": "user", "content": "a b"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    (tmp_path / "b.txt").write_text("a text of words")
    files = (str(tmp_path / "a.jsonl"), str(tmp_path / "*.txt"))
    filter = Decontaminate(files, n=4, min_words=2)
    assert filter.num_items == 2
    assert [h.item for h in filter.hits(text("a b"))] == [f"{tmp_path}/a.jsonl:1"]
    assert [h.item for h in filter.hits(text("A TEXT of, words"))] == ["b.txt"]
    assert filter.hits(text("Be kind to them all.")) == []
    conversation = Conversation((call("say", it="a text of words"),))
    assert filter(conversation).reason == "contaminated"


@pytest.mark.parametrize(
    ("file", "fields", "sentence"),
    [
        ("no.jsonl", ("q",), "there is no file or folder"),
        ("test.jsonl", ("question",), "test.jsonl:1: there is no string 'question'"),
    ],
)
def test_an_evaluation_set_that_cannot_be_read_is_an_error(tmp_path, file, fields, sentence):
    evaluation_set(tmp_path, "one two three")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Decontaminate((str(tmp_path / file),), fields)(text("one"))


def test_another_process_reads_the_evaluation_set_for_itself(tmp_path):
    filter = Decontaminate((evaluation_set(tmp_path, "one two three"),), ("q",), 3, 3)
    assert filter.num_items == 1
    other = copy.copy(filter)
    assert other == filter
    assert set(vars(other)) == {"files", "fields", "n", "min_words"}
    assert verdict(other(text("one two three"))) == "taken: contaminated"


DOCUMENTS = st.one_of(
    st.text("ab\n# ", max_size=12).map(text),
    st.builds(
        lambda parts, reward: Conversation(tuple(parts), (OPEN,), reward=reward),
        st.lists(
            st.sampled_from(
                [
                    call("open", path="a"),
                    call("close"),
                    Message("tool", "a"),
                    Message("tool", "no", outcome=Outcome.FAILED),
                    Message("assistant", "a"),
                ]
            ),
            max_size=6,
        ),
        st.sampled_from([None, 0.0, 0.5, 1.0]),
    ),
)
FILTERS = (Length(2, 400), Repetition(min_words=2), Symbols(0.5), ValidCalls(), GoodSteps())


@settings(max_examples=60, deadline=None)
@given(st.lists(DOCUMENTS, max_size=12), st.integers(0, 12), st.permutations(FILTERS))
def test_counts_add_up_and_those_of_two_processes_are_one_sum(documents, cut, filters):
    whole, first, second = FilterCounts(), FilterCounts(), FilterCounts()
    results = [run_filters(filters, document, whole) for document in documents]
    for number, document in enumerate(documents):
        run_filters(filters, document, first if number < cut else second)
    assert first + second == whole
    taken = [r.reason for r in results if isinstance(r, Taken)]
    assert whole.read == len(documents) == whole.kept + len(taken)
    assert sorted(taken) == sorted(row.reason for row in whole.rows for _ in range(row.documents))
    assert whole.read_characters == sum(len(text_of(d)) for d in documents)
    assert whole.read_characters == whole.kept_characters + sum(r.characters for r in whole.rows)
    unchanged = sum(r is d for r, d in zip(results, documents, strict=True))
    assert whole.kept == unchanged + whole.changed.total()


def test_each_filter_gets_what_the_one_before_it_gave_and_the_counts_say_so():
    counts = FilterCounts()
    assert run_filters((Length(3), MinReward()), text("ab"), counts) == Taken(
        "shorter than 3 characters"
    )
    marked = run_filters((GoodSteps(), Length(3)), failed_run(), counts)
    assert marked.messages[-1].outcome is Outcome.FAILED
    assert counts.rows == [TakenRow("Length", "shorter than 3 characters", 1, 2)]
    assert (counts.read, counts.kept, dict(counts.changed)) == (2, 1, {"GoodSteps": 1})


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="no shared/data/gsm8k")
def test_gsm8k_train_holds_a_few_items_of_its_test_set():
    filter = Decontaminate((str(SHARED / "gsm8k" / "test.jsonl"),), ("question",))
    hits = []
    for document in read_documents(SHARED / "gsm8k" / "train.jsonl", field="question"):
        hits += filter.hits(document)
    found = {(hit.document.split(":")[-1], hit.item.split(":")[-1]) for hit in hits}
    assert filter.num_items == 1319
    assert found == {("21", "633"), ("407", "582"), ("1315", "603"), ("5163", "603")}


@pytest.mark.skipif(not (SHARED / "tau_bench").is_dir(), reason="no shared/data/tau_bench")
def test_tau_bench_runs_that_failed_keep_their_good_steps():
    counts = FilterCounts()
    for run in read_documents(SHARED / "tau_bench" / "gpt-4o-airline.json"):
        run_filters((ValidCalls(), GoodSteps()), run, counts)
    assert (counts.read, counts.kept, dict(counts.changed)) == (200, 200, {"GoodSteps": 103})


@pytest.mark.skipif(not (SHARED / "intercode").is_dir(), reason="no shared/data/intercode")
def test_intercode_runs_without_a_good_step_are_taken():
    counts = FilterCounts()
    path = SHARED / "intercode" / "ic_bash_multiturn_vicuna_10_turns_fs_1.json"
    for run in read_documents(path):
        run_filters((ValidCalls(), GoodSteps()), run, counts)
    assert [row[:3] for row in counts.rows] == [("GoodSteps", "no good step", 8)]
    assert (counts.read, dict(counts.changed)) == (60, {"GoodSteps": 18})
