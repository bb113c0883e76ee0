"""Reads tokenizer.json, the file of Hugging Face's `tokenizers` library.

Byte-level BPE (GPT-2, Llama 3, Qwen) and BPE with byte fallback (Llama 2, Mistral, Gemma) are read.
What the library does to a text is kept, with three exceptions, so that every text comes back as it
was and no text spells a marker:

- An added token is a marker, whether the file calls it special or not, and is never read from
  text: Qwen 3's <tool_call> is as little of a user's business as <|im_end|>. One that is nothing
  but white space stays text.
- NFC is left out. Text that is in this normal form, which nearly all is, has the same ids.
- The space that some put before a text is left out, for fields of a conversation are encoded one by
  one.

Anything else that changes text is refused.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from agentx.tokenizer.vocabulary import PROBES, SPACE, Piece, Vocabulary

# What agentx.interop hides the markers of a message behind, and a normalizer takes out again.
GUARD = "\ufdd0"

_KEEPS_TEXT = ("Digits", "UnicodeScripts")


def read_tokenizer_json(model: bytes) -> Vocabulary:
    """Of the bytes of a tokenizer.json. Raises ValueError."""
    file = pipeline(model)
    bpe, added = file["model"], file["added_tokens"]
    byte_level = _is_byte_level(file)
    alphabet = _byte_alphabet() if byte_level else {f"<0x{b:02X}>": b for b in range(256)}
    missing = [name for name in alphabet if name not in bpe["vocab"]]
    if missing:
        raise ValueError(
            f"this tokenizer.json lacks {len(missing)} of the 256 bytes, {missing[0]!r} for one, "
            "so it loses characters that it does not know"
        )
    _refuse_markers_in_text(bpe, added, byte_level)
    for token in added:
        token["special"] = not _is_space(token["content"])
    try:
        engine = tokenizers.Tokenizer.from_str(json.dumps(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"the tokenizers library cannot read this tokenizer.json: {error}") from (
            error
        )
    engine.encode_special_tokens = True  # as text, that is
    vocabulary = Vocabulary(
        lambda text: engine.encode(text, add_special_tokens=False).ids,
        _pieces(bpe, added, alphabet, byte_level),
        spells_space=not byte_level,
        settings=json.dumps({**file, "model": {**bpe, "vocab": None}}, sort_keys=True),
    )
    _check(vocabulary, engine, added)
    return vocabulary


def pipeline(model: bytes) -> dict[str, Any]:
    """The file's content, less what changes text and what belongs to no text. Raises ValueError."""
    try:
        file = json.loads(model)
        bpe = file["model"]
        file["added_tokens"] = file.get("added_tokens") or []
        if bpe.get("type", "BPE") != "BPE":
            raise ValueError(f"its model is {bpe['type']}, and only BPE is read")
        bpe["type"] = "BPE"
        for part in ("continuing_subword_prefix", "end_of_word_suffix"):
            if bpe.get(part):
                raise ValueError(f"its {part} {bpe[part]!r} would be lost in decoding")
        byte_level = _is_byte_level(file)
        if not byte_level and not bpe.get("byte_fallback"):
            raise ValueError(
                "it is neither byte-level nor has it byte fallback, so it loses characters that it "
                "does not know"
            )
        steps = _steps(file.get("normalizer"))
        kept = [step for step in steps if not _is_left_out(step)]
        for step in kept:
            if byte_level or step.get("pattern") != {"String": " "} or step["content"] != SPACE:
                raise ValueError(f"its normalizer {step['type']} changes text")
        file["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
        steps = [_text_keeping(step) for step in _steps(file.get("pre_tokenizer"))]
        file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps} if steps else None
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError("this is not a tokenizer.json") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not a tokenizer.json: {error}") from error
    except ValueError as error:
        raise ValueError(f"this tokenizer.json is not read: {error}") from error
    bpe["dropout"] = None
    file["truncation"] = file["padding"] = file["post_processor"] = None
    space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    steps = [space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    file["decoder"] = (
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        if byte_level
        else {"type": "Sequence", "decoders": steps}
    )
    return file


def _steps(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences in sequences laid out flat."""
    if spec is None:
        return []
    if spec["type"] != "Sequence":
        return [spec]
    parts = spec["normalizers" if "normalizers" in spec else "pretokenizers"]
    return [step for part in parts for step in _steps(part)]


def _is_byte_level(file: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(file.get("pre_tokenizer")))


def _is_left_out(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return step["pattern"] == {"String": GUARD} and not step["content"]
    return step["type"] == "NFC" or (step["type"] == "Prepend" and step["prepend"] == SPACE)


def _text_keeping(step: dict[str, Any]) -> dict[str, Any]:
    kind = step["type"]
    if kind == "ByteLevel":
        return {**step, "add_prefix_space": False}
    if kind == "Metaspace" and step["replacement"] == SPACE:
        split = step.get("split", True)
        return {"type": kind, "replacement": SPACE, "prepend_scheme": "never", "split": split}
    if kind == "Split" and step["behavior"] == "Removed" and step.get("invert"):
        # To remove all but the matches is to cut at them; where these leave a gap, it stays.
        return {**step, "behavior": "Isolated", "invert": False}
    if kind in _KEEPS_TEXT or (kind in ("Split", "Punctuation") and step["behavior"] != "Removed"):
        return step
    raise ValueError(f"its pre-tokenizer {kind} may change text")


def _refuse_markers_in_text(
    bpe: dict[str, Any], added: list[dict[str, Any]], byte_level: bool
) -> None:
    """BPE emits single characters and what merges make, or whole words under ignore_merges."""
    merges = (m if isinstance(m, str) else " ".join(m) for m in bpe["merges"])
    spelled = {merge.replace(" ", "", 1) for merge in merges}
    if bpe.get("ignore_merges"):
        if not byte_level:
            raise ValueError("this tokenizer.json has ignore_merges without byte-level pieces")
        spelled = set(bpe["vocab"])
    for token in added:
        name = token["content"]
        if not _is_space(name) and (name in spelled or len(name) == 1):
            raise ValueError(
                f"this tokenizer.json reads its added token {name!r} from text, where anyone can "
                "write it"
            )


def _pieces(
    bpe: dict[str, Any], added: list[dict[str, Any]], alphabet: dict[str, int], byte_level: bool
) -> list[Piece]:
    size = 1 + max(*bpe["vocab"].values(), *(token["id"] for token in added), -1)
    pieces = [Piece(b"", "unknown")] * size
    ranks = {}
    for rank, merge in enumerate(bpe["merges"]):
        ranks["".join(merge.split(" ", 1) if isinstance(merge, str) else merge)] = -float(rank)
    for name, i in bpe["vocab"].items():
        if not byte_level and name in alphabet:
            pieces[i] = Piece(bytes([alphabet[name]]), "byte")
        elif byte_level and all(c in alphabet for c in name):
            data = bytes(alphabet[c] for c in name)
            pieces[i] = Piece(data, "text", ranks.get(name, 0.0))
        elif name != bpe.get("unk_token"):
            data = name.replace(SPACE, " ").encode()
            pieces[i] = Piece(data, "text", ranks.get(name, 0.0))
    for token in added:
        name = token["content"]
        if not _is_space(name):
            pieces[token["id"]] = Piece(name.encode(), "special")
        else:
            name = name if byte_level else name.replace(SPACE, " ")
            pieces[token["id"]] = Piece(name.encode(), "text")
    return pieces


def _check(
    vocabulary: Vocabulary, engine: tokenizers.Tokenizer, added: list[dict[str, Any]]
) -> None:
    """A last look at what was read, by trying it. Raises ValueError."""
    for token in added:
        if engine.token_to_id(token["content"]) != token["id"]:
            raise ValueError(
                f"this tokenizer.json gives its added token {token['content']!r} the id "
                f"{token['id']}, the tokenizers library gives it "
                f"{engine.token_to_id(token['content'])}"
            )
    probes = [probe.replace(SPACE, "") if vocabulary.spells_space else probe for probe in PROBES]
    for probe in [*probes, "".join(token["content"] for token in added)]:
        ids = vocabulary.encode(probe)
        found = b"".join(vocabulary.pieces[i].data for i in ids)
        expected = probe.replace(SPACE, " ") if vocabulary.spells_space else probe
        if found != expected.encode():
            raise ValueError(
                f"this tokenizer.json changes text: {probe!r} comes back as "
                f"{found.decode(errors='replace')!r}"
            )
        assert all(vocabulary.pieces[i].kind != "special" for i in ids)


def _is_space(name: str) -> bool:
    return name.replace(SPACE, " ").isspace()


def _byte_alphabet() -> dict[str, int]:
    """Which character stands for which byte in byte-level BPE.

    Bytes that are printable in Latin-1 stand for themselves; the others, in order, are written from
    U+0100 on.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(0x100 + n): b for n, b in enumerate(hidden)}
