"""What `agentx export --quantize` prints: what eight bits cost, on text or on random tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agentx.cli.runs import Policy
from agentx.data.store import TokenStore
from agentx.interop.quantize import Quantization
from agentx.interop.quantize_loss import accuracy_loss, random_rows

# How many documents of a store are measured on, and how many tokens of each.
_DOCUMENTS, _TOKENS = 16, 256


def accuracy_table(policy: Policy, quantize: Quantization, dtype: str, store: Path | None) -> str:
    """The figures of `accuracy_loss`, a line each, below one that says what they are of.

    store: where the text is, which has to be of the policy's tokenizer; None for random tokens.
    """
    if store is None:
        tokens = random_rows(policy.tokenizer.vocab_size, policy.config.max_length)
        where = "random tokens; --rows STORE measures on text"
    else:
        tokens, where = _rows_of(store, policy), f"next tokens of {store}"
    loss = accuracy_loss(policy.params, policy.config, tokens, quantize, dtype=dtype)
    head = f"What {quantize} changes: the error of each kind of weight, and on {loss.num_tokens}"
    return f"{head} {where}:\n{loss.table()}"


def _rows_of(path: Path, policy: Policy) -> np.ndarray:
    """The beginnings of documents from all over a store, as `accuracy_loss` takes them."""
    store = TokenStore.open(path, tokenizer_fingerprint=policy.tokenizer.fingerprint)
    if not len(store):
        raise ValueError(f"{path} holds no documents; give another store")
    length = min(_TOKENS, policy.config.max_length)
    chosen = np.unique(np.linspace(0, len(store) - 1, _DOCUMENTS).astype(int))
    wanted = [(int(i), 0, min(length, int(store.lengths[i]))) for i in chosen]
    tokens = np.full((len(wanted), length), -1, np.int32)
    for row, trajectory in zip(tokens, store.pieces(wanted), strict=True):
        ids = np.asarray(trajectory.ids)
        row[: len(ids)] = ids
    return tokens
