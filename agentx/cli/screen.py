"""A row in the terminal: where it came from, who sees whom in it, and its tokens.

Nothing hangs on colour. Tokens stand in blocks of one role, outcome and weight, and what a block
has in common stands beside it: so a pipe or a screen without colours shows as much.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text

from agentx.cli.rows import Row, Run, Segment, figures, runs_of, segment_record
from agentx.report.palette import terminal_colour
from agentx.report.tokens import roles_used, visible_pieces, whole_text
from agentx.trajectory import Role

# A picture of more runs than these is wider than what it shows is worth.
_MOST_RUNS = 24


def print_row(row: Row, console: rich.console.Console | None = None) -> None:
    """Prints all of a row, as wide as the console is."""
    console = console or rich.console.Console(highlight=False)
    if row.parts:
        console.print(_parts(row))
        console.print(f"\nbatch  {figures(row.batch)}")
    own = figures(row.batch, slice(row.number, row.number + 1))
    console.print(f"row    {own}\n")
    console.print(_forest(row))
    records = [segment_record(row, segment) for segment in row.segments]
    number_of = {run.begin: number for number, run in enumerate(runs_of(row))}
    for segment, record in zip(row.segments, records, strict=True):
        console.print()
        number = number_of.get(segment.place) if segment.num_places else None
        name = "no place" if number is None else f"run {number}"
        title = rich.text.Text(f"{name}: {_about(segment)}", style="bold")
        console.rule(title, align="left", style="dim")
        if segment.stored.task_id:
            console.print(rich.text.Text(f"task {segment.stored.task_id}", style="dim"))
        console.print(_tokens(record, segment))
    console.print(_key(records))


def _parts(row: Row) -> rich.table.Table:
    table = _table()
    for name in ("source", "objective"):
        table.add_column(name, no_wrap=True)
    for name in ("share", "here", "rows"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("plan", overflow="fold")
    for part in row.parts:
        shares = (f"{100 * share:.1f} %" for share in (part.share, part.had))
        table.add_row(part.name, part.objective, *shares, str(part.num_rows), part.plan)
    return table


def _forest(row: Row) -> rich.table.Table:
    """A line a run of tokens: which runs it sees, and the three integers of its layout."""
    runs = runs_of(row)
    table = _table()
    table.add_column("run", justify="right", no_wrap=True)
    drawn = len(runs) <= _MOST_RUNS
    table.add_column("sees" if drawn else "", no_wrap=True)
    for name in ("index", "subtree_end", "position", "trained"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("document", overflow="fold", ratio=1)
    at_place = {s.place: s for s in row.segments if s.num_places}
    for number, run in enumerate(runs):
        trained = int((row.batch.weights[row.number, run.begin : run.end] != 0).sum())
        segment = at_place.get(run.begin)
        table.add_row(
            str(number),
            _sees(runs, number) if drawn else "└" * run.depth,
            f"{run.begin} to {run.end - 1}",
            str(run.subtree_end),
            f"{run.position} to {run.position + run.end - run.begin - 1}",
            f"{trained:,}",
            rich.text.Text(_about(segment) if segment else ""),
        )
    return table


def _sees(runs: Sequence[Run], number: int) -> str:
    """`█··◣`: all of run 0, nothing of 1 and 2, and of its own tokens those before each."""
    seen = set()
    at = number
    while (at := runs[at].parent) >= 0:
        seen.add(at)
    return "".join("█" if other in seen else "·" for other in range(number)) + "◣"


def _about(segment: Segment) -> str:
    parts = (f"{segment.source} {segment.document:,}", segment.piece, segment.change)
    return ", ".join(part for part in parts if part)


def _tokens(record: Mapping[str, Any], segment: Segment) -> rich.table.Table:
    """Blocks of tokens beside the place of the first, their role, outcome and weight."""
    table = rich.table.Table.grid(padding=(0, 2, 0, 0))
    blocks = [
        (key, list(tokens))
        for key, tokens in itertools.groupby(
            record["tokens"], key=lambda t: (t["role"], t["outcome"], t["weight"])
        )
    ]
    outcomes = any(outcome != "ok" for (_, outcome, _), _ in blocks)
    table.add_column(justify="right", no_wrap=True, style="dim")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(overflow="fold", ratio=1)
    for (role, outcome, weight), tokens in blocks:
        style = terminal_colour(Role[role.upper()]) + ("" if weight else " dim")
        who = f"{role} {outcome}" if outcomes and outcome != "ok" else role
        place = tokens[0].get("place", segment.place + segment.num_places)
        table.add_row(
            str(place),
            rich.text.Text(who, style=style),
            f"{weight:.4g}",
            _text(tokens, style),
        )
    return table


def _text(tokens: Sequence[Mapping[str, Any]], style: str) -> rich.text.Text:
    """What the tokens spell, in one colour: markers are underlined, codes reversed."""
    shown = rich.text.Text(style=style)
    for is_marker, run in itertools.groupby(tokens, key=lambda t: t["is_marker"]):
        text = whole_text([token["text"] for token in run])
        if is_marker:
            shown.append(text, style="underline")
            continue
        for kind, piece in visible_pieces(text):
            if kind == "newline":
                for mark in piece:
                    shown.append(mark, style="dim").append("\n")
            elif kind == "space":
                shown.append(piece.replace("·", " "))
            else:
                shown.append(piece, style="reverse" if kind == "code" else "")
    if shown.plain.endswith("\n"):
        shown.right_crop(1)
    return shown


def _key(records: Sequence[Mapping[str, Any]]) -> rich.text.Text:
    key = rich.text.Text("\nplace, role, weight of being predicted: ")
    for role in roles_used(records):
        key.append(role, style=terminal_colour(Role[role.upper()])).append(", ")
    key.append("dim", style="dim").append(": no loss, ").append("marker", style="underline")
    return key


def _table() -> rich.table.Table:
    return rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
