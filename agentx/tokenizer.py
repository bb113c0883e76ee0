"""Text to token ids and back, and the marker tokens that no text can forge.

Enters: text. Leaves: ids. The first ids of every tokenizer are the markers of `SPECIAL_TOKENS`, in
that order. They are SentencePiece control symbols, which its encoder never reads from text: a user
who writes "<|end|>" gets the ids of seven characters or so, not the marker. Only a renderer, which
adds ids and not text, can place one. So `encode` needs no escaping and cannot be injected into.

Two models stand behind one face: SentencePiece BPE with byte fallback, from `Tokenizer.train`, and
plain UTF-8 bytes, from `Tokenizer.bytes`, which needs no training and serves tests. Every string
(without lone surrogates) comes back unchanged from `decode(encode(text))`.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

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

# What SentencePiece writes for a space. A text may hold this character too; `encode` spells it in
# bytes, so that the two stay apart.
_SPACE = "\u2581"

# In characters. SentencePiece drops lines of more than 4192 bytes without a word; ours are cut.
_LONGEST_LINE = 1000

_BYTES_FILE = b"agentx byte tokenizer 1\n"


class Piece(NamedTuple):
    """One entry of the vocabulary: what it spells in UTF-8, and how it came to be.

    data: the bytes it decodes to; b"" for the unknown piece, which `encode` never emits.
    kind: "special" (a marker), "unknown", "byte" (byte fallback) or "text".
    score: merges with a higher score come first; 0 where there is none.
    """

    data: bytes
    kind: str
    score: float = 0.0


class Tokenizer:
    """A SentencePiece or byte tokenizer with the markers of `SPECIAL_TOKENS` as its first ids."""

    def __init__(self, model: bytes):
        """From the bytes that `save` writes. Raises ValueError for anything else."""
        self._model = model
        self._processor: sentencepiece.SentencePieceProcessor | None = None
        if model == _BYTES_FILE:
            specials = [Piece(name.encode(), "special") for name in SPECIAL_TOKENS]
            self.pieces = [*specials, *(Piece(bytes([b]), "byte") for b in range(256))]
        else:
            try:
                self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            except RuntimeError as error:
                raise ValueError("this is not a SentencePiece model") from error
            self.pieces = _pieces_of(self._processor)
        names = tuple(p.data.decode() for p in self.pieces[: len(SPECIAL_TOKENS)])
        kinds = {p.kind for p in self.pieces[: len(SPECIAL_TOKENS)]}
        if names != SPECIAL_TOKENS or kinds != {"special"}:
            raise ValueError(
                "this SentencePiece model was not trained by agentx: its first pieces are "
                f"{', '.join(map(repr, names[:3]))}, not {', '.join(map(repr, SPECIAL_TOKENS[:3]))}"
            )
        self._byte_ids = [0] * 256
        for i, piece in enumerate(self.pieces):
            if piece.kind == "byte":
                self._byte_ids[piece.data[0]] = i
        self._space_ids = [self._byte_ids[b] for b in _SPACE.encode()]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, num_threads: int = 2) -> Tokenizer:
        """Trains byte-fallback BPE of exactly `vocab_size` pieces, markers and bytes included.

        The same texts in the same order give the same tokenizer, whatever `num_threads` is. Digits
        are split. Raises ValueError for a size that the texts cannot fill or that is too small.
        """
        least = len(SPECIAL_TOKENS) + 1 + len(SEPARATORS) + 256
        if vocab_size <= least:
            raise ValueError(
                f"vocab_size is {vocab_size}: markers, separators and bytes alone take {least}"
            )
        lines = _lines(texts)
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
        """Reads what `save` wrote. Raises ValueError that names the file if it is no tokenizer."""
        try:
            return cls(Path(path).read_bytes())
        except FileNotFoundError:
            raise ValueError(f"there is no tokenizer at {path}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model: a SentencePiece .model file, readable by SentencePiece itself."""
        Path(path).write_bytes(self._model)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def special(self) -> dict[str, int]:
        """The id of every marker, by its name as in `SPECIAL_TOKENS`."""
        return {name: i for i, name in enumerate(SPECIAL_TOKENS)}

    @property
    def fingerprint(self) -> str:
        """sha256 over the pieces, kinds and merge scores: equal where every encoding is equal."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(f"{piece.data.hex()} {piece.kind} {piece.score!r}\n".encode())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, never a marker's. Raises ValueError for text that UTF-8 cannot spell."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text has a lone surrogate at character {error.start}") from error
        if self._processor is None:
            return [self._byte_ids[b] for b in data]
        head, *tails = text.split(_SPACE)
        ids = list(self._processor.encode(head))
        for tail in tails:
            ids += [*self._space_ids, *self._processor.encode(tail)]
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


def _pieces_of(processor: sentencepiece.SentencePieceProcessor) -> list[Piece]:
    pieces = []
    for i in range(processor.get_piece_size()):
        text = processor.id_to_piece(i)
        if processor.is_control(i):
            pieces.append(Piece(text.encode(), "special"))
        elif processor.is_unknown(i):
            pieces.append(Piece(b"", "unknown"))
        elif processor.is_byte(i):
            pieces.append(Piece(bytes([int(text[3:5], 16)]), "byte"))
        else:
            data = text.replace(_SPACE, " ").encode()
            pieces.append(Piece(data, "text", processor.get_score(i)))
    return pieces


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of all texts, none empty and none longer than SentencePiece reads."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]
