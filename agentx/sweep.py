"""A sweep: one run for every arm, point of a grid and seed; one table and one plot of all of them.

    SWEEP.gin -> runs, each the run file under overrides of its own -> `agentx train`, a process a
    run -> the scores of what each has left -> means over seeds, and differences from a baseline

Every run has a folder, OUT/ARM/seed_N, and is the command that `--dry-run` prints: so it can be
repeated alone, killed and gone on with like any other. A run that fails keeps its error, stops no
other and is tried again by the next call. Processes, because a run that is killed for its memory
must not take the others along, and because on a CPU two runs of one core each do more than one run
on two. They share the programs that they compile. What is in OUT:

    config.gin  data.json  data/  stores/  tokenizer.model     the last four where data is recorded
    ARM/seed_N/         a run, with log.txt (what it said) and run.json (its figures, once done)
    sweep.json  table.md  plot.png

This is the local form; on a cluster the same commands are submitted in place of started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from agentx.cli.config import find_config, load_config
from agentx.cli.runs import load_run, prepare_run
from agentx.env.tasks.recordings import RecordingConfig
from agentx.eval.calls import CallSuite, LibraryCalls
from agentx.eval.scores import Score, mean_of_runs, paired_runs_difference
from agentx.metrics import Progress, read_metrics
from agentx.parameters import newest_saved
from agentx.quickstart import describe_machine, record_data, write_json
from agentx.render import ToolRenderer
from agentx.report.sweep import plot_sweep, sweep_markdown
from agentx.sample.engine import Engine
from agentx.train import TrainConfig, until_sigterm

# What a name of an arm or a point may be made of, for it is a folder's too.
_NAME = re.compile(r"[\w+=.,-]+")
# An override that begins so is for every run, not for the sweep's own file.
_FOR_RUNS = "run/"
# The command line in a process of its own, wherever its script is installed.
_AGENTX = "import sys; from agentx.cli.main import main; sys.exit(main())"
_POLL_S = 0.2
# How long a run that was told to stop may take to save.
_STOPPING_S = 120.0

Value = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Which runs, and what is measured of each.

    run: the run file. arms: by name, overrides of it, each "Name.field=value" or "MACRO=value".
    grid: values to try, by binding; every arm is run at every point of it. seeds: TrainConfig.seed
      of the runs that each arm has.
    baseline: the arm that others are compared with; "" for the first.
    recording, vocab_size: what is recorded before the first run, and its tokenizer's size; the run
      file finds it below its macro DATA. None where the run file needs none.
    evaluation: what each policy is asked when it has been trained, if anything.
    parallel: how many runs go at once. timeout_s: how long a single one may take.
    """

    run: str
    arms: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: {"run": ()})
    grid: dict[str, tuple[Value, ...]] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    baseline: str = ""
    recording: RecordingConfig | None = None
    vocab_size: int = 1024
    evaluation: LibraryCalls | None = None
    parallel: int = 2
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds or not all(self.grid.values()):
            raise ValueError("arms, seeds and every binding of the grid must have something to try")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds has one twice: {self.seeds}")
        if self.parallel < 1 or self.timeout_s <= 0:
            raise ValueError(
                f"parallel must be 1 or more and timeout_s positive, got {self.parallel} and "
                f"{self.timeout_s}"
            )
        names = self.points()
        for name in names:
            if not _NAME.fullmatch(name) or name in (".", ".."):
                raise ValueError(f"{name!r} cannot name a folder: use letters, digits and _+=.,-")
        if self.baseline and self.baseline not in names:
            raise ValueError(f"baseline is {self.baseline!r}; choose from {', '.join(names)}")

    def points(self) -> dict[str, tuple[str, ...]]:
        """The overrides of every arm at every point of the grid, by name, in order.

        The name of an arm at a point is "ARM,field=value".
        """
        points = {}
        for arm, overrides in self.arms.items():
            for values in itertools.product(*self.grid.values()):
                bound = dict(zip(self.grid, values, strict=True))
                name = [arm, *(f"{key.rpartition('.')[2]}={v}" for key, v in bound.items())]
                points[",".join(name)] = (*overrides, *(f"{k}={v}" for k, v in bound.items()))
        return points

    @property
    def compared_with(self) -> str:
        return self.baseline or next(iter(self.points()))


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep: an arm under a seed. `overrides`: all that the run file is changed by."""

    arm: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}/seed_{self.seed}"


def plan(config: SweepConfig, out: Path, overrides: Sequence[str] = ()) -> list[Run]:
    """All runs, seed by seed: so a sweep that is cut short has compared every arm.

    overrides: of every run; an arm's own go last.
    """
    # In quotes, for a folder may be called 2024.
    shared = (
        [f"DATA={json.dumps(str(out), ensure_ascii=False)}"] if config.recording is not None else []
    )
    return [
        Run(arm, seed, (*shared, *overrides, *own, f"TrainConfig.seed={seed}"))
        for seed in config.seeds
        for arm, own in config.points().items()
    ]


def run_sweep(file: str, out: Path | None, *, dry_run: bool, overrides: Sequence[str]) -> int:
    """Carries out a sweep in `out`; returns the exit code: 1 where a run failed.

    out: sweeps/ and the file's name if None. overrides: "run/Name.field=value" for every run,
    "Name.field=value" for the sweep's own file. Started again in the same folder, runs that are
    done are taken as they are. SIGTERM saves the runs that are on, and ends.
    """
    overrides = [o.removeprefix("--gin.") for o in overrides]
    for_runs = [o.removeprefix(_FOR_RUNS) for o in overrides if o.startswith(_FOR_RUNS)]
    own = [o for o in overrides if not o.startswith(_FOR_RUNS)]
    config: SweepConfig = load_config(file, own, root="SweepConfig")
    out = Path("sweeps") / find_config(file).stem if out is None else out
    runs = plan(config, out, for_runs)
    # All of them now: what is wrong with the last should not be found out at its turn.
    configs: dict[Run, TrainConfig] = {run: load_config(config.run, run.overrides) for run in runs}
    if dry_run:
        for run in runs:
            print(shlex.join(_command(config.run, run.overrides, out / run.name)))
        print(f"\nThat would be {len(runs)} runs, {config.parallel} at a time, in {out}")
        print("Next: the same without --dry-run")
        return 0

    console = Console(stderr=True, highlight=False)
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out) as lock:
        # These two may differ from call to call, for they change no result.
        at_defaults = dataclasses.replace(
            config, parallel=SweepConfig.parallel, timeout_s=SweepConfig.timeout_s
        )
        prepare_run(at_defaults, out)
        # ------------------------------------------------------------ data
        if config.recording is not None:
            record_data(config.recording, config.vocab_size, out, console)

        # ------------------------------------------------------------ runs
        for run in runs:
            prepare_run(configs[run], out / run.name)
        sweep = _Sweep(config, configs, out, lock, console)
        interrupted = sweep.run_all()

        # ------------------------------------------------------------ results
        # Of earlier calls too, which did a part of the runs.
        before = {"seconds": 0.0, "cpu_seconds": 0.0}
        if (out / "sweep.json").exists():
            before = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
        about = {
            "name": find_config(file).stem,
            "command": shlex.join(["agentx", *sys.argv[1:]]),
            **describe_machine(),
            "seconds": before["seconds"] + time.perf_counter() - started,
            "cpu_seconds": before["cpu_seconds"] + _cpu_seconds(),
        }
        results = about | summarise(config, sweep.records)
        write_json(out / "sweep.json", results)
        table = sweep_markdown(results)
        (out / "table.md").write_text(table, encoding="utf-8")
        plot_sweep(results, out / "plot.png")
    print(table)
    print(f"\nThe table is {out / 'table.md'}, the plot {out / 'plot.png'}; figures in sweep.json")
    if interrupted:
        print("Next: the same command, which goes on from here")
        return 0
    first = next((out / r.name for r in runs if not sweep.records[r]["error"]), out / runs[0].name)
    print(f"Next: agentx report {first}")
    return 1 if any(record["error"] for record in sweep.records.values()) else 0


def _command(run_file: str, overrides: Sequence[str], folder: Path) -> list[str]:
    """A run as a command line of its own."""
    changed = [f"--gin.{override}" for override in overrides]
    return ["agentx", "train", run_file, *changed, "--run", str(folder)]


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Holds OUT/lock, a file descriptor that runs inherit: while one of them lives, it is locked.

    So runs that outlive a killed sweep are not started a second time beside themselves.
    """
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{out} is in use by another sweep, or by runs that one has left behind: wait for "
                "them, or end them"
            ) from None
        yield file.fileno()


