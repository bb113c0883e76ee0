"""How the scores of attention come about, which every path has to follow."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scores:
    """softcap * tanh(scale * q @ k / softcap), over ancestors less than `window` above a token.

    softcap, window: None for none.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
