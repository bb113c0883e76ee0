"""What a run measured, on disk and on screen.

`MetricsWriter` appends one JSON object a line to `metrics.jsonl`; `read_metrics` reads them back;
`Progress` shows the newest of them while a stage runs. Nothing here knows JAX: a value is anything
that `float` takes, so the caller decides when to wait for a device.
"""

from __future__ import annotations

import collections
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import rich.console
import rich.progress

FILE_NAME = "metrics.jsonl"


# ---------------------------------------------------------------------------------------------
# On disk
# ---------------------------------------------------------------------------------------------


class MetricsWriter:
    """Appends records {"step", "time", **scalars} to `run_dir/metrics.jsonl`.

    resume_from: the step of the checkpoint that the run goes on from. Records of later steps are
      dropped, by an atomic rewrite, because the run is about to write them again. None starts the
      file anew.

    A record is one `write` of one line and is flushed, so a killed process leaves at most one torn
    line, at the end, which `read_metrics` ignores and a resume removes.
    """

    def __init__(self, run_dir: str | Path, *, resume_from: int | None = None) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[dict[str, Any]] = []
        if resume_from is not None and self.path.exists():
            kept = [r for r in read_metrics(self.path) if r["step"] <= resume_from]
        partial = self.path.with_name(FILE_NAME + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(_to_line(record) for record in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, **scalars: Any) -> None:
        """Append one record. A value that is not finite is written as null."""
        self._file.write(_to_line({"step": int(step), "time": time.time(), **scalars}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, or of the one in a run's folder, in the order written.

    Null reads as NaN. A last line without its newline is what a killed process left, and is
    ignored. Raises ValueError, with file and line, for any other line that is not a record.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    *lines, _torn = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: not a JSON record ({error}); delete the line"
            ) from error
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f'{path}, line {number}: a record has no "step"; delete the line')
        records.append({key: math.nan if v is None else v for key, v in record.items()})
    return records


def _to_line(record: Mapping[str, Any]) -> str:
    return json.dumps({key: _to_number(value) for key, value in record.items()}) + "\n"


def _to_number(value: Any) -> int | float | None:
    if isinstance(value, int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


# ---------------------------------------------------------------------------------------------
# On screen
# ---------------------------------------------------------------------------------------------


class Progress:
    """One stage's progress: name, step of total, rate, time left, and whatever scalars are given.

        pretrain ━━━━━━━━━━╸━━━━━━━━━  275/550  16.2k tokens/s  0:42 left  loss 1.234

    On a terminal this is one live line. Elsewhere (a log file, CI) it is a plain line at most every
    `interval` seconds, and always one for the last step.

    done: the step that the stage starts from, above 0 after a resume; neither rate nor time left
      counts what an earlier process did. Time left is shown once a hundredth of the stage is done.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        done: int = 0,
        interval: float = 10.0,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.total, self.interval = stage, total, interval
        self._console = console or rich.console.Console(file=sys.stderr)
        self._clock = clock
        self._start, self._step, self._tokens = done, done, 0
        # (time, step, tokens) of the newest updates. The rate is taken over these alone, so that
        # the compilation before the first step is forgotten soon.
        self._recent = collections.deque([(clock(), done, 0)], maxlen=50)
        self._last_line = clock()
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            column = rich.progress.TextColumn
            self._bar = rich.progress.Progress(
                column("[bold]{task.description}"),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.MofNCompleteColumn(),
                column("{task.fields[status]}", markup=False),
                console=self._console,
                refresh_per_second=4,
            )
            self._bar.add_task(self.stage, total=self.total, completed=self._step, status="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, *, num_tokens: int = 0, **scalars: Any) -> None:
        """The stage has done `step` steps, the last of them over `num_tokens` tokens."""
        now = self._clock()
        self._step = step
        self._tokens += num_tokens
        self._recent.append((now, step, self._tokens))
        status = self._status(scalars)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, status=status)
        elif now - self._last_line >= self.interval or step == self.total:
            self._last_line = now
            self._console.print(
                f"{self.stage} {step}/{self.total}  {status}", markup=False, soft_wrap=True
            )

    def _status(self, scalars: Mapping[str, Any]) -> str:
        (start, first_step, first_tokens), (end, step, tokens) = self._recent[0], self._recent[-1]
        parts = []
        if end > start and tokens > first_tokens:
            parts.append(f"{format_count((tokens - first_tokens) / (end - start))} tokens/s")
        # The first of many steps says little: it waited for processes to start or for a compiler.
        is_known = step - self._start >= (self.total - self._start) / 100
        if end > start and is_known and first_step < step < self.total:
            seconds = (self.total - step) * (end - start) / (step - first_step)
            parts.append(f"{format_seconds(seconds)} left")
        parts += [f"{name} {float(value):.4g}" for name, value in scalars.items()]
        return "  ".join(parts)


def format_count(value: float) -> str:
    """A count for people: 950, 16.2k, 3.4M, 1.2G."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999_950 would print as 1000.0k: whatever rounds up to the next unit takes that unit.
        if abs(value) >= limit * 0.99995:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def format_seconds(seconds: float) -> str:
    """A duration for people: 0:42, 12:05, 3:07:09."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