def _cpu_seconds() -> float:
    """User and system time of this process and of the runs that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class _Process:
    """A run on its way."""

    def __init__(self, folder: Path, environment: Mapping[str, str], lock: int):
        self._log = folder / "log.txt"
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        # Whether it was told to stop because it had had its time.
        self.is_late = False
        self.started = time.monotonic()
        with self._log.open("ab") as log:
            self._popen = subprocess.Popen(
                [
                    *(sys.executable, "-c", _AGENTX, "train"),
                    *(str(folder / "config.gin"), "--run", str(folder)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
                # Ctrl-C is for the sweep, which tells its runs to save.
                start_new_session=True,
            )

    def ended(self) -> bool:
        return self._popen.poll() is not None

    def error(self) -> str:
        """What an ended run says of its failure, "" where there was none."""
        if self._popen.returncode == 0:
            return ""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").split("\n")
        said = [line for line in lines if line.startswith("error: ")] or ["", *filter(None, lines)]
        if self._popen.returncode == 2 and said[-1]:
            return said[-1].removeprefix("error: ")
        return f"ended with code {self._popen.returncode}: {said[-1]}".rstrip(": ")

    def tell_to_stop(self) -> None:
        if not self.ended():
            self._popen.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Until it has saved and ended; where that takes too long, it is killed."""
        try:
            self._popen.wait(_STOPPING_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


class _Sweep:
    """The runs of one sweep, some of them on; and their records, once they are done."""

    def __init__(
        self,
        config: SweepConfig,
        configs: Mapping[Run, TrainConfig],
        out: Path,
        lock: int,
        console: Console,
    ):
        self._config, self._configs, self._out = config, configs, out
        self._lock, self._console = lock, console
        self.records: dict[Run, dict[str, Any]] = {}
        compiled = {"JAX_COMPILATION_CACHE_DIR": str((out / "compiled").absolute())}
        self._environment = compiled | os.environ
        self._asked: tuple[Any, CallSuite, Engine] | None = None
        self._num_policies = 0

    def run_all(self) -> bool:
        """Brings every run to its end that is not there yet; returns whether SIGTERM came first."""
        for run in self._configs:
            file = self._out / run.name / "run.json"
            if file.exists():
                self.records[run] = json.loads(file.read_text(encoding="utf-8"))
        waiting = [run for run in self._configs if run not in self.records]
        running: dict[Run, _Process] = {}
        over: list[Run] = []
        total = len(self._configs)
        with (
            until_sigterm() as stop,
            Progress("runs", total, done=total - len(waiting)) as progress,
        ):
            try:
                while (waiting or running) and not stop.is_set():
                    over += [r for r, p in running.items() if r not in over and self._is_over(p)]
                    # The next is on its way while one that is over is judged.
                    while waiting and len(running) - len(over) < self._config.parallel:
                        run = waiting.pop(0)
                        folder = self._out / run.name
                        running[run] = _Process(folder, self._environment, self._lock)
                    if over:
                        run = over.pop(0)
                        self.records[run] = self._record(run, running.pop(run))
                        progress.update(len(self.records))
                        self._say(run)
                    else:
                        time.sleep(_POLL_S)
            finally:
                for process in running.values():
                    process.tell_to_stop()
                for process in running.values():
                    process.wait()
        for run in self._configs:
            if run not in self.records:
                self.records[run] = _record_of(run, "not finished")
        return stop.is_set()

    def _is_over(self, process: _Process) -> bool:
        """Whether it has ended, or has had its time and is told to."""
        if process.ended():
            return True
        process.is_late = time.monotonic() - process.started > self._config.timeout_s
        if process.is_late:
            process.tell_to_stop()
        return process.is_late

    def _record(self, run: Run, process: _Process) -> dict[str, Any]:
        """What became of a run; in its run.json too, where it came to its end."""
        folder, wanted = self._out / run.name, self._configs[run].num_steps
        process.wait()
        if process.is_late:
            return _record_of(run, f"took over {self._config.timeout_s:g} s")
        if error := process.error():
            return _record_of(run, error)
        _, step, extras = newest_saved(folder)
        if step < wanted:
            return _record_of(run, f"was told to stop at step {step}")
        logged = read_metrics(folder)
        last = [r["loss"] for r in logged[-max(1, len(logged) // 10) :]]
        started = time.perf_counter()
        scores = self._scores(folder) if self._config.evaluation is not None else {}
        record = _record_of(run) | {
            "steps": step,
            "tokens": extras["tokens"],
            # Not every step is logged, and they are much alike.
            "share_with_loss": sum(r["tokens"] for r in logged)
            / sum(r["num_tokens"] for r in logged),
            "seconds": extras["seconds"],
            "loss": float(np.mean(last)),
            "scores": {name: score.to_json() for name, score in scores.items()},
            "evaluation_s": time.perf_counter() - started,
        }
        write_json(folder / "run.json", record)
        return record

    def _scores(self, folder: Path) -> dict[str, Score]:
        """The scores of the policy in `folder`. Policies of one shape share a sampler."""
        assert self._config.evaluation is not None
        policy = load_run(folder)
        shape = (policy.config, policy.tokenizer.fingerprint)
        if self._asked is None or self._asked[0] != shape:
            renderer = ToolRenderer(policy.tokenizer)
            suite = CallSuite(self._config.evaluation, renderer)
            engine = Engine(
                policy.config,
                mesh=policy.mesh,
                num_slots=self._config.evaluation.num_slots,
                max_length=suite.max_length,
                vocab_size=policy.tokenizer.vocab_size,
                stop_ids=renderer.stop_ids,
                temperature=0.0,
            )
            self._asked = (shape, suite, engine)
        _, suite, engine = self._asked
        self._num_policies += 1
        engine.set_params(policy.params, version=self._num_policies)
        return suite.score(engine)

    def _say(self, run: Run) -> None:
        record = self.records[run]
        said = record["error"] or ", ".join(
            [
                *(f"{name} {100 * s['value']:.1f} %" for name, s in record["scores"].items()),
                f"loss {record['loss']:.3f}",
                f"{record['seconds']:.0f} s",
            ]
        )
        about = f"run {len(self.records)} of {len(self._configs)}, {run.name}"
        self._console.print(f"{about}: {said}", markup=False, soft_wrap=True)


def _record_of(run: Run, error: str = "") -> dict[str, Any]:
    return {"arm": run.arm, "seed": run.seed, "error": error}


def summarise(config: SweepConfig, records: Mapping[Run, Mapping[str, Any]]) -> dict[str, Any]:
    """What sweep.json says of runs and arms: records of all, and of each arm means and differences.

    A difference is from the baseline, over the seeds that both have. What failed, or was not
    begun, counts in num_missing and nowhere else.
    """
    done: dict[str, dict[int, Mapping[str, Any]]] = {arm: {} for arm in config.points()}
    for run, record in records.items():
        if not record["error"]:
            done[run.arm][run.seed] = record
    names = {name: None for runs in done.values() for r in runs.values() for name in r["scores"]}
    baseline = done[config.compared_with]
    arms = []
    for arm, overrides in config.points().items():
        own = done[arm]
        both = [seed for seed in own if seed in baseline]
        scores = {}
        for name in names:
            mine = {seed: Score.from_json(name, r["scores"][name]) for seed, r in own.items()}
            theirs = [Score.from_json(name, baseline[seed]["scores"][name]) for seed in both]
            scores[name] = {
                "mean": dataclasses.asdict(mean_of_runs([*mine.values()])) if own else None,
                "difference": dataclasses.asdict(
                    paired_runs_difference(theirs, [mine[seed] for seed in both])
                )
                if both and arm != config.compared_with
                else None,
            }
        averages = {
            key: float(np.mean([r[key] for r in own.values()])) if own else None
            for key in ("steps", "tokens", "share_with_loss", "seconds", "loss")
        }
        num_missing = len(config.seeds) - len(own)
        arms.append(
            {"name": arm, "overrides": overrides, "num_runs": len(own), "num_missing": num_missing}
            | averages
            | {"scores": scores}
        )
    return {
        "baseline": config.compared_with,
        "seeds": config.seeds,
        "runs": [*records.values()],
        "arms": arms,
    }
