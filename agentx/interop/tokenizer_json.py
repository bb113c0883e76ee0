"""Our tokenizer as Hugging Face's tokenizer.json, and the tool format as a chat template.

What `agentx.tokenizer` does is said again in the terms of the `tokenizers` library: a BPE model
with byte fallback and no pre-tokenizer. It is not the usual conversion of SentencePiece:

- A space stays a space. SentencePiece writes U+2581 for it, and a text that holds that character
  could then not be told from one with a space; in tokenizer.json nothing needs the substitute.
- A merge's rank is the score of the piece it makes. SentencePiece merges any two neighbours that
  make a piece, so each piece has a merge for every way to cut it into two pieces.
- Servers turn the text of a chat template into ids in one go, and there the markers are read from
  text. So that a tool's output cannot forge one, the template puts the noncharacter U+FDD0 behind
  every "<" of a message, which hides it from the search for markers; the normalizer, which runs
  after that search, takes it out again. The ids are those of `agentx.render`, for any content.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from agentx.tokenizer import Piece, Tokenizer
from agentx.tokenizer.tokenizer_json import GUARD


def to_tokenizers(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer in the `tokenizers` library.

    One that was read from a tokenizer.json stays what it was, with the markers behind its
    vocabulary, and without what agentx.tokenizer.tokenizer_json leaves out.

    Its ids are those of `tokenizer.encode`, save that markers in the text become their ids,
    U+FDD0, which Unicode keeps free of meaning, is dropped, and one with byte fallback that others
    made reads U+2581 as the space that it stands for there.
    """
    added = [AddedToken(name, normalized=False, special=True) for name in tokenizer.special]
    file = tokenizer.pipeline()
    if file is not None:
        for token in file["added_tokens"]:
            # The guard hides a marker from a search that comes before the normalizer alone.
            token["normalized"] &= token["content"] not in tokenizer.special
        converted = tokenizers.Tokenizer.from_str(json.dumps(file))
        own = [] if converted.normalizer is None else [converted.normalizer]
        converted.normalizer = normalizers.Sequence([normalizers.Replace(GUARD, ""), *own])
        known = {token["content"] for token in file["added_tokens"]}
        converted.add_special_tokens([token for token in added if token.content not in known])
        return converted
    vocab = {_name(piece): i for i, piece in enumerate(tokenizer.pieces)}
    assert len(vocab) == tokenizer.vocab_size, "two pieces share a name"
    if any(not piece.score.is_integer() for piece in tokenizer.pieces):
        raise ValueError(
            "this SentencePiece model is a unigram one, and only BPE is written as tokenizer.json: "
            "export with the model's own tokenizer.json"
        )
    model = models.BPE(vocab=vocab, merges=_merges(tokenizer.pieces), byte_fallback=True)
    converted = tokenizers.Tokenizer(model)
    converted.normalizer = normalizers.Replace(GUARD, "")
    converted.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    converted.add_special_tokens(added)
    return converted


def write_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into a directory."""
    to_tokenizers(tokenizer).save(str(directory / "tokenizer.json"))
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(chat_template())


def chat_template() -> str:
    """The tool format of `agentx.render` as a Jinja template, with tools."""
    return resources.files(__package__).joinpath("chat_template.jinja").read_text("utf-8")


def _name(piece: Piece) -> str:
    if piece.kind == "byte":
        return f"<0x{piece.data[0]:02X}>"
    return "<unk>" if piece.kind == "unknown" else piece.data.decode()


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    scores = {_name(p): p.score for p in pieces if p.kind == "text"}
    merges = []
    for name in sorted(scores, key=lambda name: -scores[name]):
        cuts = ((name[:i], name[i:]) for i in range(1, len(name)))
        merges += [cut for cut in cuts if cut[0] in scores and cut[1] in scores]
    return merges
