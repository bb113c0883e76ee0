"""What token stores hold, as a table and as a picture: tokens by role, outcome and length."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rich.box
import rich.console
import rich.table

from agentx.data.store import TokenStore
from agentx.report.palette import picture_colour
from agentx.trajectory import Outcome, Role

_WIDE = 160


@dataclasses.dataclass(frozen=True)
class StoreStats:
    """One source of a store: its name, tokens i64[roles, outcomes], each document's length, reward.

    A reward is NaN where nobody gave one.
    """

    name: str
    tokens: np.ndarray
    lengths: np.ndarray
    rewards: np.ndarray


def read_stats(
    paths: Sequence[str | os.PathLike[str]], *, verify: bool = False
) -> list[StoreStats]:
    """Of each source of each store; of one that is not complete, of what it holds so far.

    verify: read every file, too, and compare it with what was written. Raises ValueError where one
    is missing, empty or damaged.
    """
    stats = []
    for path in paths:
        store = TokenStore.open(path, partial=True)
        if verify:
            store.verify()
        if not len(store):
            raise ValueError(f"{path} holds no document yet")
        name = Path(path).name
        for number, (source, tokens) in enumerate(
            zip(store.sources, store.tokens_by_role(), strict=True)
        ):
            own = store.source_of == number
            if own.any():
                title = (
                    source if source and len(paths) == 1 else "/".join(filter(None, (name, source)))
                )
                stats.append(StoreStats(title, tokens, store.lengths[own], store.rewards[own]))
    return stats


def print_stats(stats: Sequence[StoreStats], console: rich.console.Console | None = None) -> None:
    """A line a store, and one for all where there are several; then tokens by role and outcome."""
    console = console or rich.console.Console()
    if not console.is_terminal:  # a file or a pipe is as wide as it needs to be
        console.width = _WIDE
    table = _table("store", "documents", "tokens", "median", "90 %", "longest", "reward")
    everything = StoreStats(
        "all",
        sum((s.tokens for s in stats), np.zeros((len(Role), len(Outcome)), np.int64)),
        np.concatenate([s.lengths for s in stats]),
        np.concatenate([s.rewards for s in stats]),
    )
    for s in [*stats, *([everything] if len(stats) > 1 else [])]:
        known = s.rewards[np.isfinite(s.rewards)]
        median, most = np.quantile(s.lengths, [0.5, 0.9], method="lower")
        table.add_row(
            s.name,
            *(f"{n:,}" for n in (len(s.lengths), s.lengths.sum(), median, most, s.lengths.max())),
            f"{known.mean():.2f} of {len(known):,}" if len(known) else "none",
        )
    console.print(table)
    table = _table("tokens", *(o.name.lower() for o in Outcome), "share")
    for role in Role:
        row = everything.tokens[role]
        if row.any():
            share = row.sum() / everything.tokens.sum()
            table.add_row(role.name.lower(), *(f"{n:,}" for n in row), f"{100 * share:.1f} %")
    console.print(table)


def plot_stats(stats: Sequence[StoreStats], path: Path) -> None:
    """Draws shares of roles, failed steps hatched, and lengths, to a .png, .svg or .pdf.

    Raises ValueError for another kind of file.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path}: it must end in .png, .svg or .pdf")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 2.2 + 0.5 * len(stats)
    figure, (roles, lengths) = pyplot.subplots(2, 1, figsize=(8, height + 3), layout="constrained")
    for at, s in enumerate(stats):
        left, total = 0.0, s.tokens.sum()
        for role in Role:
            for outcome in (Outcome.OK, Outcome.RECOVERED, Outcome.FAILED):
                share = 100 * s.tokens[role, outcome] / total
                hatch = {Outcome.FAILED: "////", Outcome.RECOVERED: ".."}.get(outcome, "")
                colour = picture_colour(role)
                roles.barh(at, share, left=left, color=colour, hatch=hatch, edgecolor="white")
                left += share
        most = max(int(s.lengths.max()), 2)
        bins = np.geomspace(1, most + 1, 40)
        lengths.hist(s.lengths, bins=bins, weights=s.lengths / 1e6, histtype="step", label=s.name)
    roles.set_yticks(range(len(stats)), [s.name for s in stats])
    roles.invert_yaxis()
    roles.set_xlim(0, 100)
    roles.set_xlabel("% of tokens by role (hatched: failed, dotted: recovered)")
    held = [role for role in Role if any(s.tokens[role].any() for s in stats)]
    patches = [pyplot.Rectangle((0, 0), 1, 1, color=picture_colour(role)) for role in held]
    names = [role.name.lower() for role in held]
    figure.legend(patches, names, ncols=4, loc="outside upper center", frameon=False)
    lengths.set_xscale("log")
    lengths.set_xlabel("length of a document, tokens")
    lengths.set_ylabel("million tokens")
    lengths.legend(loc="upper left", frameon=False, fontsize="small")
    for axes in (roles, lengths):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _table(first: str, *others: str) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
