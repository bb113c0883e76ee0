"""From the files of a run to report.html, in the order of the page.

results.json, metrics.jsonl, trajectories.json
  -> headline, scores, curves, stages, ablation, trajectories     plain dicts
  -> report.html.jinja, which escapes whatever it prints          one page

`write_page` turns any template of this room into a page with everything inside it.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from agentx import metrics
from agentx.eval.scores import Difference, Score, unpaired_difference
from agentx.report import charts, palette, table, tokens

# name -> (label, what it is a share of)
SCORES = {
    "success": ("Success", "tasks that were solved"),
    "new_tool": ("New tool", "tasks solved with a tool never seen in training"),
    "valid_call": ("Valid calls", "calls that parse and fit a tool on offer"),
    "recovery": ("Recovery", "episodes with a failed call that were solved all the same"),
    "loop": ("Loops", "episodes that went round in circles; lower is better"),
}
MAIN_CURVES = ("loss", "reward")
_NO_CURVES = ("step", "time", "seconds")
STAGE_LABELS = {"sft": "SFT", "grpo": "GRPO", "rl": "RL", "pretrain": "Pretraining"}


def write_report(out_dir: str | Path) -> Path:
    """Write `out_dir/report.html` from what `agentx.report` describes, and return its path.

    Raises ValueError, naming file and line, where results.json is missing or can't be read.
    """
    out_dir = Path(out_dir)
    results = _read_json(out_dir / "results.json")
    if not isinstance(results, dict) or not isinstance(results.get("stages"), list):
        raise ValueError(f'{out_dir / "results.json"} holds no list under "stages"')
    for number, stage in enumerate(results["stages"], 1):
        if "name" not in stage:
            raise ValueError(f'{out_dir / "results.json"}: stage {number} has no "name"')
    curves = []
    for stage in results["stages"]:
        path = out_dir / stage["name"] / metrics.FILE_NAME
        if path.exists():
            curves.append((stage["name"], metrics.read_metrics(path)))
    path = out_dir / "trajectories.json"
    records = _read_json(path) if path.exists() else []
    return _write(out_dir, results, curves, records)


def write_run_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from the metrics.jsonl of one run alone, and return its path."""
    run_dir = Path(run_dir)
    if not (run_dir / metrics.FILE_NAME).exists():
        raise ValueError(f"{run_dir} holds no {metrics.FILE_NAME}: it is not the folder of a run")
    name = run_dir.resolve().name
    records = metrics.read_metrics(run_dir)
    stage: dict[str, Any] = {"name": name}
    if records:
        stage["steps"] = records[-1]["step"]
        # Of all the processes that made it, without the time between them.
        stage["seconds"] = records[-1].get("seconds")
    return _write(run_dir, {"stages": [stage]}, [(name, records)], [])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: a finished pipeline writes it") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _write(
    out_dir: Path,
    results: Mapping[str, Any],
    curves: Sequence[tuple[str, list[dict[str, Any]]]],
    records: Sequence[Mapping[str, Any]],
) -> Path:
    path = out_dir / "report.html"
    write_page(
        path,
        "report.html.jinja",
        results=results,
        stages=results["stages"],
        cut_short=table.stages_cut_short(results),
        totals=_totals(results["stages"]),
        headline=_headline(results),
        panels=_score_panels(results["stages"]),
        curves=_curves(curves),
        ablation=_ablation(results),
        trajectories=[tokens.view(r) for r in records],
        roles=tokens.roles_used(records),
    )
    return path


