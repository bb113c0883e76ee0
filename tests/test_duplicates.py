"""Duplicates: what counts as one, and the same answer however documents are split."""

import collections
import inspect
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentx.data.curate import (
    Deduplicate,
    DuplicateIndex,
    Pair,
    Signature,
    duplicates,
    words,
)
from agentx.data.formats import Conversation, TextDocument
from agentx.trajectory import Message, ToolCall

SMALL = Deduplicate(threshold=0.5, ngram=2, num_permutations=32)


def documents(*texts):
    return [TextDocument(f"t:{number}", text) for number, text in enumerate(texts, start=1)]


def found_locally(config, given):
    index = DuplicateIndex(config)
    found = [index.find(document.name, config.signature(document)) for document in given]
    return [tuple(duplicate) for duplicate in found if duplicate is not None]


def found_in_groups(config, given, order):
    """As many machines do it: by key, the keys in any order, each group by itself."""
    groups = collections.defaultdict(list)
    for number in order:
        signature = config.signature(given[number])
        for key in config.keys(signature):
            groups[key].append((number, signature))
    pairs = collections.defaultdict(list)
    for group in groups.values():
        for pair in config.pairs_in(group):
            pairs[pair.number].append(pair)
    firsts = [min(pairs[number]) for number in sorted(pairs)]
    return [(given[p.number].name, given[p.first].name, p.reason, p.similarity) for p in firsts]


def found_by_definition(config, given):
    signatures = [config.signature(document) for document in given]
    found = []
    for number, later in enumerate(signatures):
        same, near = [], []
        for first, earlier in enumerate(signatures[:number]):
            if set(config.keys(later)) & set(config.keys(earlier)):
                pair = config.compare(number, later, first, earlier)
                if pair is not None:
                    (near if pair.is_near else same).append(pair)
        if same or near:
            pair = (same or near)[0]
            names = given[pair.number].name, given[pair.first].name
            found.append((*names, pair.reason, pair.similarity))
    return found


def test_duplicates_are_found_as_the_docstring_shows():
    table = inspect.getdoc(Deduplicate).rstrip().split("\n\n")[-1]
    rows = [re.split(r" {2,}", line.strip()) for line in table.split("\n")]
    config = Deduplicate(threshold=0.5, ngram=2)
    index = DuplicateIndex(config)
    said = []
    for document in documents(*(shown for shown, _ in rows)):
        of = index.find(document.name, config.signature(document))
        if of is None:
            said.append("kept")
            continue
        assert of.first == "t:1"
        similarity = f", similarity {of.similarity:.2f}" if of.reason == duplicates.NEAR else ""
        said.append(f"taken: {of.reason} of the first{similarity}")
    assert said == [verdict for _, verdict in rows]


def test_a_signature_is_the_same_in_every_process():
    signature = Deduplicate().signature(TextDocument("", "one two three four five six"))
    assert signature.exact.hex() == "825b201ab421edeb0b4a3bbda7a4a8ff"
    assert signature.values[:8].hex() == "2e11128f3c07f052"
    keys = [key.hex() for key in Deduplicate().keys(signature)]
    assert len(keys) == 1 + 9
    assert keys[:2] == ["3d825b201ab421edeb0b4a3bbda7a4a8ff", "4152a6eb0dba8e89"]


WORDS = st.lists(st.sampled_from("abcde"), max_size=7).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_answer_does_not_depend_on_how_documents_are_split(data):
    texts = data.draw(st.lists(WORDS, max_size=10))
    given = documents(*texts)
    order = data.draw(st.permutations(range(len(given))))
    expected = found_by_definition(SMALL, given)
    assert found_locally(SMALL, given) == expected
    assert found_in_groups(SMALL, given, order) == expected
    first_of_text = {}
    for document in given:
        first = first_of_text.setdefault(document.text, document.name)
        assert (first == document.name) or (
            (document.name, first, "exact duplicate", 1.0) in expected
        )


def test_an_exact_duplicate_is_reported_as_one_though_a_near_one_came_first():
    given = documents("a b c d e f", "a b c d e f g", "a b c d e f g", "a b c d e f h")
    config = Deduplicate(threshold=0.5, ngram=1)
    for found in (found_locally(config, given), found_in_groups(config, given, (3, 1, 0, 2))):
        assert [row[:3] for row in found] == [
            ("t:2", "t:1", "near duplicate"),
            ("t:3", "t:2", "exact duplicate"),
            ("t:4", "t:1", "near duplicate"),
        ]
    pairs = [Pair(5, True, 1, 0.9), Pair(5, False, 4, 1.0), Pair(5, False, 3, 1.0)]
    assert min(pairs) == Pair(5, False, 3, 1.0)


