"""Documents from the command line to a token store."""

from __future__ import annotations

import time

import rich.console

from agentx.data.build import build
from agentx.data.prepare import BuildConfig
from agentx.data.store import TokenStore

_SECONDS_BETWEEN_LINES = 2.0


def build_store(config: BuildConfig) -> TokenStore:
    """Builds a store and says how it goes."""
    console = rich.console.Console(stderr=True, highlight=False)
    start = said = time.monotonic()
    num_tokens = 0

    def on_document(seen: int, tokens: int) -> None:
        nonlocal said, num_tokens
        num_tokens += tokens
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said = now
            rate = num_tokens / (now - start)
            console.print(
                f"{seen:,} documents, {num_tokens:,} tokens in {now - start:.0f} s, {rate:,.0f}/s"
            )

    return build(config, on_document)