def write_page(path: Path, template: str, **fields: Any) -> None:
    """Fills a template, which escapes whatever it prints, and writes it with style and script."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("agentx.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda share: f"{100 * share:.1f}",
        points=lambda share: _minus(f"{100 * share:+.1f}"),
        thousands="{:,}".format,
        count=metrics.format_count,
        seconds=metrics.format_seconds,
        tiny="{:.1e}".format,
        stage=_stage_label,
    )
    package = importlib.resources.files("agentx.report")
    rules = (package / "report.css").read_text(encoding="utf-8")
    page = environment.get_template(template).render(
        **fields,
        style=Markup(f"{palette.style()}\n{rules}"),
        script=Markup((package / "report.js").read_text(encoding="utf-8")),
    )
    path.write_text(page, encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# The sections
# ---------------------------------------------------------------------------------------------


def _headline(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Success before and after: of the promise if there is one, else of the last two stages."""
    scored = {
        s["name"]: _scores(s)["success"] for s in results["stages"] if "success" in _scores(s)
    }
    promise = results.get("promise")
    if promise:
        before, after = promise["before"], promise["after"]
        if before not in scored or after not in scored:
            raise ValueError(
                f"results.json promises a gain from {before!r} to {after!r}, "
                f"but success was scored after {', '.join(map(repr, scored)) or 'no stage'}"
            )
        gain = Difference(promise["gain"], promise["low"], promise["high"])
    elif len(scored) >= 2:
        before, after = list(scored)[-2:]
        gain = unpaired_difference(scored[before], scored[after])
    else:
        return None
    return {
        "before_stage": before,
        "after_stage": after,
        "before": scored[before],
        "after": scored[after],
        "gain": gain,
        "promise": promise,
    }


def _totals(stages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {key: sum(s.get(key) or 0 for s in stages) for key in ("seconds", "steps", "tokens")}


def _score_panels(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One panel a score, one row a stage: known scores first, in the order of SCORES."""
    found = dict.fromkeys(name for stage in stages for name in _scores(stage))
    names = [n for n in SCORES if n in found] + [n for n in found if n not in SCORES]
    panels = []
    for name in names:
        label, about = SCORES.get(name, (name.replace("_", " ").capitalize(), ""))
        rows = [(s["name"], _scores(s)[name]) for s in stages if name in _scores(s)]
        panels.append({"label": label, "about": about, "rows": rows})
    return panels


def _curves(runs: Sequence[tuple[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """For each stage its main curves, and all the others."""
    out = []
    for stage, records in runs:
        names = dict.fromkeys(k for r in records for k in r if k not in _NO_CURVES)
        drawn: dict[str, dict[str, Any]] = {}
        for name in names:
            points = [(r["step"], r[name]) for r in records if name in r]
            steps, values = zip(*points, strict=True)
            svg = charts.curve(steps, values, f"{_stage_label(stage)} {name}")
            if svg:
                last = next(v for v in reversed(values) if math.isfinite(v))
                drawn[name] = {
                    "name": name.replace("_", " "),
                    "svg": svg,
                    "last": _minus(f"{last:.4g}"),
                }
        main = [drawn.pop(name) for name in MAIN_CURVES if name in drawn]
        if main or drawn:
            out.append({"stage": stage, "main": main, "more": list(drawn.values())})
    return out


def _ablation(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last scored stage of the ablation beside the stage of the same name, score by score."""
    ablation = results.get("ablation")
    if not ablation:
        return None
    with_it = {s["name"]: _scores(s) for s in results["stages"]}
    shared = [s for s in ablation["stages"] if _scores(s) and with_it.get(s["name"])]
    if not shared:
        return None
    stage = shared[-1]["name"]
    full, ablated = with_it[stage], _scores(shared[-1])
    rows = [
        {
            "label": SCORES.get(name, (name.replace("_", " ").capitalize(),))[0],
            "full": full[name],
            "ablated": ablated[name],
            "difference": unpaired_difference(ablated[name], full[name]),
        }
        for name in full
        if name in ablated
    ]
    verdict = None
    if "success" in full and "success" in ablated:
        d = unpaired_difference(ablated["success"], full["success"])
        verdict = "helped" if d.low > 0 else "hurt" if d.high < 0 else "unclear"
    return {"name": ablation["name"], "stage": stage, "rows": rows, "verdict": verdict}


def _scores(stage: Mapping[str, Any]) -> dict[str, Score]:
    """The scores of a stage that have a value: a share of nothing has none."""
    return {
        name: Score(name, **score)
        for name, score in (stage.get("scores") or {}).items()
        if score and score["value"] is not None and math.isfinite(score["value"])
    }


def _minus(number: str) -> str:
    return number.replace("-", "\u2212", 1) if number.startswith("-") else number


def _stage_label(name: str) -> str:
    return STAGE_LABELS.get(name, name[:1].upper() + name[1:].replace("_", " "))
