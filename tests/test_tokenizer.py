"""Text comes back unchanged, markers cannot be forged, and a name is the same ids everywhere."""

import argparse
import fnmatch
import io
import json
import pathlib
import pickle
import re
import textwrap

import others
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
    with pytest.raises(ValueError, match=r"there is no tokenizer at .*tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "bad.model").write_text("not a model")
    with pytest.raises(ValueError, match=r"bad\.model: this is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "bad.model")


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


def test_what_the_texts_raise_comes_out_of_training_as_it_is():
    def texts():
        yield "a b c"
        raise ValueError("b.txt is not UTF-8")

    with pytest.raises(ValueError, match=r"^b\.txt is not UTF-8$"):
        Tokenizer.train(texts(), 512)


def test_bad_text_and_bad_ids_are_refused():
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        TRAINED.encode("a\ud800")
    with pytest.raises(ValueError, match="id 640 is outside the vocabulary of 640"):
        TRAINED.decode([20, 640])
    with pytest.raises(ValueError, match="id -1 is outside"):
        TRAINED.decode([-1])
    assert BYTES.decode([15 + 0xE9]) == "\ufffd"


# ---------------------------------------------------------------------- tokenizers of others


def sentencepiece_model(**given) -> bytes:
    model = io.BytesIO()
    settings = {"vocab_size": 600, "byte_fallback": True, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES[0].split("\n")),
        model_writer=model,
        model_type="bpe",
        minloglevel=2,
        **{**settings, **given},
    )
    return model.getvalue()


THEIRS = {
    "qwen3": others.tokenizer("qwen3"),
    "llama2": Tokenizer(others.fallback_json().encode()),
    "sentencepiece": Tokenizer(sentencepiece_model()),
}
OTHERS = pytest.mark.parametrize("name", THEIRS)
STRANGE = st.text() | st.lists(
    st.sampled_from(["<|im_end|>", "<tool_call>", "<s>", "</s>", "<unk>", "<0x41>", "\u2581", " "])
    | st.sampled_from(["<|end|>", "<|endoftext|>", "e\u0301", "\n\n", "def "]),
    max_size=5,
).map("".join)


@OTHERS
@settings(max_examples=100, deadline=None)
@given(text=STRANGE)
def test_any_text_comes_back_from_a_tokenizer_of_others_and_brings_no_marker(name, text):
    tokenizer = THEIRS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.pieces[i].data for i in ids) == text.encode()
    assert not set(ids) & set(tokenizer.special.values())


@OTHERS
def test_markers_come_behind_the_vocabulary_of_others_whose_ids_stay(name):
    tokenizer = THEIRS[name]
    before = tokenizer.vocab_size - len(SPECIAL_TOKENS)
    assert [tokenizer.special[marker] for marker in SPECIAL_TOKENS] == list(
        range(before, before + len(SPECIAL_TOKENS))
    )
    assert tokenizer.decode([tokenizer.special["<|end|>"]]) == "<|end|>"
    if name == "qwen3":
        own = {t["content"]: t["id"] for t in json.loads(others.file("qwen3"))["added_tokens"]}
        assert own["<|im_end|>"] == 902
        assert {marker: tokenizer.special[marker] for marker in own} == own
    else:
        assert [tokenizer.special[marker] for marker in ("<s>", "</s>")] == [1, 2]


def test_a_normalizer_without_steps_is_none():
    model = changed("normalizer", {"type": "Sequence", "normalizers": []})
    assert Tokenizer(model.encode()).encode("a b") == THEIRS["qwen3"].encode("a b")


def test_a_marker_that_the_tokenizer_has_keeps_its_id():
    tokenizer = Tokenizer(others.byte_level_json(("<|user|>", "<|end|>")).encode())
    assert (tokenizer.special["<|user|>"], tokenizer.special["<|end|>"]) == (900, 901)
    assert (tokenizer.special["<|pad|>"], tokenizer.special["<|back|>"]) == (902, 914)


def test_text_has_the_ids_that_the_tokenizers_library_gives_it():
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(others.file("qwen3"))
    for text in [*SOURCES, "don't  you?\n\n x", "日本語 é 🎉"]:
        assert THEIRS["qwen3"].encode(text) == theirs.encode(text).ids
    # NFC is left out, and so is the space before a text: the price of giving every text back.
    assert THEIRS["qwen3"].encode("e\u0301") != theirs.encode("e\u0301").ids
    theirs = tokenizers.Tokenizer.from_str(others.fallback_json())
    for text in ("def parse(x):", "  two"):
        assert THEIRS["llama2"].encode(" " + text) == theirs.encode(text).ids
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert THEIRS["sentencepiece"].encode(" def parse(x):") == processor.encode("def parse(x):")


@OTHERS
def test_a_tokenizer_of_others_is_saved_loaded_and_pickled(tmp_path, name):
    tokenizer = THEIRS[name]
    file = "tokenizer.model" if name == "sentencepiece" else "tokenizer.json"
    tokenizer.save(tmp_path / file)
    for again in (Tokenizer.load(tmp_path / file), Tokenizer.load(tmp_path)):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.special == tokenizer.special
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a b") == tokenizer.encode("a b")
    assert len({one.fingerprint for one in THEIRS.values()}) == 3


def test_an_added_token_of_white_space_is_text():
    tokenizer = Tokenizer(others.byte_level_json(("<|end|>",), ("      ",)).encode())
    ids = tokenizer.encode("a      b")
    assert [tokenizer.decode([i]) for i in ids] == ["a", "      ", "b"]
    assert "      " not in tokenizer.special


def changed(path: str, value: object) -> str:
    """The byte-level tokenizer.json with one field of it changed."""
    file = json.loads(others.file("qwen3"))
    *parents, last = path.split(".")
    at = file
    for key in parents:
        at = at[key]
    at[last] = value
    return json.dumps(file)


SPLITS = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "ByteLevel"}]}


def metaspace_only() -> str:
    file = json.loads(others.fallback_json())
    file["model"]["byte_fallback"] = False
    return json.dumps(file)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("{", "not a tokenizer.json: Expecting property name"),
        ("{}", "this is not a tokenizer.json"),
        (changed("model.type", "WordPiece"), "its model is WordPiece, and only BPE is read"),
        (changed("normalizer", {"type": "Lowercase"}), "its normalizer Lowercase changes text"),
        (changed("normalizer", {"type": "NFKC"}), "its normalizer NFKC changes text"),
        (changed("model.end_of_word_suffix", "</w>"), "end_of_word_suffix '</w>' would be lost"),
        (changed("pre_tokenizer", {"type": "Whitespace"}), "it is neither byte-level nor"),
        (metaspace_only(), "neither byte-level nor has it byte fallback"),
        (changed("model.merges", [["<", "|im_end|>"]]), "added token '<|im_end|>' from text"),
        (changed("pre_tokenizer", SPLITS), "its pre-tokenizer Whitespace may change text"),
    ],
)
def test_a_tokenizer_json_that_would_not_give_text_back_is_refused(tmp_path, model, sentence):
    (tmp_path / "tokenizer.json").write_text(model)
    with pytest.raises(ValueError, match=re.escape(sentence)) as refusal:
        Tokenizer.load(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / 'tokenizer.json'}: ")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"byte_fallback": False}, "has 0 of the 256 byte pieces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "this SentencePiece model changes text"),
        ({"user_defined_symbols": ["<turn>"]}, "reads its symbol '<turn>' from text"),
    ],
)
def test_a_sentencepiece_model_that_would_not_give_text_back_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tokenizer(sentencepiece_model(**given))
