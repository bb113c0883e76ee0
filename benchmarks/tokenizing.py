"""Times how fast documents become trajectories, against the tokenizer's library alone.

    python -m benchmarks.tokenizing [--data ../shared/data] [--processes 2] [--repeats 7]

Texts are the files below DATA/text and the first 2,000 questions of DATA/gsm8k/train.jsonl; the
tokenizer is one of 8,192 pieces, trained on the texts, and the same one as tokenizer.json. `short`
are the questions, a document each, `long` the texts in documents of 16,384 characters. Prints one
JSON line: tokens a second on one core, of the library's own encoding and of whole trajectories, and
the share that these make of it. Times are of the processor, and the medians of all repeats, in
which the two take turns every 50 documents; only those of several processes are of the clock.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentx.data import formats
from agentx.data.formats import TextDocument, text_trajectory
from agentx.data.parallel import encode_parallel
from agentx.interop.tokenizer_json import to_tokenizers
from agentx.tokenizer import Tokenizer
from benchmarks import workload

_SHORT, _LONG = 2000, 16_384
_TURN = 50  # documents: a few milliseconds, so that a slow moment of the machine meets both


def read_documents(data: Path) -> dict[str, list[TextDocument]]:
    """The short and the long documents; a byte that is no UTF-8 becomes U+FFFD."""
    files = sorted((data / "text").rglob("*.txt"))
    texts = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    long = [texts[i : i + _LONG] for i in range(0, len(texts), _LONG)]
    read = formats.read_documents(data / "gsm8k" / "train.jsonl", field="question")
    short = [document for document in read if isinstance(document, TextDocument)][:_SHORT]
    return {"short": short, "long": [TextDocument(f"text {i}", t) for i, t in enumerate(long)]}


def run(
    documents: dict[str, list[TextDocument]], vocab_size: int, processes: int, repeats: int
) -> dict[str, Any]:
    """The fields of the JSON line."""
    ours = Tokenizer.train((d.text for d in documents["long"]), vocab_size)
    theirs = Tokenizer(to_tokenizers(ours).to_str().encode())
    result: dict[str, Any] = {"workload": "tokenizing", "vocab_size": vocab_size}
    for kind, batch in documents.items():
        for name, tokenizer in (("sentencepiece", ours), ("tokenizer_json", theirs)):
            num_tokens = sum(len(tokenizer.encode(d.text)) for d in batch)
            make = functools.partial(text_trajectory, tokenizer=tokenizer)
            alone, whole = _medians(batch, [_library(tokenizer), make], repeats)
            result[f"{kind}_{name}"] = {
                "tokens": num_tokens,
                "library_tokens_per_s": round(num_tokens / alone),
                "tokens_per_s": round(num_tokens / whole),
                "share": round(alone / whole, 3),
            }
    make = functools.partial(text_trajectory, tokenizer=ours)
    many = [d for batch in documents.values() for d in batch] * 4
    seconds = {}
    for count in (1, processes):
        start = time.perf_counter()
        num_tokens = sum(len(t) for t in encode_parallel(many, make, count))
        seconds[count] = time.perf_counter() - start
    result["parallel"] = {
        "tokens": num_tokens,
        "seconds": {str(count): round(s, 2) for count, s in seconds.items()},
    }
    return result


def _library(tokenizer: Tokenizer) -> Callable[[TextDocument], list[int]]:
    """The library's own encoding, of the tokenizer's own copy of the model.

    Two copies would drive each other out of the processor's cache.
    """
    encode = tokenizer._encode
    return lambda document: encode(document.text)


def _medians(
    documents: list[TextDocument], timed: list[Callable[[TextDocument], object]], repeats: int
) -> list[float]:
    """The median processor time of each over all documents, in seconds; they take turns."""
    sums: list[list[float]] = [[] for _ in timed]
    for _ in range(repeats):
        for found in sums:
            found.append(0.0)
        for start in range(0, len(documents), _TURN):
            turn = documents[start : start + _TURN]
            for work, found in zip(timed, sums, strict=True):
                begin = time.process_time()
                for document in turn:
                    work(document)
                found[-1] += time.process_time() - begin
    return [statistics.median(found) for found in sums]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    read = read_documents(given.data)
    workload.print_result(run(read, given.vocab_size, given.processes, given.repeats))
