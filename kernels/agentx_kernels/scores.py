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

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window is {self.window}; it must be 1 or more, or None for no window"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is {self.softcap}; it must be above 0, or None for none")