def test_the_first_of_many_that_share_a_band_is_found(monkeypatch):
    monkeypatch.setattr(duplicates, "_COMPARED_AT_A_TIME", 2)
    unlike = [" ".join(f"w{i}" for i in range(at, at + 20)) for at in range(0, 200, 10)]
    config = Deduplicate(threshold=0.6, ngram=1, num_permutations=8)
    given = documents(*unlike, unlike[9] + " again", unlike[9])
    assert found_locally(config, given) == found_by_definition(config, given)
    assert found_locally(config, given)[-1][:3] == ("t:22", "t:10", "exact duplicate")


def test_what_was_taken_still_takes_others():
    """A chain: each like the one before it, the last unlike the first."""
    chain = [" ".join(f"w{i}" for i in range(start, start + 30)) for start in (0, 6, 12, 18)]
    config = Deduplicate(threshold=0.5, ngram=1, num_permutations=128)
    found = found_locally(config, documents(*chain))
    assert [(name, first) for name, first, *_ in found] == [
        ("t:2", "t:1"),
        ("t:3", "t:2"),
        ("t:4", "t:3"),
    ]


def test_similarity_is_the_share_of_common_ngrams():
    """60 of 100 words in common of 140: 0.43, as MinHash says to 0.04."""
    left, right = (" ".join(f"w{i}" for i in range(at, at + 100)) for at in (0, 40))
    config = Deduplicate(threshold=0.01, ngram=1, num_permutations=512)
    one, other = (config.signature(document) for document in documents(left, right))
    assert config.compare(1, other, 0, one).similarity == pytest.approx(60 / 140, abs=0.04)


def test_long_texts_are_hashed_in_pieces(monkeypatch):
    document = TextDocument("", " ".join(f"w{i}" for i in range(50)))
    whole = SMALL.signature(document)
    monkeypatch.setattr(duplicates, "_HASHED_AT_A_TIME", 7)
    assert SMALL.signature(document) == whole


def test_texts_without_words_are_duplicates_where_they_are_the_same():
    found = found_locally(SMALL, documents("?", "!", "?", ""))
    assert found == [("t:3", "t:1", "exact duplicate", 1.0)]
    assert SMALL.signature(TextDocument("", "?")).values == b""
    assert words("?") == []


def test_a_long_result_or_a_common_system_text_makes_no_duplicates():
    dump = " ".join(f"column{i}" for i in range(500))

    def run(name, question):
        asked = Message("user", question)
        called = Message("assistant", tool_calls=(ToolCall("sql", {"query": "SHOW TABLES"}),))
        messages = (Message("system", dump), asked, called, Message("tool", dump))
        return Conversation(messages, name=name)

    first = run("a", "Which singer earned the most last year?")
    other = run("b", "How many students live on the campus now?")
    near = run("c", "Which singer earned the most last year? Quickly!")
    config = Deduplicate(threshold=0.5, ngram=2)
    found = found_locally(config, [first, other, near, other])
    assert [row[:3] for row in found] == [
        ("c", "a", "near duplicate"),
        ("b", "b", "exact duplicate"),
    ]


def test_texts_with_other_traces_are_no_duplicates():
    texts = [TextDocument(f"t:{n}", "2 + 2", trace) for n, trace in enumerate(["x", "y", "x", ""])]
    assert found_locally(SMALL, texts) == [("t:2", "t:0", "exact duplicate", 1.0)]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"threshold": 0.0}, "Deduplicate.threshold is 0.0; it is over 0 and at most 1"),
        ({"ngram": 0}, "Deduplicate.ngram is 0; it is 1 or more words"),
        ({"num_permutations": 1}, "Deduplicate.num_permutations is 1; it is 2 or more"),
    ],
)
def test_a_field_out_of_its_range_is_named(fields, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Deduplicate(**fields)


def test_a_threshold_too_high_for_bands_is_named():
    config = Deduplicate(threshold=0.99)
    with pytest.raises(ValueError, match=r"threshold 0\.99 leaves a single band of 128"):
        config.keys(Signature(b"", bytes(512)))
