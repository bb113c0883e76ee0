"""What a tokenizer's file says, read: how to encode, what each id spells, and which are markers.

A `Vocabulary` comes from a SentencePiece model (here) or from a tokenizer.json
(agentx.tokenizer.tokenizer_json). Both readers refuse, in one sentence, what could not give every
text back, and what could read a marker from text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import sentencepiece

# What SentencePiece writes for a space.
SPACE = "\u2581"

# Texts that a tokenizer may change: spaces and line breaks, forms that Unicode calls equal, signs
# for spaces, characters of one to four bytes, what looks like a byte piece.
PROBES = (
    " a  b \t\r\n\n   c ",
    "A\u0301 \u00c1 \ufb01 \uff21 \u2460 ABC \u0130",
    "\u00a0\u3000\u200b\ufeff\x00\x7f\u2028",
    "日本語 \u00e9 🎉 1234567890",
    f"a{SPACE}b{SPACE}{SPACE} c",
    "<0x41><unk> don't I'LL",
)

# A SentencePiece model is a message of Protocol Buffers, whose fields may be given again: the last
# wins. This is normalizer_spec (3) with add_dummy_prefix (3) and remove_extra_whitespaces (4) off.
_NO_CHANGE = bytes([3 << 3 | 2, 4, 3 << 3, 0, 4 << 3, 0])


class Piece(NamedTuple):
    """One entry of the vocabulary: what it spells in UTF-8, and how it came to be.

    data: the bytes it decodes to; b"" for the unknown piece, which `encode` never emits.
    kind: "special" (a marker), "unknown", "byte" (byte fallback) or "text".
    score: merges with a higher score come first; 0 where there is none.
    """

    data: bytes
    kind: str
    score: float = 0.0


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as its file has it.

    encode: ids of a text without a marker among them. pieces: by id. spells_space: whether U+2581
    stands for a space in it, so that the character itself has to be spelled in bytes. settings:
    what the encoding depends on besides the pieces.
    """

    encode: Callable[[str], list[int]]
    pieces: list[Piece]
    spells_space: bool = True
    settings: str = ""


def read_sentencepiece(model: bytes, markers: tuple[str, ...]) -> Vocabulary:
    """Of a SentencePiece model, `markers` first if agentx trained it.

    Where others trained it, the space that SentencePiece puts before a text is left out, for fields
    of a conversation are encoded one by one. Raises ValueError.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError("this is not a SentencePiece model") from error
    pieces = _pieces_of(processor)
    first = pieces[: len(markers)]
    if tuple(p.data.decode() for p in first) == markers and {p.kind for p in first} == {"special"}:
        return Vocabulary(processor.encode, pieces)
    num_bytes = sum(piece.kind == "byte" for piece in pieces)
    if num_bytes < 256:
        raise ValueError(
            f"this SentencePiece model has {num_bytes} of the 256 byte pieces, so it loses "
            "characters that it does not know: train it with byte_fallback"
        )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_CHANGE)
    for probe in PROBES:
        normal = processor.normalize(probe).replace(SPACE, " ")
        if normal != probe.replace(SPACE, " "):
            raise ValueError(
                f"this SentencePiece model changes text: {probe!r} becomes {normal!r}; only the "
                "normalization rule 'identity' gives every text back"
            )
    for i, piece in enumerate(pieces):
        # A piece that BPE made has a score of its own, except the first; one that the user
        # defined has 0.
        text = piece.data.decode(errors="replace")
        if (
            piece.kind == "text"
            and not piece.score
            and len(text.strip()) > 2
            and i in (processor.encode(text))
        ):
            raise ValueError(
                f"this SentencePiece model reads its symbol {text!r} from text, where anyone can "
                "write it: use the model's tokenizer.json"
            )
    return Vocabulary(processor.encode, pieces)


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
            data = text.replace(SPACE, " ").encode()
            pieces.append(Piece(data, "text", processor.get_score(i)))
    return pieces
