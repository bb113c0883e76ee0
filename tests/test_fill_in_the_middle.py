"""Text cut in three, whose middle comes last."""

import re

import numpy as np
import pytest
from rows import WORDS, assert_shown_in, table, text

from agentx.data.objectives import FillInTheMiddle
from agentx.data.objectives import text as text_objective
from agentx.render import ToolRenderer
from agentx.tokenizer import Piece, Tokenizer
from agentx.trajectory import Message, Role, Span, Trajectory


class FewWords:
    """A tokenizer of `WORDS`, whose "os" begins with a space."""

    pieces = tuple(Piece((" os" if word == "os" else word).encode(), "text") for word in WORDS)

    def encode(self, text):
        spelled = {piece.data.decode(): i for i, piece in enumerate(self.pieces)}
        ids = []
        while text:
            word = max((w for w in spelled if text.startswith(w)), key=len)
            ids.append(spelled[word])
            text = text[len(word) :]
        return ids


@pytest.mark.parametrize(("spm", "columns"), [(0.0, (5, 4)), (1.0, (4, 5))])
def test_fill_in_the_middle_shows_what_its_docstring_shows(monkeypatch, spm, columns):
    monkeypatch.setattr(text_objective, "load_tokenizer", lambda path: FewWords())
    objective = FillInTheMiddle("words", rate=1.0, spm=spm, lines=0.0)

    class After2:
        """Random numbers that cut "import os" behind "im" and at the end."""

        def random(self):
            return 0.5

        def choice(self, places, size, *, replace):
            return np.array([9, 2])

    monkeypatch.setattr(text_objective, "random_generator", lambda *key: After2())
    example = objective(text(), 0, 0, 0)
    assert_shown_in(FillInTheMiddle.__doc__, table(example, ("token", "weight"), columns))
    assert set(example.roles.tolist()) == {Role.TEXT}


SOURCE = "def walk(top):\n    # läuft 歩く 🚶\n    return 1\n\n\nprint(walk('.'))\n" * 4


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for tokenizer in (Tokenizer.bytes(), Tokenizer.train([SOURCE], 340)):
        tokenizer.save(folder / str(tokenizer.vocab_size))
        made[str(folder / str(tokenizer.vocab_size))] = tokenizer
    return made


def parts(tokenizer, example):
    """Prefix, suffix and middle as text, of a document that was rearranged, and whether by SPM."""
    markers = [WORDS.index(f"<|fim_{m}|>") for m in ("prefix", "suffix", "middle")]
    ids = example.ids.tolist()
    at = [ids.index(marker) for marker in markers]
    prefix, suffix = ids[at[0] + 1 : at[1]], ids[at[1] + 1 : at[2]]
    assert ids[-1] == WORDS.index("<|end|>")
    suffix = [i for i in suffix if i != WORDS.index("<|end|>")]
    return [tokenizer.decode(x) for x in (prefix, suffix, ids[at[2] + 1 : -1])]


@pytest.mark.parametrize("lines", [0.0, 1.0])
def test_the_parts_of_a_text_are_whole_characters_or_lines_and_make_up_the_text(tokenizers, lines):
    for path, tokenizer in tokenizers.items():
        ids = np.array([1, *tokenizer.encode(SOURCE), 8], np.int32)
        whole = Trajectory([Span(Role.TEXT, ids)])
        for index in range(100):
            psm = FillInTheMiddle(path, rate=1.0, spm=0.0, lines=lines)(whole, 3, 0, index)
            spm = FillInTheMiddle(path, rate=1.0, spm=1.0, lines=lines)(whole, 3, 0, index)
            prefix, suffix, middle = parts(tokenizer, psm)
            assert prefix + middle + suffix == SOURCE
            assert "\ufffd" not in prefix + middle + suffix
            assert parts(tokenizer, spm) == ["", suffix, prefix + middle]
            if lines:
                assert all(part == "" or part.endswith("\n") for part in (prefix, middle, suffix))
            for example in (psm, spm):
                assert len(example) <= len(ids) + 16
                assert (example.weights == 0).sum() == 4
                assert (example.weights == 1).sum() == len(example) - 4


def test_a_cut_that_does_not_fit_moves_to_a_border_of_tokens(tokenizers, monkeypatch):
    monkeypatch.setattr(text_objective, "_SLACK", -1000)
    (path, tokenizer) = list(tokenizers.items())[1]
    ids = np.array([1, *tokenizer.encode(SOURCE), 8], np.int32)
    markers = [WORDS.index(f"<|fim_{m}|>") for m in ("prefix", "suffix", "middle")]
    before = sorted([*ids.tolist(), 8, *markers])
    for index in range(50):
        objective = FillInTheMiddle(path, rate=1.0, spm=0.0, lines=0.0)
        example = objective(Trajectory([Span(Role.TEXT, ids)]), 0, 0, index)
        assert sorted(example.ids.tolist()) == before
        prefix, suffix, middle = parts(tokenizer, example)
        assert prefix + middle + suffix == SOURCE
        assert "\ufffd" not in prefix + middle + suffix


def test_a_piece_that_begins_within_a_character_is_cut_between_others(tokenizers):
    path, tokenizer = next(iter(tokenizers.items()))
    ids = np.array(tokenizer.encode("é歩く")[1:], np.int32)
    for index in range(50):
        example = FillInTheMiddle(path, rate=1.0, spm=0.0, lines=0.0)(
            Trajectory([Span(Role.TEXT, ids)]), 0, 0, index
        )
        prefix, suffix, middle = parts(tokenizer, example)
        assert prefix.startswith("\ufffd")
        assert prefix[1:] + middle + suffix == "歩く"


def test_what_is_not_text_alone_or_too_short_is_left_alone(tokenizers):
    path, tokenizer = next(iter(tokenizers.items()))
    objective = FillInTheMiddle(path, rate=1.0)
    chat = Trajectory(ToolRenderer(tokenizer).render([Message("user", "hi")], ()))
    assert objective.room(chat) == 0
    assert objective(chat, 0, 0, 0).ids.tolist() == chat.ids.tolist()
    empty = Trajectory([Span(Role.TEXT, np.array([1, 8], np.int32))])
    assert objective(empty, 0, 0, 0).ids.tolist() == [1, 8]
    one_line = Trajectory([Span(Role.TEXT, np.array([1, 100, 8], np.int32))])
    by_lines = FillInTheMiddle(path, rate=1.0, lines=1.0)(one_line, 0, 0, 0)
    assert len(by_lines) == 7


def test_fill_in_the_middle_depends_on_its_integers_alone_and_keeps_its_rates(tokenizers):
    path, tokenizer = next(iter(tokenizers.items()))
    whole = Trajectory([Span(Role.TEXT, np.array([1, *tokenizer.encode(SOURCE), 8], np.int32))])
    objective = FillInTheMiddle(path, rate=0.5, spm=0.25)
    made = [objective(whole, 1, 2, i).ids.tolist() for i in range(1000)]
    assert made[::-1] == [objective(whole, 1, 2, i).ids.tolist() for i in reversed(range(1000))]
    changed = [ids for ids in made if WORDS.index("<|fim_middle|>") in ids]
    assert len(changed) == pytest.approx(500, abs=60)
    spm = sum(ids[2] == WORDS.index("<|fim_suffix|>") for ids in changed)
    assert spm == pytest.approx(125, abs=40)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FillInTheMiddle("t", lines=2.0), "FillInTheMiddle.lines is 2.0; it must be in"),
    ],
)
def test_wrong_settings_are_named_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()
