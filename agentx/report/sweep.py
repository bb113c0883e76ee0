"""A sweep as one table and one plot.

`results` is what sweep.json holds:

    {
      "name": "objectives", "command": "...", "hardware": "...", "versions": {"agentx": "0.1.0"},
      "seconds": 2100.0, "cpu_seconds": 3900.0, "baseline": "masking", "seeds": [0, 1],
      "runs": [
        {"arm": "masking", "seed": 0, "error": "", "steps": 500, "tokens": 300000,
         "share_with_loss": 0.4, "seconds": 60.0, "loss": 0.9, "evaluation_s": 8.0,
         "scores": {"call": {"value": 0.8, "low": 0.76, "high": 0.83, "count": 410, "total": 512}}},
        {"arm": "masking", "seed": 1, "error": "ended with code -9"}
      ],
      "arms": [
        {"name": "masking", "overrides": [], "num_runs": 1, "num_missing": 1, "steps": 500.0,
         "tokens": 300000.0, "share_with_loss": 0.4, "seconds": 60.0, "loss": 0.9,
         "scores": {"call": {"mean": {"value": 0.8, "low": 0.0, "high": 1.0}, "difference": null}}}
      ]
    }

What nothing is known of, for all of its runs failed, is null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentx.metrics import format_count, format_seconds
from agentx.report.table import cell

_COLOUR, _POINTS = "#1f77b4", "#9aa0a6"


def sweep_markdown(results: Mapping[str, Any]) -> str:
    """A row an arm: what it was trained on, its scores in percent, and the differences in points.

    Below it stand the runs that are missing, each with its error, and what the figures are.
    """
    names = _score_names(results)
    seeds, baseline = results["seeds"], results["baseline"]
    head = ["arm", "runs", "steps", "tokens", "with loss", "time", "loss"]
    head += [name.replace("_", " ") for name in names]
    head += [f"{name.replace('_', ' ')}, against {baseline}" for name in names]
    rows = [
        [
            arm["name"],
            f"{arm['num_runs']} of {len(seeds)}",
            cell(arm["steps"], "{:.0f}".format),
            cell(arm["tokens"], format_count),
            cell(arm["share_with_loss"], lambda share: f"{100 * share:.0f} %"),
            cell(arm["seconds"], format_seconds),
            cell(arm["loss"], "{:.3f}".format),
            *(cell(arm["scores"][name]["mean"], _interval) for name in names),
            *(cell(arm["scores"][name]["difference"], _signed_interval) for name in names),
        ]
        for arm in results["arms"]
    ]
    lines = [_row(head), _row(["---"] * len(head)), *map(_row, rows)]
    if missing := [run for run in results["runs"] if run["error"]]:
        count = f"{len(missing)} of {len(results['runs'])} runs"
        lines += ["", f"Missing: {count}, which count nowhere.", ""]
        lines += [f"- {run['arm']}, seed {run['seed']}: {run['error']}" for run in missing]
    lines += [
        "",
        f"Means over the seeds {', '.join(map(str, seeds))}; scores in percent with 95 % intervals "
        "(over seeds and questions), differences in points, seed by seed (over seeds alone). "
        f"`{results['command']}`, {results['hardware']}: {format_seconds(results['seconds'])} "
        f"in all, {format_seconds(results['cpu_seconds'])} of processor time.",
    ]
    return "\n".join(lines) + "\n"


def plot_sweep(results: Mapping[str, Any], path: Path) -> None:
    """A panel a score, a row an arm: every seed's score as a point, the mean and its interval.

    Where there are no scores, the loss of the last steps. Beside an arm's name stands how many of
    its runs are missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms, names = results["arms"], _score_names(results) or ["loss"]
    figure, panels = pyplot.subplots(
        1,
        len(names),
        figsize=(2 + 2.8 * len(names), 1.2 + 0.45 * len(arms)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, name in zip(panels[0], names, strict=True):
        for at, arm in enumerate(arms):
            values = list(_values(results, arm["name"], name))
            panel.plot(values, [at + 0.18] * len(values), ".", color=_POINTS, markersize=5)
            mean = arm["scores"][name]["mean"] if name != "loss" else None
            if mean is not None:
                value, low, high = (100 * mean[key] for key in ("value", "low", "high"))
                panel.plot([low, high], [at, at], color=_COLOUR, linewidth=1.5)
                panel.plot([value], [at], "o", color=_COLOUR, markersize=6)
            elif values:
                panel.plot([sum(values) / len(values)], [at], "o", color=_COLOUR, markersize=6)
        panel.set_title(name.replace("_", " "), fontsize="medium")
        panel.set_xlabel("loss of the last steps" if name == "loss" else "% right")
        if name != "loss":
            panel.set_xlim(-3, 103)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    labels = [
        a["name"] + (f"\n{a['num_missing']} missing" if a["num_missing"] else "") for a in arms
    ]
    panels[0][0].set_yticks(range(len(arms)), labels)
    panels[0][0].set_ylim(len(arms) - 0.4, -0.6)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _score_names(results: Mapping[str, Any]) -> list[str]:
    return list(results["arms"][0]["scores"])


def _values(results: Mapping[str, Any], arm: str, name: str) -> Iterator[float]:
    """The figure of each run of an arm, scores in percent."""
    for run in results["runs"]:
        if run["arm"] == arm and not run["error"]:
            yield run["loss"] if name == "loss" else 100 * run["scores"][name]["value"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(mean: Mapping[str, float]) -> str:
    return f"{100 * mean['value']:.1f} [{100 * mean['low']:.1f}, {100 * mean['high']:.1f}]"


def _signed_interval(difference: Mapping[str, float]) -> str:
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
