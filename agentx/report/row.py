"""A row of a batch as one page: its tokens, who sees whom, and the mixture that it comes from.

Enters, as plain numbers and strings (`agentx.cli.rows.page_fields` makes them):

    title, source      what is shown, and the run file or store that it came from
    length             places of the row, padding included
    row, batch         {"tokens", "trained", "padding", "weight"} of each; batch may be None
    parts              {"name", "objective", "share", "had", "num_rows", "plan"} of each source
    runs               {"begin", "end", "subtree_end", "position", "depth"} of each run of tokens
    segments           entries of trajectories.json (see `agentx.report`) with "begin" and "end" of
                       their places and "piece", in words; each token may have "place", "position"
                       and "is_marker"

Leaves: a page that loads nothing. Its pictures are drawn in units of places, a run or a span at a
time, so that they are exact and stay small however long the row is.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from agentx.report.page import write_page
from agentx.report.tokens import roles_used, view


def write_row_page(path: Path, fields: Mapping[str, Any]) -> None:
    """Writes the page; `fields` as above."""
    segments, length = fields["segments"], fields["length"]
    largest = max((abs(t["weight"]) for s in segments for t in s["tokens"]), default=0.0) or 1.0
    names = {segment["begin"]: segment["title"] for segment in segments}
    runs = [{**run, "name": names.get(run["begin"], "")} for run in fields["runs"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(
        path,
        "row.html.jinja",
        **{
            **fields,
            "segments": [{**view(segment, largest), "tone": ""} for segment in segments],
            "runs": runs,
            "roles": roles_used(segments),
            "strip": strip(segments, length, largest),
            "mask": mask(runs, length),
        },
    )


def strip(segments: Sequence[Mapping[str, Any]], length: int, largest: float) -> Markup:
    """The row from its first place to its last: roles above, what is predicted of them below.

    largest: the weight that is drawn strongest.
    """
    parts = []
    for segment in segments:
        inputs = [t["role"] for t in segment["tokens"][:-1]]
        weights = [t["weight"] for t in segment["tokens"][1:]]
        for begin, end, role in _stretches(inputs, segment["begin"]):
            parts.append(
                f'<rect class="role {role}" x="{begin}" y="0" width="{end - begin}" height="64">'
                f"<title>{role}: places {begin} to {end - 1}</title></rect>"
            )
        for begin, end, weight in _stretches(weights, segment["begin"]):
            if weight:
                down = " down" if weight < 0 else ""
                parts.append(
                    f'<rect class="weight{down}" x="{begin}" y="72" width="{end - begin}" '
                    f'height="28" opacity="{0.2 + 0.8 * abs(weight) / largest:.2f}">'
                    f"<title>weight {weight:.4g}: places {begin} to {end - 1}</title></rect>"
                )
    for border in sorted({s[side] for s in segments for side in ("begin", "end")}):
        parts.append(f'<path class="border" d="M{border} 0V100"/>')
    return Markup(
        f'<svg class="strip" viewBox="0 0 {length} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="the roles and weights of {length} places">{"".join(parts)}</svg>'
    )


def mask(runs: Sequence[Mapping[str, Any]], length: int) -> Markup:
    """Who sees whom: queries downwards, keys to the right, an area for the keys of each run.

    A key at k is seen by the queries from k up to the end of its subtree: so the keys of a run make
    a triangle, and a rectangle below it where other runs continue theirs.
    """
    parts = []
    for number, run in enumerate(runs):
        begin, end, below = run["begin"], run["end"], run["subtree_end"]
        about = f"{run['name'] or f'run {number}'}: keys {begin} to {end - 1}, "
        about += f"seen by queries up to {below - 1}"
        parts.append(
            f'<path class="{"even" if number % 2 == 0 else "odd"}" '
            f'd="M{begin} {begin}L{end} {end}V{below}H{begin}Z">'
            f"<title>{html.escape(about)}</title></path>"
        )
    return Markup(
        f'<svg class="mask" viewBox="0 0 {length} {length}" role="img" '
        f'aria-label="which of {length} places sees which">{"".join(parts)}</svg>'
    )


def _stretches(values: Sequence[Any], begin: int) -> list[tuple[int, int, Any]]:
    """Runs of equal values: (first place, place behind the last, value)."""
    found = []
    for value, run in itertools.groupby(values):
        end = begin + sum(1 for _ in run)
        found.append((begin, end, value))
        begin = end
    return found
