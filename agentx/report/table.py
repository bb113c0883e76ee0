"""The closing table of a pipeline, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table

from agentx.eval.scores import cut_short
from agentx.metrics import format_count, format_seconds


def print_stage_table(
    results: Mapping[str, Any], console: rich.console.Console | None = None
) -> None:
    """Print what results.json holds of each stage: time, steps, rate and scores in percent.

    The success score comes with its 95 % interval. Five scores fit a terminal of 80 columns.
    `results` is described in `agentx.report`.
    """
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True
    )
    table.caption = "\n".join(
        [
            "scores in percent, success with its 95 % interval",
            *(
                f"{stage}: of its episodes {cut}"
                for stage, cut in stages_cut_short(results).items()
            ),
        ]
    )
    table.add_column("stage", no_wrap=True)
    for name in ("time", "steps", "tokens\n/s"):
        table.add_column(name, justify="right", no_wrap=True)
    score_names = list(dict.fromkeys(n for s in results["stages"] for n in s.get("scores") or {}))
    for name in score_names:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for stage in results["stages"]:
        scores = stage.get("scores") or {}
        table.add_row(
            stage["name"],
            cell(stage.get("seconds"), format_seconds),
            cell(stage.get("steps"), "{:,}".format),
            cell(stage.get("tokens_per_s"), format_count),
            *(_score_cell(name, scores.get(name)) for name in score_names),
        )
    (console or rich.console.Console()).print(table)


def stages_cut_short(results: Mapping[str, Any]) -> dict[str, str]:
    """The stages of which some episodes came to no end of their own, and how many and why."""
    counts = ("episodes_truncated", "episodes_crashed")
    cut = {s["name"]: cut_short(*(s.get(c) or 0 for c in counts)) for s in results["stages"]}
    return {stage: text for stage, text in cut.items() if text}


def cell(value: Any, form: Any) -> str:
    """What is known of a value, "" of one that is not."""
    return "" if value is None else form(value)


def _score_cell(name: str, score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return ""
    value = f"{100 * score['value']:.1f}"
    if name != "success":
        return value
    return (
        f"[bold]{value}[/bold] [dim]\\[{100 * score['low']:.1f}, {100 * score['high']:.1f}][/dim]"
    )
