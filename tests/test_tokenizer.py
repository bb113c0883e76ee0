"""Text comes back unchanged, markers cannot be forged, and a name is the same ids everywhere."""

import argparse
import fnmatch
import json
import pathlib
import pickle
import textwrap

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from agentx.tokenizer import SEPARATORS, SPECIAL_TOKENS, Tokenizer

SOURCES = [pathlib.Path(m.__file__).read_text("utf-8") for m in (argparse, fnmatch, json, textwrap)]
TRAINED = Tokenizer.train(SOURCES, 640)
BYTES = Tokenizer.bytes()
BOTH = pytest.mark.parametrize("tokenizer", [TRAINED, BYTES], ids=["trained", "bytes"])


def test_the_markers_have_the_first_ids():
    assert SPECIAL_TOKENS[:3] == ("<|pad|>", "<|bos|>", "<|system|>")
    for tokenizer in (TRAINED, BYTES):
        assert tokenizer.special["<|pad|>"] == 0
        assert tokenizer.special["<|end|>"] == 8
        assert tokenizer.special["<|back|>"] == 14
        assert len(tokenizer.special) == 15


def test_sizes_are_what_was_asked_for():
    assert TRAINED.vocab_size == 640
    assert BYTES.vocab_size == 15 + 256


@BOTH
@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_unchanged(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i >= 15 for i in ids)


@BOTH
@pytest.mark.parametrize(
    "text",
    [
        "  two  spaces\t and a tab \r\n\n    def f(x):  ",
        "日本語 é 🎉 \u200b\x00\ufeff",
        "the space of SentencePiece \u2581 is not \u2581\u2581 a space",
        "<0x41><unk> 1234567890 --flag='x'",
    ],
)
def test_text_that_other_tokenizers_change_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@BOTH
def test_a_marker_written_in_text_is_only_text(tokenizer):
    text = "".join(SPECIAL_TOKENS)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == text


@BOTH
def test_markers_are_decoded_by_their_names(tokenizer):
    ids = [tokenizer.special["<|call|>"], *tokenizer.encode("open"), tokenizer.special["<|end|>"]]
    assert tokenizer.decode(ids) == "<|call|>open<|end|>"


@BOTH
@pytest.mark.parametrize("name", ["fnmatchcase", "lib/os_path.py", "HelpFormatter", "x1"])
def test_a_name_is_the_same_ids_wherever_it_stands(tokenizer, name):
    alone = tokenizer.encode(name)
    for before in SEPARATORS:
        for after in ("", *SEPARATORS):
            ids = tokenizer.encode(f"some text{before}{name}{after}")
            head = tokenizer.encode(f"some text{before}")
            assert ids[: len(head)] == head
            assert ids[len(head) : len(head) + len(alone)] == alone


def test_digits_are_split_and_separators_stand_alone():
    assert len(TRAINED.encode("2048")) == 4
    assert len(TRAINED.encode("\n\n((")) == 4
    assert [TRAINED.decode([i]) for i in TRAINED.encode("(x):\n")] == ["(", "x", ")", ":", "\n"]


def test_training_is_deterministic_and_does_not_depend_on_threads():
    again = Tokenizer.train(iter(SOURCES), 640, num_threads=1)
    assert again.fingerprint == TRAINED.fingerprint
    assert Tokenizer.train(SOURCES[:2], 640).fingerprint != TRAINED.fingerprint
    assert BYTES.fingerprint == "33fe2b0885966ccb9dd4f116a08d8c410f61bae3df25bc48dbf32ceb1a35c908"


@BOTH
def test_a_saved_tokenizer_is_the_same_when_loaded_or_pickled(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.model")
    loaded = Tokenizer.load(tmp_path / "tokenizer.model")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(SOURCES[1]) == tokenizer.encode(SOURCES[1])
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a b") == tokenizer.encode("a b")


def test_the_saved_file_is_a_sentencepiece_model(tmp_path):
    TRAINED.save(tmp_path / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert theirs.encode(SOURCES[1]) == TRAINED.encode(SOURCES[1])


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"there is no tokenizer at .*none\.model"):
        Tokenizer.load(tmp_path / "none.model")
    (tmp_path / "bad.model").write_text("not a model")
    with pytest.raises(ValueError, match=r"bad\.model: this is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "bad.model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES[0].split("\n")),
        model_prefix=str(tmp_path / "other"),
        vocab_size=300,
        minloglevel=2,
    )
    with pytest.raises(
        ValueError, match=r"other\.model: .* pieces are '', '<s>', '</s>', not '<\|pad"
    ):
        Tokenizer.load(tmp_path / "other.model")


@pytest.mark.parametrize(
    ("texts", "vocab_size", "sentence"),
    [
        (SOURCES, 278, "vocab_size is 278: markers, separators and bytes alone take 278"),
        (SOURCES, 100_000, "vocab_size 100000 does not fit the texts: Vocabulary size too high"),
        ([], 512, "there is no text to train a tokenizer on"),
        (["\n", ""], 512, "there is no text to train a tokenizer on"),
    ],
)
def test_impossible_training_ends_in_one_sentence(texts, vocab_size, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tokenizer.train(texts, vocab_size)


def test_bad_text_and_bad_ids_are_refused():
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        TRAINED.encode("a\ud800")
    with pytest.raises(ValueError, match="id 640 is outside the vocabulary of 640"):
        TRAINED.decode([20, 640])
    with pytest.raises(ValueError, match="id -1 is outside"):
        TRAINED.decode([-1])
    assert BYTES.decode([15 + 0xE9]) == "\ufffd"
