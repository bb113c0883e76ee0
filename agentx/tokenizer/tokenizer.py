"""Text to token ids and back, and the marker tokens that no text can forge.

Enters: text. Leaves: ids. Every tokenizer has the markers of `SPECIAL_TOKENS`, and `encode` never
reads one from text: a user who writes "<|end|>" gets the ids of seven characters or so, not the
marker. Only a renderer, which adds ids and not text, can place one. So `encode` needs no escaping
and cannot be injected into.

Behind one face stand SentencePiece BPE with byte fallback, from `Tokenizer.train`; plain UTF-8
bytes, from `Tokenizer.bytes`, which needs no training and serves tests; and the tokenizers of
others, a SentencePiece model or a tokenizer.json. In the first two the markers have the first ids,
in order. Those of others keep every id, and the markers that they lack come behind. Every string
(without lone surrogates) comes back unchanged from `decode(encode(text))`, in all of them.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from agentx.tokenizer.tokenizer_json import pipeline, read_tokenizer_json
from agentx.tokenizer.vocabulary import SPACE, Piece, Vocabulary, read_sentencepiece

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|system|>",
    "<|user|>",
    "<|thought|>",
    "<|call|>",
    "<|arguments|>",
    "<|sep|>",
    "<|end|>",
    "<|observation|>",
    "<|answer|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|back|>",
)

# Tokens of their own wherever they stand, so that a name between two of them, or alone in a field,
# is the same ids everywhere, and copying the name is copying ids.
SEPARATORS = ("\n", "`", "(", ")", ",", ":")

# In characters. SentencePiece drops lines of more than 4192 bytes without a word; ours are cut.
_LONGEST_LINE = 1000

_BYTES_FILE = b"agentx byte tokenizer 1\n"


class Tokenizer:
    """A tokenizer with markers. `special`: the id of every marker, by its name.

    Besides those of `SPECIAL_TOKENS`, these are the markers of the tokenizer's own, such as
    <|im_end|>. `pieces`: what each id spells. `num_added`: how many markers the file lacks, which
    have the last ids.
    """

    def __init__(self, model: bytes):
        """From the bytes that `save` writes. Raises ValueError for anything else."""
        self._model = model
        if model == _BYTES_FILE:
            vocabulary = _bytes_vocabulary()
        elif model[:1] == b"{":
            vocabulary = read_tokenizer_json(model)
        else:
            vocabulary = read_sentencepiece(model, SPECIAL_TOKENS)
        self._encode, self._settings = vocabulary.encode, vocabulary.settings
        self.pieces = vocabulary.pieces
        own = {p.data.decode(): i for i, p in enumerate(self.pieces) if p.kind == "special"}
        self.special = {name: own.get(name, -1) for name in SPECIAL_TOKENS} | own
        for name in SPECIAL_TOKENS:
            if name not in own:
                self.special[name] = len(self.pieces)
                self.pieces.append(Piece(name.encode(), "special"))
        self.num_added = sum(name not in own for name in SPECIAL_TOKENS)
        byte_ids = {p.data: i for i, p in enumerate(self.pieces) if p.kind == "byte"}
        spelled = [byte_ids[bytes([b])] for b in SPACE.encode()] if vocabulary.spells_space else []
        self._space_ids = spelled

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, num_threads: int = 2) -> Tokenizer:
        """Trains byte-fallback BPE of exactly `vocab_size` pieces, markers and bytes included.

        The same texts in the same order give the same tokenizer, whatever `num_threads` is. Digits
        are split. Raises ValueError for a size that the texts cannot fill or that is too small, and
        whatever the texts raise.
        """
        least = len(SPECIAL_TOKENS) + 1 + len(SEPARATORS) + 256
        if vocab_size <= least:
            raise ValueError(
                f"vocab_size is {vocab_size}: markers, separators and bytes alone take {least}"
            )
        faults: list[Exception] = []
        lines = _lines(_noting(texts, faults))
        first = next(lines, None)
        if first is None:
            raise ValueError("there is no text to train a tokenizer on")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=itertools.chain([first], lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                split_digits=True,
                character_coverage=0.9995,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                pad_id=0,
                pad_piece=SPECIAL_TOKENS[0],
                bos_id=1,
                bos_piece=SPECIAL_TOKENS[1],
                eos_id=-1,
                unk_id=len(SPECIAL_TOKENS),
                control_symbols=list(SPECIAL_TOKENS[2:]),
                user_defined_symbols=list(SEPARATORS),
                num_threads=num_threads,
                minloglevel=2,
            )
        except RuntimeError as error:
            if faults:
                raise faults[0] from None
            raise ValueError(
                f"vocab_size {vocab_size} does not fit the texts: {str(error).split('] ')[-1]}"
            ) from error
        return cls(model.getvalue())

    @classmethod
    def bytes(cls) -> Tokenizer:
        """The markers and the 256 bytes: 271 pieces, no training."""
        return cls(_BYTES_FILE)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads what `save` wrote, a SentencePiece model, a tokenizer.json or the folder of either.

        Raises ValueError that names the file if it is no tokenizer, or none that can be used.
        """
        file = Path(path)
        if file.is_dir():
            inside = [file / name for name in ("tokenizer.json", "tokenizer.model")]
            file = next((f for f in inside if f.exists()), inside[0])
        path = file
        try:
            return cls(file.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"there is no tokenizer at {path}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what was trained or loaded, byte for byte: other programs read it too."""
        Path(path).write_bytes(self._model)

    def pipeline(self) -> dict[str, Any] | None:
        """The tokenizer.json that it was read from, less what is left out; None for others."""
        return pipeline(self._model) if self._model[:1] == b"{" else None

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def fingerprint(self) -> str:
        """sha256 over pieces, kinds, merge scores and settings: equal where every encoding is."""
        digest = hashlib.sha256(self._settings.encode())
        for piece in self.pieces:
            digest.update(f"{piece.data.hex()} {piece.kind} {piece.score!r}\n".encode())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, never a marker's. Raises ValueError for text that UTF-8 cannot spell."""
        if text.isascii():
            return self._encode(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text has a lone surrogate at character {error.start}") from error
        if not self._space_ids:
            return self._encode(text)
        head, *tails = text.split(SPACE)
        ids = list(self._encode(head))
        for tail in tails:
            ids += [*self._space_ids, *self._encode(tail)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, markers by their names. Bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        for i in ids:
            if not 0 <= i < len(self.pieces):
                raise ValueError(f"id {i} is outside the vocabulary of {len(self.pieces)} pieces")
        return b"".join(self.pieces[i].data for i in ids).decode(errors="replace")

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._model,)


def _bytes_vocabulary() -> Vocabulary:
    specials = [Piece(name.encode(), "special") for name in SPECIAL_TOKENS]
    first = len(specials)
    return Vocabulary(
        lambda text: [first + b for b in text.encode()],
        [*specials, *(Piece(bytes([b]), "byte") for b in range(256))],
        spells_space=False,
    )


def _noting(texts: Iterable[str], faults: list[Exception]) -> Iterator[str]:
    """The texts, and what they raise: SentencePiece makes an error of its own of that."""
    try:
        yield from texts
    except Exception as error:
        faults.append(error)
        raise


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of all texts, none empty and none longer than SentencePiece reads."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]
